# SPDX-License-Identifier: Apache-2.0
"""The tables of a sharded step on GPUs: what is sent, which rows attend to which blocks, what is merged into what.

``exact_tables`` sizes them to the step, for attention outside of graphs. ``CapturedTables`` are persistent and of fixed
size: a graph captured with them serves every decode step that fits. They know no requests: rows, lengths, blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..exchange.base import Counts
from .context import ShardedStep
from .partials import NO_KEYS, RowLayout


@dataclass
class ShardLaunch:
    """One launch of attention over shards, with log-sum-exps.

    Attributes:
        query_starts: int32 [num_rows + 1].
        lengths: int32 [num_rows], KV tokens each row sees; 0 for an unused one.
        block_table: int32 [num_rows, most blocks].
        max_queries, max_length: bounds of the queries and of the lengths of a row.
        causal: whether a row's queries are the last tokens of what it sees.
        num_splits: most pieces a row's KV is cut into; 0 leaves that to the kernel, which a graph must not.
        schedule: FlashAttention's scheduler metadata, if made ahead.
    """

    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    max_queries: int
    max_length: int
    causal: bool
    num_splits: int = 0
    schedule: torch.Tensor | None = None


@dataclass
class ShardedRows:
    """A sharded step of this rank.

    Attributes:
        plain: whether any row of the batch visits nobody.
        send: int64, indices in the batch of the queries to dispatch, in the exchange's order.
        send_counts, recv_counts: see ``Exchange``.
        guests: the received queries; None when nobody visits.
        own: queries of this rank that visit others, over what is held here; None when there are none, or when they
            visit their own rank like anyone else.
        tokens: int64, the indices in the batch of the queries of ``own``.
        partials: room for the rows that come back, then those of ``own`` (or one with no keys).
        pick: int64 [num_results, num_partials], see ``RowLayout.merge``; None without own rows.
        result_of: int64 [num_tokens], for each token of the batch its result, if ``visits``; None when the results
            belong to ``tokens`` in order.
        visits: bool [num_tokens].
    """

    plain: bool
    send: torch.Tensor
    send_counts: Counts
    recv_counts: Counts
    guests: ShardLaunch | None
    own: ShardLaunch | None
    tokens: torch.Tensor | None
    partials: torch.Tensor
    pick: torch.Tensor | None
    result_of: torch.Tensor | None = None
    visits: torch.Tensor | None = None


def _launch(
    queries: Sequence[int], lengths: Sequence[int], blocks: Sequence[torch.Tensor], causal: bool, device: torch.device
) -> ShardLaunch | None:
    """A launch for rows of any number of queries."""
    if not queries:
        return None
    table = torch.zeros((len(blocks), max(len(b) for b in blocks)), dtype=torch.int32, device=device)
    for row, held in enumerate(blocks):
        table[row, : len(held)] = held
    starts = np.zeros(len(queries) + 1, dtype=np.int32)
    np.cumsum(queries, out=starts[1:])
    return ShardLaunch(
        query_starts=async_tensor_h2d(starts, device),
        lengths=async_tensor_h2d(list(lengths), device, torch.int32),
        block_table=table,
        max_queries=max(queries),
        max_length=max(lengths),
        causal=causal,
    )


def exact_tables(
    step: ShardedStep, common: CommonAttentionMetadata, block_size: int, layout: RowLayout
) -> tuple[ShardedRows, torch.Tensor]:
    """Tables of the step's own size.

    Args:
        step: this rank's part of the step.
        common: vLLM's metadata of the batch.
        block_size: tokens a block holds.
        layout: of partial results.

    Returns:
        The tables, and the batch's lengths with 0 for rows that visit: int32 [num_reqs].
    """
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    rows = [own.batch_row() for own in step.own]
    firsts = [starts[row] for row in rows]
    send, visits = step.lay_out(firsts)
    seq_lens = common.seq_lens.clone()
    blocks, lengths, queries = [], [], []
    for own, row in zip(step.own, rows, strict=True):
        length = own.local_tokens + own.num_queries
        held = slice(own.first_block, own.first_block - (-length // block_size))
        blocks.append(common.block_table_tensor[row, held])
        lengths.append(length)
        queries.append(own.num_queries)
    own_launch = _launch(queries, lengths, blocks, True, device)
    tokens = pick = None
    num_own = sum(queries)
    if own_launch is not None:
        seq_lens.index_fill_(0, async_tensor_h2d(rows, device, torch.int64), 0)
        batch = np.concatenate([np.arange(f, f + q) for f, q in zip(firsts, queries, strict=True)])
        tokens = async_tensor_h2d(batch, device)
        pick = async_tensor_h2d(_picks(visits, queries, step.num_sent), device)
    return ShardedRows(
        plain=len(rows) < common.num_reqs,
        send=async_tensor_h2d(send, device),
        send_counts=step.send_counts,
        recv_counts=step.recv_counts,
        guests=_launch(
            [g.num_queries for g in step.guests],
            [g.length for g in step.guests],
            [g.blocks for g in step.guests],
            False,
            device,
        ),
        own=own_launch,
        tokens=tokens,
        partials=_room(layout, step.num_sent + num_own, device),
        pick=pick,
    ), seq_lens


def _room(layout: RowLayout, rows: int, device: torch.device) -> torch.Tensor:
    """Room for partial results, and behind it a row with no keys."""
    room = layout.empty(rows + 1, device)
    layout.outputs(room)[rows] = 0
    layout.lses(room)[rows] = NO_KEYS
    return room


def _picks(visits: list[list[slice]], queries: list[int], num_sent: int) -> np.ndarray:
    """For each own query, its rows among those that come back and the own ones behind them; then ones with no keys."""
    widest = 1 + max(len(mine) for mine in visits)
    num_own = sum(queries)
    picks = np.full((num_own, widest), num_sent + num_own, dtype=np.int64)
    at = 0
    for mine, count in zip(visits, queries, strict=True):
        picks[at : at + count, 0] = np.arange(num_sent + at, num_sent + at + count)
        for column, part in enumerate(mine, 1):
            picks[at : at + count, column] = np.arange(part.start, part.stop)
        at += count
    return picks


class CapturedTables:
    """Tables at fixed addresses for decode steps with at most ``capacity`` visits between any two ranks.

    Place ``rank * capacity + i`` holds the i-th query to, or from, a rank. A row's part at its home is a visit of the
    home to itself, behind the others from there; so one launch serves the guests and the rank's own rows.

    Args:
        capacity: queries a pair of ranks exchanges.
        num_ranks: N.
        max_tokens: most tokens of a batch that is replayed.
        max_blocks: most blocks of a shard.
        block_size: tokens a block holds.
        layout: of partial results.
        num_splits: see ``ShardLaunch``.
        schedule_size: int32 elements of FlashAttention's schedule of so many rows; 0 when it makes none ahead.
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
        num_splits: int,
        schedule_size: int,
        device: torch.device,
    ) -> None:
        places = capacity * num_ranks
        self.capacity, self.places, self.max_tokens = capacity, places, max_tokens
        # What changes from step to step comes in one copy: queries to send, picks, lengths, results of tokens.
        self._sizes = (places, places, places, max_tokens)
        self._ints = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._send, pick, self._lengths, self._result_of = self._ints.split(self._sizes)
        self._pick = pick.view(capacity, num_ranks)
        self._visits = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self._clamped = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._partials = _room(layout, places, device)
        # The shard whose blocks a place's row of the block table holds; they need not be written again.
        self._shards: list[str | None] = [None] * places
        self.launch = ShardLaunch(
            query_starts=torch.arange(places + 1, dtype=torch.int32, device=device),
            lengths=torch.zeros(places, dtype=torch.int32, device=device),
            block_table=torch.zeros((places, max_blocks), dtype=torch.int32, device=device),
            max_queries=1,
            max_length=max_blocks * block_size,
            causal=False,
            num_splits=num_splits,
            schedule=torch.zeros(schedule_size, dtype=torch.int32, device=device) if schedule_size else None,
        )
        self.block_size = block_size

    def fill(self, step: ShardedStep, common: CommonAttentionMetadata) -> tuple[ShardedRows, torch.Tensor]:
        """Write a step's tables. All rows of the batch have one query.

        Args:
            step: this rank's part; nowhere more visits than the capacity.
            common: vLLM's metadata of the batch, padded as the graph is.

        Returns:
            As ``exact_tables``; the same tensors each time.
        """
        host = np.zeros(len(self._ints), dtype=np.int64)
        send, pick, lengths, result_of = np.split(host, np.cumsum(self._sizes)[:-1])
        pick[:], result_of[:] = self.places, -1
        for i, own in enumerate(step.own):
            row = own.batch_row()  # its one token has the same index
            here = step.send_counts[step.rank] + i
            for j, (rank, index) in enumerate([*own.visits, (step.rank, here)]):
                place = rank * self.capacity + index
                send[place] = row
                pick[i * step.num_ranks + j] = place
            result_of[row] = i
            self._hold(place, own.local_tokens + 1, lengths, common.block_table_tensor[row], own.first_block)
        for guest in step.guests:
            place = guest.home * self.capacity + guest.index
            lengths[place] = guest.length
            if self._shards[place] != guest.shard:
                self._shards[place] = guest.shard
                self.launch.block_table[place, : len(guest.blocks)] = guest.blocks
        async_tensor_h2d(host, out=self._ints)
        return self._derive(common)

    def _hold(self, place: int, length: int, lengths: np.ndarray, blocks: torch.Tensor, first_block: int) -> None:
        """A place's row is one of this rank's own: its blocks follow ``first_block`` in the batch's table."""
        lengths[place] = length
        count = -(-length // self.block_size)
        self._shards[place] = None
        self.launch.block_table[place, :count] = blocks[first_block : first_block + count]

    def _derive(self, common: CommonAttentionMetadata) -> tuple[ShardedRows, torch.Tensor]:
        """What follows on the device from the integers copied to it."""
        self.launch.lengths.copy_(self._lengths)
        torch.ge(self._result_of, 0, out=self._visits)
        torch.clamp(self._result_of, min=0, out=self._clamped)
        n, tokens = common.num_reqs, common.num_actual_tokens
        seq_lens = self._seq_lens[:n]
        seq_lens.copy_(common.seq_lens[:n])
        seq_lens.masked_fill_(self._visits[:n], 0)
        return ShardedRows(
            plain=True,
            send=self._send,
            send_counts=None,
            recv_counts=None,
            guests=self.launch,
            own=None,
            tokens=None,
            partials=self._partials,
            pick=self._pick,
            result_of=self._clamped[:tokens],
            visits=self._visits[:tokens],
        ), seq_lens
