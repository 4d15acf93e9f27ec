# SPDX-License-Identifier: Apache-2.0
"""Whether graphs have room for the visits that a placement or a move brings (``placement.visits``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..placement import ShardMap
from ..placement.visits import Visits

if TYPE_CHECKING:
    from .state import SchedulerState


class GraphRoom:
    """Counts the visits of all sharded requests, those that have yet to decode or to arrive included.

    Args:
        scheduler: over all ranks.
        room: visits between any two ranks; None: no bound.
    """

    def __init__(self, scheduler: SchedulerState, room: int | None) -> None:
        self._scheduler = scheduler
        self.room = room
        # The visits, and at which state of the requests: of many that find no room, each asks.
        self._kept: Visits | None = None
        self._kept_at: object = None

    def has_room(self, shard_map: ShardMap) -> bool:
        """Whether a request may be placed so."""
        if self.room is None or len(self._scheduler.sharded) + len(self._scheduler.mover.leaving) < self.room:
            return True
        at = self.room, self._scheduler.members.changes, tuple(self._scheduler.mover.leaving.items())
        if self._kept is None or self._kept_at != at:
            self._kept, self._kept_at = self.visits(), at
        return self._kept.fits(shard_map.home, {run.rank for run in shard_map.runs[:-1]})

    @property
    def freed(self) -> int:
        """How often visits may have come free so far."""
        return self._scheduler.members.num_closed + self._scheduler.mover.num_turns

    def near(self, more: int) -> Visits | None:
        """The visits, if so many requests more could be too many."""
        coming = len(self._scheduler.sharded) + len(self._scheduler.mover.leaving) + more
        return None if self.room is None or coming <= self.room else self.visits()

    def visits(self) -> Visits:
        """Counted anew."""
        assert self.room is not None
        scheduler = self._scheduler
        found, leaving = Visits(len(scheduler.ranks), self.room), dict(scheduler.mover.leaving)
        for request_id, sharded in scheduler.sharded.items():
            holders = {run.rank for run in sharded.shard_map.runs[:-1]}
            target = leaving.pop(request_id, None)
            if target is None:
                found.add(sharded.shard_map.home, holders)
            else:
                found.add(target, holders | {sharded.shard_map.home})
        for request_id, target in leaving.items():
            found.add(target, (scheduler.rank_of[request_id],))
        return found
