# SPDX-License-Identifier: Apache-2.0
"""Launches of attention over shards on GPUs, and what the tables of both families are made of: which queries go
together, where their block ids are, where their results are found. No kernel of the vendor's is called here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from .partial_rows import RowLayout
from .sharded_step import ShardedStep

# Fewest pieces of a row where float32 results are asked for, see ``gqa/flash_splits.py``.
MIN_PIECES = 2
# Enough pieces of one row's KV, over its KV heads, for all SMs of a Hopper GPU (132).
BUSY = 128
# Bytes of float32 results that a launch outside of graphs may take: with few queries, and with as many as it may have.
_ROOM, _MOST = 1 << 27, 1 << 28

_Numbers = TypeVar("_Numbers", torch.Tensor, np.ndarray)


@dataclass
class ShardLaunch:
    """One launch of attention over shards.

    Attributes:
        num_queries: of all rows.
        query_starts: int32 [num_rows + 1].
        lengths: int32 [num_rows], KV tokens each row sees; 0 for an unused one.
        block_table: int32 [num_rows, most blocks].
        max_queries, max_length: bounds of the queries and of the lengths of a row.
        causal: whether a row's queries are the last tokens of what it sees.
        max_pieces: most pieces a row's KV is cut into.
        launch_row: int64 [num_queries], the row each query belongs to; None when every row has one.
        schedule: FlashAttention's scheduler metadata, once made.
        pieces: int32 [num_rows], a view of ``schedule``: how many pieces each row is cut into; None where
            FlashAttention merges them.
    """

    num_queries: int
    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    max_queries: int
    max_length: int
    causal: bool
    max_pieces: int
    launch_row: torch.Tensor | None = None
    schedule: torch.Tensor | None = None
    pieces: torch.Tensor | None = None

    def keep_schedule(self, made: torch.Tensor) -> torch.Tensor:
        """Keep a schedule; where there is one, at its address, which a graph may know. Returns what is kept."""
        if self.schedule is None:
            self.schedule = made
        else:
            self.schedule.copy_(made)
        return self.schedule


def lengths_without(
    visiting: torch.Tensor, common: CommonAttentionMetadata, out: torch.Tensor, fewest: int = 0
) -> torch.Tensor:
    """Lengths for a launch over a whole batch that leaves out the rows that visit.

    Args:
        visiting: int64, their numbers; others behind the batch, but within ``out``.
        common: vLLM's metadata of the batch.
        out: int32, to write to, at an address that graphs know.
        fewest: keys that a row must see, those that are left out and padding, too.

    Returns:
        int32 [num_reqs], a view of ``out``.
    """
    n = common.num_reqs
    out[:n] = common.seq_lens[:n]
    out.index_fill_(0, visiting, 0)
    return out[:n].clamp_(min=fewest) if fewest else out[:n]


def pieces_that_fit(num_queries: int, num_heads: int, head_size: int, num_kv_heads: int) -> int:
    """Most pieces for a launch: all that can be of use for few queries, two for many."""
    wanted = max(32, BUSY // num_kv_heads)
    return max(MIN_PIECES, min(wanted, _ROOM // (4 * num_queries * num_heads * head_size)))


def queries_at_once(num_heads: int, head_size: int) -> int:
    """Most queries of a launch outside of graphs."""
    return max(1, _MOST // (4 * MIN_PIECES * num_heads * head_size))


def places_of(capacity: int, num_ranks: int) -> int:
    """How many places tables of fixed size have: for each rank, and for rows of a rank's own."""
    return capacity * (num_ranks + 1)


def empty_numbers(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Memory of ``split_numbers``: int64, zeros."""
    return torch.zeros(sum(size + size % 2 for size in sizes), dtype=torch.int64, device=device)


def split_numbers(numbers: _Numbers, sizes: Sequence[int]) -> list[_Numbers]:
    """Views of 8-byte numbers one after another, each from a multiple of 16 bytes on: for other addresses Triton would
    compile a kernel of its own, which nobody has warmed up."""
    at, views = 0, []
    for size in sizes:
        views.append(numbers[at : at + size])
        at += size + size % 2
    return views


def visited_places(step: ShardedStep, capacity: int, queries: int) -> np.ndarray:
    """Of each visit of a rank's own rows: which of these, which of the row's visits (the first is 1), and its place.

    Args:
        step: this rank's part.
        capacity: of the tables.
        queries: of a row that visits.

    Returns:
        int64 [3, visits].
    """
    visits = [
        (row, number, rank * capacity + index // queries)
        for row, own in enumerate(step.own)
        for number, (rank, index) in enumerate(own.visits, 1)
    ]
    return np.array(visits, dtype=np.int64).reshape(-1, 3).T


def hidden_tokens(step: ShardedStep, rows: list[int], common: CommonAttentionMetadata) -> list[int]:
    """For each own row, the tokens before those that are held here of its last run. What it sees here ends with the
    batch's own length: with drafts and async scheduling the plan has the most that this may be, as the runner's bound.

    Args:
        step: this rank's part.
        rows: of the batch, those of ``step.own``.
        common: vLLM's metadata of the batch.
    """
    assert common.seq_lens_cpu_upper_bound is not None
    most = common.seq_lens_cpu_upper_bound.tolist()
    return [most[row] - own.num_queries - own.local_tokens for row, own in zip(rows, step.own, strict=True)]


def later_draft(step: ShardedStep, common: CommonAttentionMetadata, block_size: int) -> ShardedStep:
    """The step of a draft model's forward after its first. What a home holds by then depends on how many drafts were
    accepted: ``local_tokens`` are written, the most that this may be; ``hidden_tokens`` leaves the rest to the device.

    Args:
        step: with one query a row.
        common: of the forward.
        block_size: tokens a block holds.
    """
    assert common.seq_lens_cpu_upper_bound is not None
    most = common.seq_lens_cpu_upper_bound.tolist()
    for own in step.own:
        own.local_tokens = max(0, most[own.batch_row()] - 1 - own.first_block * block_size)
    return step


@dataclass
class TableRow:
    """Some queries and what they see: the first ``length`` tokens of the blocks whose ids, int32, are at this address;
    where a launch is causal, the last of these are their own. With ``ends``, a length on the device and what to take
    off it, they see no more than that."""

    queries: int
    length: int
    table: int
    ends: tuple[torch.Tensor, int] | None = field(default=None, kw_only=True)


def groups_of(rows: list[TableRow], most: int, causal: bool) -> list[list[TableRow]]:
    """The same queries in the same order, in groups of at most ``most``."""
    groups: list[list[TableRow]] = []
    room = 0
    for row in rows:
        at = 0
        while at < row.queries:
            if not room:
                groups.append([])
                room = most
            taken = min(room, row.queries - at)
            at += taken
            room -= taken
            behind = (row.queries - at) * causal
            ends = None if row.ends is None else (row.ends[0], row.ends[1] + behind)
            groups[-1].append(TableRow(taken, row.length - behind, row.table, ends=ends))
    return groups


@triton.jit(do_not_specialize=["table_stride"])
def _gather_kernel(rows_ptr, table_ptr, table_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source, count = tl.load(rows_ptr + row * 2).to(tl.pointer_type(tl.int32)), tl.load(rows_ptr + row * 2 + 1)
    blocks = tl.load(source + at, mask=at < count, other=0)
    tl.store(table_ptr + row.to(tl.int64) * table_stride + at, blocks, mask=at < table_stride)


def gather_tables(addresses: list[int], counts: list[int], device: torch.device) -> torch.Tensor:
    """A block table from block ids that lie anywhere on the device, in one launch for all rows.

    Args:
        addresses: of each row's first block id, int32.
        counts: how many each row has.
        device: where they are.

    Returns:
        int32 [num_rows, most blocks]; 0 behind a row's.
    """
    table = torch.empty((len(counts), max(counts)), dtype=torch.int32, device=device)
    rows = async_tensor_h2d(np.stack([addresses, counts], axis=1, dtype=np.int64), device)
    _gather_kernel[(len(counts), triton.cdiv(table.shape[1], 1024))](rows, table, table.shape[1], BLOCK=1024)
    return table


def _lengths_of(rows: list[TableRow], device: torch.device) -> torch.Tensor:
    """The lengths of a launch's rows, int32. Either all rows have ends, or none."""
    ends = [row.ends for row in rows if row.ends is not None]
    if not ends:
        return async_tensor_h2d([row.length for row in rows], device, torch.int32)
    off = async_tensor_h2d([taken for _, taken in ends], device, torch.int32)
    return torch.stack([length for length, _ in ends]) - off


def make_launch(
    rows: list[TableRow], causal: bool, layout: RowLayout, num_kv_heads: int, block_size: int, device: torch.device
) -> ShardLaunch:
    """A launch for rows of any number of queries."""
    queries, lengths = [row.queries for row in rows], [row.length for row in rows]
    table = gather_tables([row.table for row in rows], [cdiv(length, block_size) for length in lengths], device)
    starts = np.zeros(len(queries) + 1, dtype=np.int32)
    np.cumsum(queries, out=starts[1:])
    launch_row = None
    if max(queries) > 1:
        launch_row = async_tensor_h2d(np.repeat(np.arange(len(queries)), queries), device)
    return ShardLaunch(
        num_queries=int(starts[-1]),
        query_starts=async_tensor_h2d(starts, device),
        lengths=_lengths_of(rows, device),
        block_table=table,
        max_queries=max(queries),
        max_length=max(lengths),
        causal=causal,
        max_pieces=pieces_that_fit(int(starts[-1]), layout.num_heads, layout.head_size, num_kv_heads),
        launch_row=launch_row,
    )


def table_address(common: CommonAttentionMetadata, row: int, block: int) -> int:
    """Where a block id of a row of the batch is on the device."""
    table = common.block_table_tensor
    assert table.dtype == torch.int32 and table.stride(1) == 1
    return table.data_ptr() + (row * table.stride(0) + block) * table.element_size()


def picks_of(visits: list[list[slice]], queries: list[int], num_sent: int) -> np.ndarray:
    """For each own query, its row among the own ones, behind those that come back, and its rows among these."""
    picks = np.full((sum(queries), 1 + max(len(mine) for mine in visits)), -1, dtype=np.int64)
    at = 0
    for mine, count in zip(visits, queries, strict=True):
        picks[at : at + count, 0] = np.arange(num_sent + at, num_sent + at + count)
        for column, part in enumerate(mine, 1):
            picks[at : at + count, column] = np.arange(part.start, part.stop)
        at += count
    return picks
