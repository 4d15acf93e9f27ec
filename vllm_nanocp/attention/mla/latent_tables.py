# SPDX-License-Identifier: Apache-2.0
"""The tables of a sharded step of latent attention on GPUs, sized to the step: which queries are sent, what they and
the guests attend to, what is merged into what. ``latent_fixed.py`` has those that graphs are captured with."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..context import context
from ..flash_launches import (
    TableRow,
    groups_of,
    hidden_tokens,
    make_launch,
    picks_of,
    queries_at_once,
    table_address,
)
from ..gpu_rows import GPURows
from ..partial_rows import RowLayout
from ..row_routes import RowRoutes
from ..sharded_step import ShardedStep
from .flash_latent import Absorbed, Projected, Work
from .flash_mla import FLASH_ATTENTION
from .latent_kernel import LatentKernel, Piece
from .latent_sizes import LatentSizes

# Bytes of projected keys and values at a time.
PROJECTED = 1 << 28
# Bytes of queries and partial results of all heads at a time, and the fewest heads that go by themselves.
_ROWS, _FEWEST_HEADS = 5 << 29, 16


@dataclass
class LatentRows(GPURows):
    """A sharded step of this rank.

    Attributes:
        sizes: of the heads that go together. Where these are not all, the same is done for each group of them.
        kernel: attends to what is held here.
        fixed: at fixed places, all that is received and all of this rank's own over what is held here.
        plain: vLLM's metadata of the rows that visit nobody, or of the batch with length 0 for those that do; None when
            all visit.
        plain_tokens: int64, where their queries are; None: vLLM's metadata is of the whole batch.
        routed: the routed exchange, filled for the step, if it takes the place of ``Exchange``; with ``fixed`` only.
    """

    sizes: LatentSizes
    kernel: LatentKernel = FLASH_ATTENTION
    fixed: Sequence[Absorbed] | None = None
    plain: Any = field(default=None)
    plain_tokens: torch.Tensor | None = field(default=None)
    routed: RowRoutes | None = field(default=None)


@dataclass
class _Seen(TableRow):
    """A row that may be projected: ``blocks``, int32, are the ids at the address, and more; ``token`` is the index of
    its first query in the batch, where that is this rank's. One that is projected ends with the plan's length: so many
    queries are a prompt's chunk, whose length is no guess."""

    blocks: torch.Tensor
    token: int = 0


class _Tables:
    """Makes tables on a device.

    Args:
        sizes: of the layers.
        block_size: tokens a block holds.
        dtype: of queries.
        device: of the tables.
        kernel: attends.
    """

    def __init__(
        self, sizes: LatentSizes, block_size: int, dtype: torch.dtype, device: torch.device, kernel: LatentKernel
    ) -> None:
        self.sizes, self.block_size, self.dtype, self.device = sizes, block_size, dtype, device
        self.kernel = kernel
        self._latents = RowLayout(sizes.num_heads, sizes.rank)

    def works(self, rows: list[_Seen], causal: bool) -> list[Work]:
        """What rows attend to; their queries one after another.

        Args:
            rows: in order.
            causal: whether a row's queries are the last tokens of what it sees.
        """
        works: list[Work] = []
        few: list[TableRow] = []
        at = 0
        for row in rows:
            if self.kernel.takes(row.queries, self.sizes):
                few.append(row)
                continue
            at = self._launch(few, at, causal, works)
            few = []
            works.append(self._project(row, at, causal))
            at += row.queries
        self._launch(few, at, causal, works)
        return works

    def _launch(self, rows: list[TableRow], at: int, causal: bool, works: list[Work]) -> int:
        """Launches for rows of few queries, the first at ``at``. Returns where the next row's begin."""
        most = min(queries_at_once(self.sizes.num_heads, self.sizes.rank), self.kernel.most_planned)
        for group in groups_of(rows, most, causal):
            launch = make_launch(group, causal, self._latents, 1, self.block_size, self.device)
            self.kernel.schedule(launch, self.sizes, self.block_size, self.dtype)
            works.append(Absorbed(slice(at, at + launch.num_queries), launch))
            at += launch.num_queries
        return at

    def _project(self, row: _Seen, at: int, causal: bool) -> Projected:
        past, absorbed = row.length - row.queries * causal, self.sizes.absorbs(row.queries)
        at_once = read_at_once if absorbed else projected_at_once
        step = at_once(self.sizes, self.block_size, self.dtype)
        spans = [(first, min(step, past - first), False) for first in range(0, past, step)]
        if causal:
            spans.append((past, row.queries, True))
        counts = np.array([row.queries, *(length for _, length, _ in spans)], dtype=np.int32)
        starts = async_tensor_h2d(np.stack([np.zeros_like(counts), counts], axis=1), self.device)
        pieces = []
        for number, (first, length, new) in enumerate(spans, 1):
            blocks = row.blocks[first // self.block_size : -(-(first + length) // self.block_size)]
            skip = first % self.block_size
            pieces.append(Piece(blocks, skip, length, starts[number], new, row.token))
        return Projected(slice(at, at + row.queries), starts[0], pieces, absorbed)


def _row_bytes(sizes: LatentSizes, dtype: torch.dtype) -> int:
    """Of a query and its partial result."""
    layout = RowLayout(sizes.num_heads, sizes.value_size)
    return sizes.num_heads * sizes.query_size * dtype.itemsize + 4 * layout.size


def heads_together(most_rows: int, sizes: LatentSizes, dtype: torch.dtype) -> LatentSizes:
    """Of a group of heads, so few that what travels at a time has room. Each group is an exchange of its own, and reads
    the latents again.

    Args:
        most_rows: see ``ShardedStep``; so all ranks have as many groups.
        sizes: of a layer.
        dtype: of queries.
    """
    while most_rows * _row_bytes(sizes, dtype) > _ROWS:
        half, rest = divmod(sizes.num_heads, 2)
        if rest or half < _FEWEST_HEADS:
            break
        sizes = replace(sizes, num_heads=half)
    return sizes


def projected_at_once(sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> int:
    """How many latents are projected at a time: whole blocks."""
    room = PROJECTED // (sizes.num_heads * sizes.projected_size * dtype.itemsize)
    return max(1, room // block_size) * block_size


def read_at_once(sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> int:
    """How many latents of 8 bits are read at a time where they are not projected: whole blocks."""
    room = PROJECTED // 2 // ((sizes.rank + sizes.rotated) * (dtype.itemsize + 1))
    return max(1, room // block_size) * block_size


def most_memory(
    num_ranks: int,
    max_tokens: int,
    sizes: LatentSizes,
    dtype: torch.dtype,
    kernel: LatentKernel = FLASH_ATTENTION,
) -> int:
    """Bytes that a layer takes in the fullest step: all tokens of every rank visit all ranks, for a home may hold
    earlier runs too. Rows that do not visit take less, and vLLM projects no more of their context at a time than is
    projected here.

    Args:
        num_ranks: N.
        max_tokens: most tokens of a rank's batch.
        sizes: of the layers.
        dtype: of queries.
        kernel: attends.
    """
    heads, bytes_ = sizes.num_heads, dtype.itemsize
    # A copy of each query that is sent, also to its own rank, and its partial result; each that comes, and its answer;
    # and those over what is held here of the last run.
    count = (2 * num_ranks + 1) * max_tokens
    rows = count * _row_bytes(heads_together(count, sizes, dtype), dtype)
    # A step with fewer may have all heads at once.
    rows = max(rows, min(_ROWS, count * _row_bytes(sizes, dtype)))
    few = min(max_tokens, queries_at_once(heads, sizes.rank))
    absorbed = kernel.memory(few, sizes, dtype)
    # The queries' own keys are projected at once; and their results, a part of which is float32 for a moment.
    tokens = max(max_tokens, PROJECTED // (heads * sizes.projected_size * bytes_))
    projected = heads * bytes_ * (tokens * sizes.projected_size + max_tokens * sizes.value_size)
    projected += tokens * (sizes.rank + sizes.rotated) * (bytes_ + kernel.narrow_bytes) + 16 * max_tokens * heads
    return rows + max(absorbed, projected)


def exact_tables(
    step: ShardedStep,
    common: CommonAttentionMetadata,
    sizes: LatentSizes,
    block_size: int,
    dtype: torch.dtype,
    kernel: LatentKernel = FLASH_ATTENTION,
) -> tuple[LatentRows, CommonAttentionMetadata | None]:
    """Tables of the step's own size.

    Args:
        step: this rank's part of the step.
        common: vLLM's metadata of the batch.
        sizes: of the layers.
        block_size: tokens a block holds.
        dtype: of queries.
        kernel: attends to what is held here.

    Returns:
        The tables, without ``plain``; and the metadata of which to build that, None when all rows visit.
    """
    device = common.seq_lens.device
    sizes = heads_together(step.most_rows, sizes, dtype)
    tables = _Tables(sizes, block_size, dtype, device, kernel)
    starts = common.query_start_loc_cpu.tolist()
    rows = [own.batch_row() for own in step.own]
    firsts = [starts[row] for row in rows]
    send, visits = step.lay_out(firsts)
    queries = [own.num_queries for own in step.own]
    tokens = pick = None
    if rows:
        batch = np.concatenate([np.arange(f, f + q) for f, q in zip(firsts, queries, strict=True)])
        tokens = async_tensor_h2d(batch, device)
        pick = async_tensor_h2d(picks_of(visits, queries, step.num_sent), device)
    held = [
        _Seen(
            own.num_queries,
            own.local_tokens + own.num_queries,
            table_address(common, row, own.first_block),
            common.block_table_tensor[row, own.first_block :],
            first,
        )
        for own, row, first in zip(step.own, rows, firsts, strict=True)
    ]
    if context.queries > 1:
        for part, row, hidden in zip(held, rows, hidden_tokens(step, rows, common), strict=True):
            part.ends = common.seq_lens[row], hidden
    guests = [_Seen(g.num_queries, g.length, g.blocks.data_ptr(), g.blocks) for g in step.guests]
    layout = RowLayout(sizes.num_heads, sizes.value_size)
    made = LatentRows(
        sizes=sizes,
        kernel=kernel,
        send=async_tensor_h2d(send, device),
        exchanged=step.num_sent,
        send_counts=step.send_counts,
        recv_counts=step.recv_counts,
        guests=tables.works(guests, False),
        own=tables.works(held, True),
        partials=layout.empty(step.num_sent + sum(queries), device),
        tokens=tokens,
        pick=pick,
    )
    if not rows:
        return made, common
    visiting = set(rows)
    # Rows without queries are padding.
    plain = [r for r in range(common.num_reqs) if r not in visiting and starts[r + 1] > starts[r]]
    if not plain:
        return made, None
    made.plain_tokens = async_tensor_h2d(np.concatenate([np.arange(starts[r], starts[r + 1]) for r in plain]), device)
    return made, some_rows(common, plain)


def some_rows(common: CommonAttentionMetadata, rows: list[int]) -> CommonAttentionMetadata:
    """vLLM's metadata of some rows of a batch, in their order; without waiting for the device.

    Args:
        common: of the batch.
        rows: at least one.
    """
    device, part = common.seq_lens.device, copy(common)
    index, on_device = torch.tensor(rows), async_tensor_h2d(rows, device, torch.int64)
    starts = common.query_start_loc_cpu
    lengths = (starts[1:] - starts[:-1])[index]
    part.num_reqs = len(rows)
    part.query_start_loc_cpu = torch.cat([starts.new_zeros(1), lengths.cumsum(0, dtype=starts.dtype)])
    part.query_start_loc = async_tensor_h2d(part.query_start_loc_cpu, device)
    part.seq_lens = common.seq_lens.index_select(0, on_device)
    part.block_table_tensor = common.block_table_tensor.index_select(0, on_device)
    for name in ("seq_lens_cpu_upper_bound", "is_prefilling"):
        if (values := getattr(common, name)) is not None:
            setattr(part, name, values[index if values.is_cpu else on_device])
    part.num_actual_tokens, part.max_query_len = int(lengths.sum()), int(lengths.max())
    if part.seq_lens_cpu_upper_bound is not None:
        part.max_seq_len = int(part.seq_lens_cpu_upper_bound.max())
    part._num_computed_tokens_cache = part._token_to_req_indices_cache = None
    return part
