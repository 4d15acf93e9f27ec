# SPDX-License-Identifier: Apache-2.0
"""Visits between ranks in a decode step, and how many there may be: as many as CUDA graphs have room for.

A step with more runs outside of graphs and takes several times as long, for all ranks. So whatever a policy would like,
no request is sharded, and none moves, that would bring one too many.
"""

from __future__ import annotations

from collections.abc import Iterable


class Visits:
    """Rows that visit, by the rank they come from and the one they go to.

    Args:
        ranks: how many.
        room: for rows of one rank, and from any rank to any.
    """

    def __init__(self, ranks: int, room: int) -> None:
        self.room = room
        self.pairs = [[0] * ranks for _ in range(ranks)]
        self.rows = [0] * ranks

    def fits(self, home: int, holders: Iterable[int]) -> bool:
        """Whether there is room for a request more.

        Args:
            home: the rank that computes its tokens.
            holders: ranks with finished runs of it, the home perhaps among them.
        """
        pairs = self.pairs[home]
        return self.rows[home] < self.room and all(pairs[rank] < self.room for rank in holders)

    def add(self, home: int, holders: Iterable[int]) -> None:
        """A request that decodes, or will."""
        self.rows[home] += 1
        for rank in holders:
            self.pairs[home][rank] += 1

    @property
    def most(self) -> int:
        """Of the busiest two ranks, or of the busiest one's rows."""
        return max(*self.rows, *(max(pairs) for pairs in self.pairs))
