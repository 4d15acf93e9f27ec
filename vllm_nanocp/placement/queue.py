# SPDX-License-Identifier: Apache-2.0
"""Who may start before requests that find no room, for how long, and which room is kept for those then.

Requests are looked at in the order of the queue. One that finds no room is passed over, and those behind it that fit
start: its room is not there yet, so they cost it nothing now. They do when it could have started and they still run.
So what starts before it is counted, in blocks, and once that is a few times what it needs itself it is *due*: as many
ranks as it has to have are closed for all behind it, and what comes free there stays free until it starts. The count
needs no clock, is fair to short and long ones alike, and bounds what the others may take, whatever comes. The ranks
stay as they were chosen, so that room gathers there. Those before it have theirs first, so everyone's turn comes.

A request that was preempted is due at once, and so is one that is more important than those behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .place import RankLoad, cdiv

# Requests without room that are passed over in a step; of those looked at in full, ones that fail.
WINDOW = 32
LOOKS = 8
# Requests that start in a step at least, of all ranks, and of each where there are many.
STARTS = 64
STARTS_A_RANK = 2
# More start until so many seconds have gone by since the first one: the others start with the next steps, while those
# that run decode. So all but large bursts start at once, as in stock vLLM, and the step before hides most of that time
# where steps are scheduled ahead.
STARTING_S = 0.010
# That one takes, be it of 2 ranks or of 64 (``benchmarks/schedule_cost.py``); for who has no clock.
START_S = 30e-6
# Beside the least so many for each that has ended in a step of late, or short outputs would leave ranks empty: of 8
# ranks of 256 requests with four tokens each, 512 end in a step. With more than one the number grows until the ranks
# are full.
STARTS_AN_END = 2
# But no more in all: placing them then takes most of a step already, so that more would gain little. So many at most
# are set aside in a step, too, for a prefix that another one computes: they keep nobody from starting now.
MOST_STARTS = 512
# Steps over which the number of ends is averaged: requests that have begun together may end together.
ENDS_OVER = 4
# A request is due when those behind it have taken so many times the blocks that it needs. Four halved the median wait
# where the caches were full, and left the longest ones below those of ranks with a queue each
# (``benchmarks/admission_simulation.py``).
PATIENCE = 4
# Those that overtake leave so many tokens free for each request of a rank's batch: they would else fill each rank to
# the last block, and what runs there would be preempted as it grows. But no more than such a part of the rank.
GROWTH_TOKENS = 128
GROWTH_PART = 8


@dataclass(frozen=True, slots=True)
class Want:
    """What a request needs to start.

    Attributes:
        blocks: that its tokens take, and the first new one.
        start: ranks over which it is spread at least.
        limit: ranks over which it may be spread.
        home: the only rank that may be its home; None: any.
        loose: whether it may be spread over more than one rank whatever ``start`` says.
    """

    blocks: int
    start: int
    limit: int
    home: int | None = None
    loose: bool = False


@dataclass(slots=True)
class Blocked:
    """A request that has found no room.

    Attributes:
        want: what it needs.
        urgent: whether nobody may overtake it.
        room: blocks that it could have taken on each rank when it was last looked at.
        shared: blocks that it would have shared then.
        spread: whether those lay on several ranks, over which it may be spread then, however short it is.
        overtaken: blocks that others behind it have taken.
        ranks: closed for those behind it.
        visits: how often visits had come free when it had all but room for its own, which needs no more blocks; None:
            it had no room for its blocks.
    """

    want: Want
    urgent: bool
    room: Sequence[int] = ()
    shared: int = 0
    spread: bool = False
    overtaken: int = 0
    ranks: tuple[int, ...] = ()
    visits: int | None = None

    @property
    def due(self) -> bool:
        """Whether it has been overtaken for long enough."""
        return self.urgent or self.overtaken >= PATIENCE * self.want.blocks

    def grown(self, room: Sequence[int]) -> bool:
        """Whether any rank has more room than when it was last looked at."""
        return any(now > then for now, then in zip(room, self.room, strict=True))

    def may_fit(self, room: Sequence[int], richest: Sequence[int], most: int, freed: int = 0) -> bool:
        """Whether it is worth asking placement: never False where placement would have an answer.

        Args:
            room: blocks that it can take on each rank.
            richest: the same for so many ranks together, those that have most: of the first, of two, of all.
            most: blocks of the largest rank.
            freed: how often visits have come free so far.
        """
        want = self.want
        alone = want.start == 1 and want.home is None and not (self.spread or want.loose) and want.blocks <= most
        if richest[0 if alone else want.limit - 1] + self.shared < want.blocks:
            return False
        return (self.visits is not None and self.visits < freed) or self.grown(room)


def least_starts(ranks: int, ends: float) -> int:
    """Requests that may start in a step, however long that takes.

    Args:
        ranks: how many.
        ends: requests that end in a step, of late.
    """
    least = max(STARTS, STARTS_A_RANK * ranks)
    return max(least, min(MOST_STARTS, least + int(STARTS_AN_END * ends)))


def may_start(started: int, least: int, seconds: float) -> bool:
    """Whether one more may start in a step.

    Args:
        started: so far.
        least: see ``least_starts``.
        seconds: since the first one.
    """
    return started < least or (started < MOST_STARTS and seconds < STARTING_S)


def as_overtaken(load: RankLoad, block_size: int) -> RankLoad:
    """A rank's load as requests find it that overtake others."""
    growth = min(cdiv(GROWTH_TOKENS, block_size) * load.batch, load.total_blocks // GROWTH_PART, load.free_blocks)
    return load.with_less(growth)


def ranks_for(want: Want, room: Sequence[int], totals: Sequence[int], closed: Collection[int]) -> tuple[int, ...]:
    """The ranks on which a request that is due should wait for its room.

    As few as can hold it when they are empty, of those with most room now. The others serve on.

    Args:
        want: what it needs.
        room: blocks that it can take on each rank.
        totals: blocks of each rank.
        closed: ranks that are kept for those before it.

    Returns:
        None at all if too few are left: it waits for those before it then.
    """
    able = [rank for rank in range(len(room)) if rank not in closed]
    if want.home is not None and want.home not in able:
        return ()
    able.sort(key=lambda rank: (rank != want.home, -room[rank], rank))
    for degree in range(min(want.start, want.limit), want.limit + 1):
        if degree <= len(able) and sum(totals[rank] for rank in able[:degree]) >= want.blocks:
            return tuple(able[:degree])
    return ()
