# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's launches over shards: the only calls of its kernels here, and the check of what they return. Touches
``flashinfer.BatchPrefillWithPagedKVCacheWrapper`` of 0.7.

Its kernel ``fa2`` runs from Ampere to Blackwell, and cuts KV into pieces and merges them itself. Results are asked for
as float16, also for bfloat16 queries: three bits more, so that the error of the whole is below that of stock attention.
No number above 65,504 fits, and outputs are averages of values, so a model whose values are larger is not served right.
A float8 cache holds none such, and its scale is applied afterwards. FlashInfer compiles this pair of types with nvcc
when a worker starts, and keeps it. Float32 is not among its types of output.

Its log-sum-exps are base 2. None of that is documented, so ``self_check`` tries it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.utils.torch_utils import async_tensor_h2d

from ...errors import UNSHARDED, NanoCPConfigError
from ..flash_launches import TableRow, queries_at_once
from ..partial_rows import RowLayout

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

LN2 = math.log(2)
# Of partial results, before they are merged in float32.
RESULTS = torch.float16
# Bytes that FlashInfer takes on the device for one planned launch: its tables, and lengths.
PLAN_BYTES = (8 << 20) + (128 << 10)
# Launches of so many steps are kept: the host may plan a step while the last one has yet to be copied.
_TURNS = 2


@dataclass(frozen=True)
class LaunchShape:
    """What all launches of a worker have in common.

    Attributes:
        num_heads, num_kv_heads, head_size: of this worker's attention.
        block_size: tokens a block holds.
        scale: of the scores.
        dtype, kv_dtype: of queries, and of keys and values.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass
class PlannedLaunch:
    """One launch of attention over shards.

    Attributes:
        num_queries: of all rows.
        planner: FlashInfer's, planned for it.
        scale: of the scores.
        dtype: of queries.
    """

    num_queries: int
    planner: BatchPrefillWithPagedKVCacheWrapper
    scale: float
    dtype: torch.dtype


@dataclass
class _Turn:
    """Planners of one step, and when their tables have been copied."""

    planners: list[Any] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class Planners:
    """Plans a step's launches, each by a planner of its own: it keeps the launch's tables until the last layer.

    Args:
        shape: of the launches.
        workspace: bytes on the device that all of them use, one after another.
    """

    def __init__(self, shape: LaunchShape, workspace: torch.Tensor) -> None:
        self.shape, self.device, self._workspace = shape, workspace.device, workspace
        self._turns, self._step, self._used = [_Turn() for _ in range(_TURNS)], 0, 0

    def begin(self) -> None:
        """A step's launches come next. Those of two steps ago must have been copied: FlashInfer writes the next ones to
        the same host memory."""
        self._step, self._used = self._step + 1, 0
        copied = self._turns[self._step % _TURNS].copied
        if copied is not None:
            copied.synchronize()

    def end(self) -> None:
        """All launches of the step are planned."""
        if self.device.type == "cuda" and self._used:
            turn = self._turns[self._step % _TURNS]
            turn.copied = turn.copied or torch.cuda.Event()
            turn.copied.record()

    def plan(self, rows: list[TableRow], causal: bool) -> PlannedLaunch:
        """A launch for rows of any number of queries.

        Args:
            rows: which sees what.
            causal: whether a row's queries are the last tokens of what it sees.
        """
        shape, planner = self.shape, self._next()
        queries = np.array([row.queries for row in rows], dtype=np.int32)
        lengths = np.array([row.length for row in rows], dtype=np.int32)
        pages = -(-lengths // shape.block_size)
        planner.plan(
            qo_indptr=self._host(_starts(queries)),
            paged_kv_indptr=self._host(_starts(pages)),
            paged_kv_indices=gather_pages([row.table for row in rows], pages, self.device),
            paged_kv_last_page_len=self._host(lengths - np.maximum(pages - 1, 0) * shape.block_size),
            num_qo_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim_qk=shape.head_size,
            page_size=shape.block_size,
            causal=causal,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.kv_dtype,
            o_data_type=RESULTS,
            seq_lens=self._host(lengths),
        )
        return PlannedLaunch(int(queries.sum()), planner, shape.scale, shape.dtype)

    def _next(self) -> BatchPrefillWithPagedKVCacheWrapper:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        planners = self._turns[self._step % _TURNS].planners
        if self._used == len(planners):
            planners.append(BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2"))
        self._used += 1
        return planners[self._used - 1]

    def _host(self, numbers: np.ndarray) -> torch.Tensor:
        """Pinned, so that copies of it need not wait."""
        made = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32))
        return made.pin_memory() if self.device.type == "cuda" else made


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


@triton.jit
def _gather_kernel(rows_ptr, pages_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows_ptr + row * 3).to(tl.pointer_type(tl.int32))
    first, count = tl.load(rows_ptr + row * 3 + 1), tl.load(rows_ptr + row * 3 + 2)
    pages = tl.load(source + at, mask=at < count, other=0)
    tl.store(pages_ptr + first + at, pages, mask=at < count)


def gather_pages(addresses: list[int], counts: np.ndarray, device: torch.device) -> torch.Tensor:
    """Block ids that lie anywhere on the device, one row's behind another's, in one launch.

    Args:
        addresses: of each row's first block id, int32.
        counts: how many each row has.
        device: where they are.

    Returns:
        int32 [all counts together].
    """
    starts = _starts(counts)
    pages = torch.empty(int(starts[-1]), dtype=torch.int32, device=device)
    rows = np.stack([np.array(addresses, dtype=np.int64), starts[:-1], counts], axis=1, dtype=np.int64)
    grid = (len(addresses), max(1, triton.cdiv(int(counts.max()), 1024)))
    _gather_kernel[grid](async_tensor_h2d(rows, device), pages, BLOCK=1024)
    return pages


def workspace_bytes(shape: LaunchShape, device: torch.device) -> int:
    """Bytes that FlashInfer takes at most for the pieces that a launch's KV is cut into, in float32, and their
    log-sum-exps: it cuts into as many as two for each multiprocessor, all KV heads together, of a tile of queries."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tile = 128 if shape.head_size < 256 else 64
    return shape.num_heads * (2 * processors // shape.num_kv_heads) * tile * 4 * (shape.head_size + 1) + 64


Scales = tuple[float, float]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, launch: PlannedLaunch, scales: Scales | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over paged KV.

    Args:
        query: [num_queries, num_heads, head_size], a head's numbers contiguous.
        keys, values: [num_blocks, block_size, num_kv_heads, head_size], of the same strides, the last one 1.
        launch: planned.
        scales: factors of float8 queries and keys; None: none. That of values is left to the caller, who has room for
            larger numbers.

    Returns:
        Outputs of type ``RESULTS`` [num_queries, num_heads, head_size], and float32 natural log-sum-exps
        [num_queries, num_heads], -inf for a query without keys.
    """
    out = torch.empty(query.shape, dtype=RESULTS, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    q_scale, k_scale = scales or (None, None)
    launch.planner.run(query, (keys, values), q_scale=q_scale, k_scale=k_scale, out=out, lse=lse, return_lse=True)
    return out, lse.mul_(LN2)


def most_memory(num_ranks: int, max_tokens: int, layout: RowLayout, dtype: torch.dtype) -> int:
    """Bytes that attention outside of graphs takes in a layer beside stock attention's, in the fullest step: see
    ``flash_tables.most_memory``. FlashInfer's results are written once and copied into rows.

    Args:
        num_ranks: N.
        max_tokens: most tokens of a rank's batch.
        layout: of partial results.
        dtype: of queries.
    """
    heads, most = layout.num_heads, queries_at_once(layout.num_heads, layout.head_size)
    query_bytes, guests = layout.query_bytes(dtype), num_ranks * max_tokens
    rows = (2 * num_ranks + 1) * max_tokens
    launches = -(-guests // most) + -(-max_tokens // most)
    launch = min(guests, most) * (heads * (RESULTS.itemsize * layout.head_size + 4) + query_bytes)
    return rows * (query_bytes + 4 * layout.size) + launch + _TURNS * launches * PLAN_BYTES


def self_check(shape: LaunchShape, device: torch.device) -> None:
    """Compile the kernel, and compare small launches with attention in float64.

    Raises:
        NanoCPConfigError: this FlashInfer does not return what is expected of it, or cannot be compiled here.
    """
    try:
        _check(shape, device)
    except Exception as error:
        raise NanoCPConfigError(
            f"nanocp: this FlashInfer does not return the partial results that shards need ({_one_line(error)}); it "
            f"compiles a kernel for them with nvcc when a worker starts; {UNSHARDED}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(repr(error).replace("\\n", " ").split())[:200]


def _check(shape: LaunchShape, device: torch.device) -> None:
    """Launches of one row and of many, of single queries and of several, causal and not, rows that end within a block,
    rows that are cut into pieces, and one without keys; the cache as vLLM has it. A launch's kernel depends on how many
    queries its rows have on average, and on how many rows are cut."""
    random = torch.Generator(device).manual_seed(0)
    size, dim, heads = shape.block_size, shape.head_size, shape.num_heads
    cache = torch.randn((64, shape.num_kv_heads, size, 2 * dim), device=device, generator=random).to(shape.kv_dtype)
    keys, values = cache.transpose(1, 2).split(dim, dim=-1)
    ids = torch.randperm(64, device=device, generator=random).to(torch.int32)
    planners = Planners(shape, torch.empty(workspace_bytes(shape, device), dtype=torch.uint8, device=device))
    longest = 64 * size
    for causal, counts, lengths in (
        (False, (1,), (longest - 3,)),
        (False, (1,), (2 * size + 5,)),
        (False, (1,) * 64, tuple(range(size, 65 * size - 64, size - 1))[:64]),
        (False, (1, 1, 1, 3), (5, longest - 3, 0, 2 * size)),
        (False, (70,), (longest // 2,)),
        (True, (40, 1, 7), (longest - 1, 1, 2 * size + 1)),
    ):
        planners.begin()
        rows = [TableRow(q, n, ids.data_ptr()) for q, n in zip(counts, lengths, strict=True)]
        launch = planners.plan(rows, causal)
        planners.end()
        query = torch.randn((sum(counts), heads, dim), device=device, generator=random).to(shape.dtype)
        out, lse = attend(query, keys, values, launch, None if keys.dtype == shape.dtype else (1.0, 1.0))
        at = 0
        for count, length in zip(counts, lengths, strict=True):
            part, at = slice(at, at + count), at + count
            k, v = (x[ids.long()].flatten(0, 1)[:length].double() for x in (keys, values))
            _compare(query[part].double(), k, v, out[part], lse[part], shape.scale, causal)


def _compare(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> None:
    if not len(keys):
        assert (lse == float("-inf")).all(), "log-sum-exps of a query without keys"
        return
    group = query.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->qhk", query, k) * scale
    if causal:
        shown = torch.ones(len(query), len(k), dtype=torch.bool, device=k.device).tril(len(k) - len(query))
        scores = scores.masked_fill(~shown[:, None], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-3, atol=1e-3)
    expected = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v).float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
