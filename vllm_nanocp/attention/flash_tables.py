# SPDX-License-Identifier: Apache-2.0
"""The tables of a sharded step on GPUs: what is sent, which rows attend to which blocks, what is merged into what.

``exact_tables`` sizes them to the step, for attention outside of graphs. ``CapturedTables`` are persistent and of fixed
size: a graph captured with them serves every decode step that fits. They know no requests: rows, lengths, blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..exchange.base import Counts
from ..exchange.routes import MAX_LAYERS, Route, Routes
from .context import Guest, ShardedStep, context
from .cut import cut
from .decode_pieces import Visits
from .flash_pieces import ShardLaunch, pieces_that_fit, queries_at_once
from .partial_rows import RowLayout

_Numbers = TypeVar("_Numbers", torch.Tensor, np.ndarray)


@dataclass
class ShardedRows:
    """A sharded step of this rank.

    Attributes:
        plain: whether rows of the batch that visit nobody are left to stock attention.
        send: int64, indices in the batch of the queries to dispatch, in the exchange's order.
        send_counts, recv_counts: see ``Exchange``.
        guests: the received queries, in order; none when nobody visits, and with ``visits``.
        own: queries of this rank that visit others, over what is held here, in order; none when there are none, or when
            they visit their own rank like anyone else.
        partials: room for the rows that come back, and behind them those of ``own``.
        tokens: int64 [num_results], the indices in the batch of the queries that visit; -1 for an unused one.
        pick: int64 [num_results, num_partials], see ``merge_rows``; None without such queries.
        visits: at fixed places, the received queries and those of this rank over what is held here; and rows that visit
            nobody, unless ``plain``.
        routed: the routed exchange, if it takes the place of ``Exchange``, and the step's route.
    """

    plain: bool
    send: torch.Tensor
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
class _Row:
    """Some queries and what they see: the first ``length`` tokens of these blocks, of which, where a launch is causal,
    the last ones are their own."""

    queries: int
    length: int
    blocks: torch.Tensor


def _groups(rows: list[_Row], most: int, causal: bool) -> list[list[_Row]]:
    """The same queries in the same order, in groups of at most ``most``."""
    groups: list[list[_Row]] = []
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
            groups[-1].append(_Row(taken, row.length - (row.queries - at) * causal, row.blocks))
    return groups


def _launch(rows: list[_Row], causal: bool, layout: RowLayout, num_kv_heads: int, device: torch.device) -> ShardLaunch:
    """A launch for rows of any number of queries."""
    queries, lengths = [row.queries for row in rows], [row.length for row in rows]
    table = torch.zeros((len(rows), max(len(row.blocks) for row in rows)), dtype=torch.int32, device=device)
    for i, row in enumerate(rows):
        table[i, : len(row.blocks)] = row.blocks
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
    of every rank visit all other ranks.

    Args:
        num_ranks: N.
        max_tokens: most tokens of a rank's batch.
        layout: of partial results.
        num_kv_heads: of this worker.
        dtype: of queries.
    """
    query_bytes, heads, head_size = layout.query_bytes(dtype), layout.num_heads, layout.head_size
    # A copy of each query that is sent, for its own rank too, and its partial result; each that comes, and its answer.
    rows = (2 * (num_ranks - 1) + 1) * max_tokens
    launch = min(max_tokens, queries_at_once(heads, head_size))
    pieces = pieces_that_fit(launch, heads, head_size, num_kv_heads)
    return rows * (query_bytes + 4 * layout.size) + launch * (pieces * 4 * layout.size + query_bytes)


def exact_tables(
    step: ShardedStep, common: CommonAttentionMetadata, block_size: int, layout: RowLayout, num_kv_heads: int
) -> tuple[ShardedRows, torch.Tensor]:
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
    held, queries = [], [own.num_queries for own in step.own]
    for own, row in zip(step.own, rows, strict=True):
        length = own.local_tokens + own.num_queries
        blocks = slice(own.first_block, own.first_block - (-length // block_size))
        held.append(_Row(own.num_queries, length, common.block_table_tensor[row, blocks]))
    tokens = pick = None
    if rows:
        seq_lens.index_fill_(0, async_tensor_h2d(rows, device, torch.int64), 0)
        batch = np.concatenate([np.arange(f, f + q) for f, q in zip(firsts, queries, strict=True)])
        tokens = async_tensor_h2d(batch, device)
        pick = async_tensor_h2d(_picks(visits, queries, step.num_sent), device)
    most = queries_at_once(layout.num_heads, layout.head_size)
    guests = [_Row(g.num_queries, g.length, g.blocks) for g in step.guests]
    return ShardedRows(
        plain=len(rows) < common.num_reqs,
        send=async_tensor_h2d(send, device),
        send_counts=step.send_counts,
        recv_counts=step.recv_counts,
        guests=[_launch(group, False, layout, num_kv_heads, device) for group in _groups(guests, most, False)],
        own=[_launch(group, True, layout, num_kv_heads, device) for group in _groups(held, most, True)],
        partials=layout.empty(step.num_sent + sum(queries), device),
        tokens=tokens,
        pick=pick,
    ), seq_lens


def _picks(visits: list[list[slice]], queries: list[int], num_sent: int) -> np.ndarray:
    """For each own query, its row among the own ones, behind those that come back, and its rows among these."""
    picks = np.full((sum(queries), 1 + max(len(mine) for mine in visits)), -1, dtype=np.int64)
    at = 0
    for mine, count in zip(visits, queries, strict=True):
        picks[at : at + count, 0] = np.arange(num_sent + at, num_sent + at + count)
        for column, part in enumerate(mine, 1):
            picks[at : at + count, column] = np.arange(part.start, part.stop)
        at += count
    return picks


def _split(numbers: _Numbers, sizes: Sequence[int]) -> list[_Numbers]:
    """Views of 8-byte numbers one after another, each from a multiple of 16 bytes on: for other addresses Triton would
    compile a kernel of its own, which nobody has warmed up."""
    at, views = 0, []
    for size in sizes:
        views.append(numbers[at : at + size])
        at += size + size % 2
    return views


class CapturedTables:
    """Tables at fixed addresses for steps with at most ``capacity`` visits between any two ranks, one query each.

    Place ``rank * capacity + i`` holds the i-th query to, or from, a rank. A row's part at its home is a visit of the
    home to itself, behind the others from there; so one launch serves the guests and the rank's own rows.

    Args:
        capacity: queries a pair of ranks exchanges.
        num_ranks: N.
        max_tokens: most tokens of a batch that is replayed.
        max_blocks: most blocks of a shard.
        block_size: tokens a block holds.
        layout: of partial results.
        num_kv_heads: of this worker.
        device: of all tables.
    """

    def __init__(
        self,
        capacity: int,
        num_ranks: int,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        layout: RowLayout,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        places = capacity * num_ranks
        self.capacity, self.places, self.max_tokens, self.block_size = capacity, places, max_tokens, block_size
        shape = (layout.num_heads, num_kv_heads, layout.head_size)
        self._visits = Visits.empty(max_tokens, places, max_blocks, *shape, device)
        # What changes from step to step comes in one copy: queries to send, picks, tokens of results, and rows of
        # these with a spare index for unused ones; pieces; and what the routed exchange needs besides.
        # A row has a visit to each rank, its own for what it holds of earlier parts, and its own part.
        width, rows = num_ranks + 1, max_tokens + places
        self._programs = len(self._visits.starts) - 1
        pieces = (self._visits.pieces.numel(), self._programs + 1, rows, rows)
        self._sizes = (places, capacity * width, capacity, capacity, *pieces, num_ranks, num_ranks, 1)
        self._ints = torch.zeros(sum(size + size % 2 for size in self._sizes), dtype=torch.int64, device=device)
        views = _split(self._ints, self._sizes)
        send, pick, tokens, self._visiting, cut_at = views[:5]
        self._visits.pieces = cut_at.view(-1, 3)
        self._visits.starts, self._visits.first, self._visits.count = views[5:8]
        sent, received, epoch = views[8:]
        self._route = Route(send, sent, received, epoch, pick.view(capacity, width), tokens)
        self._seq_lens = torch.zeros(max_tokens + 1, dtype=torch.int32, device=device)
        self._partials = layout.empty(places, device)
        # The shard whose blocks a place's row of the block table holds; they need not be written again.
        self._shards: list[str | None] = [None] * places

    def fill(self, step: ShardedStep, common: CommonAttentionMetadata) -> tuple[ShardedRows, torch.Tensor]:
        """Write a step's tables. All rows that visit have one query.

        Args:
            step: this rank's part; nowhere more visits than the capacity.
            common: vLLM's metadata of the batch, padded as the graph is.

        Returns:
            As ``exact_tables``; the same tensors each time.
        """
        host = np.zeros(len(self._ints), dtype=np.int64)
        parts = _split(host, self._sizes)
        send, pick, tokens, visiting, cut_at, cut_starts, first, count, sent, received, epoch = parts
        pick[:], tokens[:], visiting[:] = -1, -1, self.max_tokens
        sent[:], received[:], epoch[:] = step.send_counts, step.recv_counts, step.serial * MAX_LAYERS
        sent[step.rank] += len(step.own)
        received[step.rank] += len(step.own)
        routes = context.routes.get(self.capacity)
        # Stock attention is for rows of more queries; and for all rows where the exchange is a kernel by itself.
        plain = routes is None or common.max_query_len > 1
        n, lengths = common.num_reqs, np.zeros(self.max_tokens + self.places, dtype=np.int64)
        at_places = lengths[self.max_tokens :]
        if not plain:
            assert common.seq_lens_cpu_upper_bound is not None
            lengths[:n] = common.seq_lens_cpu_upper_bound[:n]
        starts = common.query_start_loc_cpu
        for i, own in enumerate(step.own):
            visiting[i] = row = own.batch_row()
            tokens[i] = token = int(starts[row])
            here = step.send_counts[step.rank] + i
            for j, (rank, index) in enumerate([*own.visits, (step.rank, here)]):
                place = rank * self.capacity + index
                send[place] = token
                pick[i * (step.num_ranks + 1) + j] = place
            at_places[place], lengths[row] = own.local_tokens + 1, 0
            self._hold(place, own.local_tokens + 1, common.block_table_tensor[row], own.first_block)
        for guest in step.guests:
            place = guest.home * self.capacity + guest.index
            at_places[place] = guest.length
            self._hold_shard(place, guest)
        if lengths.any():
            pieces, count[:], cut_starts[:] = cut(lengths, self._programs)
            cut_at[: pieces.size] = pieces.reshape(-1)
            first[:] = np.cumsum(count) - count
        async_tensor_h2d(host, out=self._ints)
        self._seq_lens[:n] = common.seq_lens[:n]
        self._seq_lens.index_fill_(0, self._visiting, 0)
        return ShardedRows(
            plain=plain,
            send=self._route.send,
            send_counts=None,
            recv_counts=None,
            guests=[],
            own=[],
            partials=self._partials,
            tokens=self._route.tokens,
            pick=self._route.pick,
            visits=self._visits,
            routed=None if routes is None else (routes, self._route),
        ), self._seq_lens[:n]

    def _hold(self, place: int, length: int, blocks: torch.Tensor, first_block: int) -> None:
        """A place's row is one of this rank's own: its blocks follow ``first_block`` in the batch's table."""
        count = -(-length // self.block_size)
        self._shards[place] = None
        self._visits.block_table[place, :count] = blocks[first_block : first_block + count]

    def _hold_shard(self, place: int, guest: Guest) -> None:
        """A place's row is a shard, whose blocks stay the same as long as it lives."""
        if self._shards[place] != guest.shard:
            self._shards[place] = guest.shard
            self._visits.block_table[place, : len(guest.blocks)] = guest.blocks
