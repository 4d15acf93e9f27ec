# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend's steps on GPUs: with the real library, several ranks on one GPU or one on each, from graphs;
and errors of its partial results by their type."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from tests.unit.attention_steps import Kernel, Shape
from tests.unit.flashinfer_steps import flashinfer_kernel
from vllm_nanocp.attention.flash_launches import TableRow
from vllm_nanocp.attention.gqa.flashinfer_launches import LN2, LaunchShape, Planners

from .latent_steps import StagedExchange
from .modes import Modes, each_mode

PREFILL = "BatchPrefillWithPagedKVCacheWrapper"


def paged(keys: torch.Tensor, values: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of one row in blocks, as vLLM has them: views [num_blocks, block_size, num_kv_heads, head_size];
    and the block ids."""
    blocks = -(-len(keys) // block_size)
    cache = keys.new_zeros((blocks + 1, keys.shape[1], block_size, 2 * keys.shape[2]))
    ids = torch.randperm(blocks, device=keys.device).to(torch.int32) + 1
    at = torch.arange(len(keys), device=keys.device)
    cache[ids.long()[at // block_size], :, at % block_size] = torch.cat([keys, values], dim=-1)
    k, v = cache.transpose(1, 2).split(keys.shape[2], dim=-1)
    return k, v, ids


_workspaces: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device) -> torch.Tensor:
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    return _workspaces[device]


def run_wrapper(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    backend: str = "fa2",
    out_type: torch.dtype | None = None,
    block_size: int = 16,
    return_lse: bool = True,
) -> Any:
    """One row through the library's wrapper, planned as vLLM plans it: output, and log-sum-exps as they come."""
    import flashinfer

    k, v, ids = paged(keys, values, block_size)
    wrapper = getattr(flashinfer, PREFILL)(workspace(queries.device), "NHD", backend=backend)

    def host(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    wrapper.plan(
        host(0, len(queries)), host(0, len(ids)), ids, host((len(keys) - 1) % block_size + 1 if len(keys) else 0),
        queries.shape[1], keys.shape[1], queries.shape[2], block_size, causal=causal, sm_scale=scale,
        q_data_type=queries.dtype, kv_data_type=keys.dtype, o_data_type=out_type or queries.dtype,
        seq_lens=host(len(keys)),
    )  # fmt: skip
    return wrapper.run(queries, (k, v), return_lse=return_lse)


def stock_flashinfer(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float) -> Any:
    """Stock attention of one row on one GPU, nothing cut: queries are the last of the keys they see. vLLM decodes with
    the same kernel where it may not download another, and prefills with the one that the library chooses."""
    q, k, v = (x.cuda() for x in (queries, keys, values))
    backend = "fa2" if len(q) == 1 else "auto"
    return run_wrapper(q, k, v, scale=scale, causal=True, backend=backend, return_lse=False).cpu()


class GraphForward:
    """Runs an implementation from a graph, captured when it is first called, with an empty step's tables."""

    def __init__(self) -> None:
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}

    def __call__(self, impl: Any, layer: Any, *args: Any) -> None:
        *inputs, metadata, output = args
        if getattr(metadata, "sharded", None) is None:
            impl.forward(layer, *args)
            return
        # One builder, so the same tables, for each shape.
        key = metadata.sharded.send.data_ptr(), tuple(inputs[0].shape), tuple(inputs[3].shape), id(impl)
        changing = [*inputs, output, metadata.block_table]
        if key not in self.graphs:
            static = [torch.zeros_like(x) for x in changing]
            self.graphs[key] = self._capture(impl, layer, static, metadata), static
        graph, static = self.graphs[key]
        for buffer, value in zip(static, changing, strict=True):
            buffer.copy_(value)
        graph.replay()
        output.copy_(static[4])

    def _capture(self, impl: Any, layer: Any, static: list[torch.Tensor], metadata: Any) -> torch.cuda.CUDAGraph:
        """Nothing of the step at hand may be baked in: its tables are put away while the graph is captured."""
        rows = metadata.sharded
        tables = [rows.visits.starts, rows.visits.count, rows.tokens]
        if rows.routed is not None:  # nor may the flags of the step at hand be set
            tables.append(rows.routed[1].counts)
        held = [x.clone() for x in tables]
        for x in tables:
            x.zero_()
        rows.tokens.fill_(-1)
        # The engine's own block table is persistent, the test's is not. Lengths are the tables' own.
        decode = metadata.decode
        if hasattr(decode, "block_tables"):
            decode = dataclasses.replace(decode, block_tables=static[5][: len(decode.block_tables)], max_seq_len=1280)
        captured = dataclasses.replace(metadata, block_table=static[5], decode=decode)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            impl.forward(layer, *static[:4], captured, static[4])
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            impl.forward(layer, *static[:4], captured, static[4])
        for x, was in zip(tables, held, strict=True):
            x.copy_(was)
        return graph


def cuda_kernel(args: dict[str, Any], staged: bool) -> Kernel:
    """As ``flashinfer_kernel``.

    Args:
        args: of that.
        staged: ranks share a GPU.
    """
    pad = 0 if args.get("routed") and not args.get("graphs") else 16
    kernel = flashinfer_kernel("cuda", **{"pad": pad, **args})
    # What is past a length is finite in a real cache too, and the kernels read whole blocks.
    kernel = dataclasses.replace(kernel, fill=1000.0, stock=stock_flashinfer)
    if args.get("graphs"):
        kernel = dataclasses.replace(kernel, forward=GraphForward(), replays=True)
    return dataclasses.replace(kernel, exchange=StagedExchange) if staged else kernel


def run_modes(rank: int, size: int, modes: Modes, staged: bool) -> dict[str, Any]:
    """``run_scenarios`` by mode: arguments of ``flashinfer_kernel``, and groups of scenarios."""
    return each_mode(rank, size, modes, lambda args: cuda_kernel(args, staged))


# -- Partial results by type ----------------------------------------------------------------------------------------

Pair = tuple[torch.Tensor, torch.Tensor]


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One query a row, over all keys."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->qhk", q.double(), keys) * scale
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)


def merged_by(merge: Callable[[list[Pair]], torch.Tensor], kind: torch.dtype, shape: Shape, seed: int) -> list[float]:
    """Squared sums of the error of a query whose keys are cut into shards, of stock attention's, and of the result.

    Args:
        merge: from the shards' (output, base-2 log-sum-exp) to the whole.
        kind: of partial outputs.
        shape: of attention.
        seed: of the numbers.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    count, scale = (200, 1000, 3000)[seed % 3], shape.head_size**-0.5

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", generator=random).to(shape.dtype)

    q = normal(1, shape.num_heads, shape.head_size)
    k, v = (normal(count, shape.num_kv_heads, shape.head_size) for _ in "kv")
    cuts = [0, count // 5, count // 2, count]
    parts = [
        run_wrapper(q, k[a:b], v[a:b], scale=scale, causal=False, out_type=kind) for a, b in itertools.pairwise(cuts)
    ]
    expected = in_float64(q, k, v, scale)
    whole = run_wrapper(q, k, v, scale=scale, causal=True, return_lse=False)
    errors = [(x.double() - expected).square().sum().item() for x in (merge(parts), whole)]
    return [*errors, expected.square().sum().item()]


def by_rows(parts: list[Pair], dtype: torch.dtype) -> torch.Tensor:
    """By this package's float32 rows."""
    from vllm_nanocp.attention.partial_rows import RowLayout, merge_rows

    heads, size = parts[0][0].shape[1:]
    layout = RowLayout(heads, size)
    rows = layout.empty(len(parts), parts[0][0].device)
    for row, (out, lse) in zip(rows, parts, strict=True):
        layout.outputs(row[None]).copy_(out)
        layout.lses(row[None]).copy_(lse * LN2)
    output = torch.empty((1, heads, size), dtype=dtype, device=rows.device)
    pick = torch.arange(len(parts), device=rows.device)[None]
    merge_rows(rows, layout, pick, pick.new_zeros(1), output)
    return output


def by_library(parts: list[Pair], dtype: torch.dtype) -> torch.Tensor:
    """By ``flashinfer.merge_states``."""
    import flashinfer

    outs, lses = (torch.stack(x, dim=1).contiguous() for x in zip(*parts, strict=True))
    merged: torch.Tensor = flashinfer.merge_states(outs, lses)[0]
    return merged.to(dtype)


def many_rows(shape: Shape, device: torch.device) -> tuple[Planners, list[TableRow], torch.Tensor]:
    """A launch with rows of every length, to plan over and over."""
    spec = LaunchShape(
        shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size, shape.scale, shape.dtype, shape.dtype
    )
    ids = torch.randperm(4096, device=device).to(torch.int32)
    rows = [TableRow(1, 1 + 17 * i, ids.data_ptr()) for i in range(200)]
    return Planners(spec, workspace(device)), rows, ids


def compile_one(backend: str, out_type: str, head_size: int, dtype: str, kv: str = "") -> None:
    """Have the library compile a kernel, into its cache on disk: several processes do so at a time.

    Args:
        backend: of the library.
        out_type, dtype, kv: of results, queries, and keys and values; of torch, by name.
        head_size: of attention.
    """
    names = {name: getattr(torch, name) for name in (out_type, dtype, kv or dtype)}
    q = torch.zeros((1, 8, head_size), dtype=names[dtype], device="cuda")
    k = torch.zeros((32, 4, head_size), device="cuda").to(names[kv or dtype])
    run_wrapper(q, k, k, scale=1.0, causal=True, backend=backend, out_type=names[out_type])
    torch.cuda.synchronize()
    print("compiled", backend, out_type, head_size, dtype, kv, flush=True)
