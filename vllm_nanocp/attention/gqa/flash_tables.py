# SPDX-License-Identifier: Apache-2.0
"""The tables of a sharded step on GPUs: what is sent, which rows attend to which blocks, what is merged into what.

Here they are sized to the step, for attention outside of graphs; ``fixed_tables.py`` has those that graphs are captured
with. They know no requests: rows, lengths, blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...exchange.base import Counts
from ..partial_rows import RowLayout
from ..sharded_step import ShardedStep
from .flash_splits import ShardLaunch, pieces_that_fit, queries_at_once
from .routed_layer import Route, Routes
from .split_kv import Visits


@dataclass
class StepTables:
    """A sharded step of this rank.

    Attributes:
        plain: whether rows of the batch that visit nobody are left to stock attention.
        send: int64, indices in the batch of the queries to dispatch, in the exchange's order; behind these, with
            ``visits``, of the queries that attend to what is held here of their own.
        exchanged: how many of these are dispatched.
        send_counts, recv_counts: see ``Exchange``.
        guests: the received queries, in order; none when nobody visits, and with ``visits``.
        own: queries of this rank that visit others, over what is held here, in order; none when there are none, or when
            they are among ``visits``.
        partials: room for the rows that come back, and behind them those of ``own``.
        tokens: int64 [num_results], the indices in the batch of the queries that visit; -1 for an unused one.
        pick: int64 [num_results, num_partials], see ``merge_rows``; None without such queries.
        visits: at fixed places, the received queries and those of this rank over what is held here; and rows that visit
            nobody, unless ``plain``.
        routed: the routed exchange, if it takes the place of ``Exchange``, and the step's route.
    """

    plain: bool
    send: torch.Tensor
    exchanged: int
    send_counts: Counts
    recv_counts: Counts
    guests: list[ShardLaunch]
    own: list[ShardLaunch]
    partials: torch.Tensor
    tokens: torch.Tensor | None
    pick: torch.Tensor | None
    visits: Visits | None = None
    routed: tuple[Routes, Route] | None = None


@dataclass
class TableRow:
    """Some queries and what they see: the first ``length`` tokens of the blocks whose ids, int32, are at this address;
    where a launch is causal, the last of these are their own."""

    queries: int
    length: int
    table: int


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
            groups[-1].append(TableRow(taken, row.length - (row.queries - at) * causal, row.table))
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
        lengths=async_tensor_h2d(lengths, device, torch.int32),
        block_table=table,
        max_queries=max(queries),
        max_length=max(lengths),
        causal=causal,
        max_pieces=pieces_that_fit(int(starts[-1]), layout.num_heads, layout.head_size, num_kv_heads),
        launch_row=launch_row,
    )


def most_memory(num_ranks: int, max_tokens: int, layout: RowLayout, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Bytes that attention outside of graphs takes in a layer beside stock attention's, in the fullest step: all tokens
    of every rank visit all ranks, for a home may hold earlier runs too.

    Args:
        num_ranks: N.
        max_tokens: most tokens of a rank's batch.
        layout: of partial results.
        num_kv_heads: of this worker.
        dtype: of queries.
    """
    query_bytes, heads, head_size = layout.query_bytes(dtype), layout.num_heads, layout.head_size
    # A copy of each query that is sent, also to its own rank, and its partial result; each that comes, and its answer;
    # and those over what is held here of the last run.
    rows = (2 * num_ranks + 1) * max_tokens
    launch = min(max_tokens, queries_at_once(heads, head_size))
    pieces = pieces_that_fit(launch, heads, head_size, num_kv_heads)
    return rows * (query_bytes + 4 * layout.size) + launch * (pieces * 4 * layout.size + query_bytes)


def table_address(common: CommonAttentionMetadata, row: int, block: int) -> int:
    """Where a block id of a row of the batch is on the device."""
    table = common.block_table_tensor
    assert table.dtype == torch.int32 and table.stride(1) == 1
    return table.data_ptr() + (row * table.stride(0) + block) * table.element_size()


def exact_tables(
    step: ShardedStep, common: CommonAttentionMetadata, block_size: int, layout: RowLayout, num_kv_heads: int
) -> tuple[StepTables, torch.Tensor]:
    """Tables of the step's own size.

    Args:
        step: this rank's part of the step.
        common: vLLM's metadata of the batch.
        block_size: tokens a block holds.
        layout: of partial results.
        num_kv_heads: of this worker.

    Returns:
        The tables, and the batch's lengths with 0 for rows that visit: int32 [num_reqs].
    """
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    rows = [own.batch_row() for own in step.own]
    firsts = [starts[row] for row in rows]
    send, visits = step.lay_out(firsts)
    seq_lens = common.seq_lens.clone()
    queries = [own.num_queries for own in step.own]
    held = [
        TableRow(own.num_queries, own.local_tokens + own.num_queries, table_address(common, row, own.first_block))
        for own, row in zip(step.own, rows, strict=True)
    ]
    tokens = pick = None
    if rows:
        seq_lens.index_fill_(0, async_tensor_h2d(rows, device, torch.int64), 0)
        batch = np.concatenate([np.arange(f, f + q) for f, q in zip(firsts, queries, strict=True)])
        tokens = async_tensor_h2d(batch, device)
        pick = async_tensor_h2d(picks_of(visits, queries, step.num_sent), device)
    most = queries_at_once(layout.num_heads, layout.head_size)
    guests = [TableRow(g.num_queries, g.length, g.blocks.data_ptr()) for g in step.guests]
    rest = (layout, num_kv_heads, block_size, device)
    return StepTables(
        plain=len(rows) < common.num_reqs,
        send=async_tensor_h2d(send, device),
        exchanged=step.num_sent,
        send_counts=step.send_counts,
        recv_counts=step.recv_counts,
        guests=[make_launch(group, False, *rest) for group in groups_of(guests, most, False)],
        own=[make_launch(group, True, *rest) for group in groups_of(held, most, True)],
        partials=layout.empty(step.num_sent + sum(queries), device),
        tokens=tokens,
        pick=pick,
    ), seq_lens


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
