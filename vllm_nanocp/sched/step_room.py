# SPDX-License-Identifier: Apache-2.0
"""Room on the ranks while requests are placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from ..placement import Prefix, RankLoad, ShardMap


class StepRoom:
    """Room on the ranks in the step at hand, kept up to date by what is placed; in a step it never grows.

    Args:
        loads: the ranks'.
    """

    def __init__(self, loads: Sequence[RankLoad]) -> None:
        self.loads = list(loads)
        self.totals = [load.total_blocks for load in loads]
        self.most = max(self.totals)
        self._free = [load.free_blocks for load in loads]
        self._slots = [load.slots for load in loads]
        # Ranks whose room is kept for requests that are due.
        self.closed: set[int] = set()
        self._known: dict[tuple[int | None, bool], tuple[list[int], list[int]]] = {}

    def of(self, adapter: int | None, kept: bool = False) -> tuple[list[int], list[int]]:
        """Blocks that a request with this adapter can take on each rank, and on so many of the richest together.

        Args:
            adapter: of the request.
            kept: whether it may have what is kept for those that are due.
        """
        known = self._known.get((adapter, kept))
        if known is None:
            room = [
                max(0, free) if slots > 0 and load.takes(adapter) and (kept or rank not in self.closed) else 0
                for rank, (free, slots, load) in enumerate(zip(self._free, self._slots, self.loads, strict=True))
            ]
            known = self._known[adapter, kept] = room, list(accumulate(sorted(room, reverse=True)))
        return known

    def close(self, ranks: Iterable[int]) -> None:
        """Keep what these ranks have."""
        self.closed.update(ranks)
        self._known.clear()

    def takes(self, adapter: int, home: int | None) -> bool:
        """Whether a rank that may take a request has a slot for its adapter."""
        return any(load.takes(adapter) for load in (self.loads if home is None else [self.loads[home]]))

    def take(self, shard_map: ShardMap, prefix: Prefix, adapter: int | None) -> None:
        """A request has been placed."""
        for run in shard_map.runs:
            self._free[run.rank] -= run.num_blocks
            self.loads[run.rank] = self.loads[run.rank].with_adapter(adapter)
        for run, held in zip(prefix.runs, prefix.held, strict=True):  # that takes no room
            self._free[run.rank] += held
        self._slots[shard_map.home] -= 1
        self._known.clear()
