# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a sharded step, as attention knows it: rows that visit, guests, and how many travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch


@dataclass
class OwnRow:
    """Queries computed here that visit shards, of any rank: a home may hold an earlier run, too.

    Attributes:
        batch_row: finds the row's index in the batch, once the model runner has built it.
        num_queries: positive.
        first_block: index in the row's block table of the first block held here.
        local_tokens: KV tokens held here with a position below the first query.
        visits: for each shard visited, (rank, index of the first query among those sent to that rank).
    """

    batch_row: Callable[[], int]
    num_queries: int
    first_block: int
    local_tokens: int
    visits: list[tuple[int, int]]


@dataclass
class Guest:
    """Queries that visit a shard held here, of any rank.

    Attributes:
        home: the rank they come from.
        index: of the first query among those received from that rank.
        num_queries: positive.
        shard: its id.
        blocks: [num_blocks] int32, contiguous, the shard's block ids in order.
        length: KV tokens to attend to; the last block may be used in part.
    """

    home: int
    index: int
    num_queries: int
    shard: str
    blocks: torch.Tensor
    length: int


@dataclass
class ShardedStep:
    """This rank's part of a step in which at least one row, somewhere, visits a shard.

    Attributes:
        rank: this one.
        own: rows of this rank, in the order of the plan.
        guests: by the rank they come from, then in the order of the plan.
        send_counts: queries this rank sends to each rank.
        recv_counts: queries it receives from each.
        capacity: 0 when exactly these are exchanged. Otherwise every pair of ranks has places for this many rows,
            whoever visits: what a captured graph does, and the routed exchange.
        captured: whether attention is replayed from a graph.
        serial: number of the step, the same on all ranks and larger than those before.
        most_rows: queries that the busiest rank sends, receives and has visiting, together; the same on all ranks.
    """

    rank: int
    own: list[OwnRow] = field(default_factory=list)
    guests: list[Guest] = field(default_factory=list)
    send_counts: list[int] = field(default_factory=list)
    recv_counts: list[int] = field(default_factory=list)
    capacity: int = 0
    captured: bool = False
    serial: int = 0
    most_rows: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.send_counts)

    @property
    def num_sent(self) -> int:
        return sum(self.send_counts)

    @property
    def num_received(self) -> int:
        return sum(self.recv_counts)

    def guest_rows(self) -> list[slice]:
        """Where each guest's queries are among all received ones, the ranks' one after another."""
        starts = [0, *accumulate(self.recv_counts)]
        return [slice(at := starts[g.home] + g.index, at + g.num_queries) for g in self.guests]

    def lay_out(self, first_tokens: Sequence[int]) -> tuple[torch.Tensor, list[list[slice]]]:
        """What to dispatch, and where each own row's answers will be.

        Args:
            first_tokens: for each own row, the index of its first query in the batch.

        Returns:
            int64 [num_sent], for each query to send its index in the batch; and for each own row, for each of its
            visits, the slice of what is sent (and of what comes back).
        """
        starts = [0, *accumulate(self.send_counts)]
        send = torch.empty(self.num_sent, dtype=torch.int64)
        slices: list[list[slice]] = []
        for own, first in zip(self.own, first_tokens, strict=True):
            mine = [slice(at := starts[rank] + index, at + own.num_queries) for rank, index in own.visits]
            for part in mine:
                send[part] = torch.arange(first, first + own.num_queries)
            slices.append(mine)
        return send, slices
