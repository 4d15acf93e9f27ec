# SPDX-License-Identifier: Apache-2.0
"""Where a request's KV goes: degree, participants, shares, home.

After NanoCP (arXiv 2605.21100) and its published engine: the degree starts at the request's length over the
segment size and grows only for room; ranks are taken by batch, then by room; poor ranks are swapped for rich
ones; blocks are poured into the participants so that the fullest stays as low as possible (water filling); the
home is the participant with the smallest batch. A request's share on a rank is one run of consecutive blocks, the
home's the last, so that a prefill chunk is never cut at a border that balance does not need; or, so that the ranks
compute a prompt together, one run for each chunk, the ranks in turn.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .shard_map import Run, ShardMap, join


@dataclass(frozen=True)
class RankLoad:
    """What placement knows of a rank, in blocks and requests.

    Attributes:
        free_blocks: blocks nobody holds and no admitted request was promised.
        used_blocks: the others, without vLLM's null block.
        batch: requests that compute there, or wait to.
        slots: how many more requests may.
        read_blocks: blocks that a step reads, one that several requests share counted for each; None: as many as
            are used.
        adapters: those of requests that run there, wait to, or are on their way; by number.
        max_adapters: how many may be active at once; None: as many as one likes.
        backlog: half steps that the prompts there take until they are computed.
    """

    free_blocks: int
    used_blocks: int
    batch: int
    slots: int
    read_blocks: int | None = None
    adapters: frozenset[int] = frozenset()
    max_adapters: int | None = None
    backlog: int = 0

    def takes(self, adapter: int | None) -> bool:
        """Whether a request with this adapter can run there beside the others; None: without one. Where more adapters
        are known than may be active, a session waits for its own, and which that is is not known."""
        if adapter is None or self.max_adapters is None:
            return True
        return len(self.adapters | {adapter}) <= self.max_adapters

    def for_adapter(self, adapter: int | None) -> RankLoad:
        """The load as a request with this adapter finds it: no slot where it cannot run."""
        return self if self.takes(adapter) else replace(self, slots=0)

    def closed(self) -> RankLoad:
        """The load as those find it for whom there is to be no room."""
        return replace(self, free_blocks=0, used_blocks=self.total_blocks, slots=0)

    def with_adapter(self, adapter: int | None) -> RankLoad:
        """The load once a request with this adapter is there."""
        if adapter is None or self.max_adapters is None:
            return self
        return replace(self, adapters=self.adapters | {adapter})

    @property
    def room(self) -> int:
        """Blocks that a request can take."""
        return self.free_blocks if self.slots > 0 else 0

    @property
    def rank_order(self) -> tuple[bool, int, int, int]:
        """Ranks with less come first; see ``_order_keys``."""
        room = self.free_blocks if self.slots > 0 else 0
        return room == 0, self.backlog, self.batch, -room

    def with_less(self, blocks: int) -> RankLoad:
        """The load as those find it for whom so many free blocks are not."""
        free, used = self.free_blocks - blocks, self.used_blocks + blocks
        rest = self.batch, self.slots, self.read_blocks, self.adapters, self.max_adapters, self.backlog
        return RankLoad(free, used, *rest)

    @property
    def kv_level(self) -> int:
        """What is to be even over the ranks: attention takes as long as its reads."""
        return self.used_blocks if self.read_blocks is None else self.read_blocks

    @property
    def total_blocks(self) -> int:
        return self.free_blocks + self.used_blocks


class RankedLoads(list[RankLoad]):
    """The ranks' loads, with what placement would else find out of them for each request. Change them with ``put``."""

    def __init__(self, loads: Iterable[RankLoad]) -> None:
        super().__init__(loads)
        self.rank_orders = [load.rank_order for load in self]
        self._order = sorted((order, rank) for rank, order in enumerate(self.rank_orders))
        self._batch = [load.batch for load in self]
        self._level = [load.kv_level for load in self]
        # What counts between ranks that cost the same.
        self._equals = [order[2:] for order in self.rank_orders]
        # Ranks that have been put, for each that keeps what follows from the loads.
        self.followers: list[set[int]] = []

    def put(self, rank: int, load: RankLoad) -> None:
        """The load of a rank is another one."""
        self[rank] = load
        old, order = self.rank_orders[rank], load.rank_order
        if order != old:
            self.rank_orders[rank] = order
            del self._order[bisect_left(self._order, (old, rank))]
            insort(self._order, (order, rank))
        self._batch[rank], self._level[rank], self._equals[rank] = load.batch, load.kv_level, order[2:]
        for follower in self.followers:
            follower.add(rank)

    def first(self, kv_weight: float | None) -> int:
        """The first of ``_order_keys``."""
        if kv_weight is None:
            return self._order[0][1]
        if self._order[-1][0][0]:  # a rank has no room
            keys = _order_keys(self, kv_weight)
            return keys.index(min(keys))
        per_request, per_block = _weights(self._batch, self._level, kv_weight)
        costs = [per_request * batch + per_block * level for batch, level in zip(self._batch, self._level, strict=True)]
        least = min(costs)
        if costs.count(least) == 1:
            return costs.index(least)
        equal = [rank for rank, cost in enumerate(costs) if cost == least]
        return min(equal, key=self._equals.__getitem__)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def start_degree(num_tokens: int, segment_size: int, max_degree: int) -> int:
    """Ranks a request of this length starts with."""
    return max(1, min(max_degree, cdiv(num_tokens, segment_size)))


def water_fill(amount: int, used: Sequence[int], room: Sequence[int], least: Sequence[int]) -> list[int]:
    """Pour ``amount`` units so that the fullest vessel ends as low as possible.

    Args:
        amount: units to pour, at most ``sum(room)`` and at least ``sum(least)``.
        used: what each vessel holds already.
        room: what each can still take.
        least: what each must take at least, within its room.

    Returns:
        Units poured into each vessel; they sum to ``amount``.

    Raises:
        ValueError: the amount does not fit, or is less than what must be poured.
    """
    if amount > sum(room) or amount < sum(least) or any(x > r for x, r in zip(least, room, strict=True)):
        raise ValueError(f"cannot pour {amount} into room {list(room)} with minima {list(least)}")

    def poured(level: int) -> list[int]:
        return [min(r, max(x, level - u)) for u, r, x in zip(used, room, least, strict=True)]

    low, high = 0, max(u + r for u, r in zip(used, room, strict=True))
    while low < high:  # the lowest level at which everything fits
        level = (low + high) // 2
        if sum(poured(level)) >= amount:
            high = level
        else:
            low = level + 1
    shares = poured(low)
    excess = sum(shares) - amount
    for i in range(len(shares)):
        # At level - 1 it does not fit, so each vessel at the level gives back at most one unit.
        if excess and shares[i] > least[i] and used[i] + shares[i] == low:
            shares[i] -= 1
            excess -= 1
    return shares


def _participants(
    order: list[int], degree: int, need: int, headroom: int, room: Sequence[int], pinned: int | None, swap: bool
) -> list[int] | None:
    """The first ``degree`` ranks of ``order``, poor ones swapped for rich ones until the request fits; or None.

    It fits when there is room for ``need`` blocks and ``headroom``, and one rank has a block more than the headroom:
    the home.
    """
    chosen = order[:degree]
    if pinned is not None and pinned not in chosen:
        chosen[-1] = pinned
    others = [r for r in order if r not in chosen] if swap else []
    while sum(room[r] for r in chosen) < need + headroom or max(room[r] for r in chosen) <= headroom:
        movable = [r for r in chosen if r != pinned]
        if not movable or not others:
            return None
        poorest = min(movable, key=lambda r: room[r])
        richest = max(others, key=lambda r: room[r])
        if room[richest] <= room[poorest]:
            return None
        chosen[chosen.index(poorest)] = richest
        others[others.index(richest)] = poorest
    return chosen


def _order_keys(loads: Sequence[RankLoad], kv_weight: float | None) -> Sequence[tuple[Any, ...]]:
    """For each rank, what sorts those first that a request should use first; those without room last.

    A prompt is computed behind those that came before it, and a step takes as long as its slowest rank: so ranks with
    few of them come first. Where KV is weighed prompts do not count: they would make KV less even.
    """
    if kv_weight is None:
        return loads.rank_orders if isinstance(loads, RankedLoads) else [load.rank_order for load in loads]
    per_request, per_block = _weights([load.batch for load in loads], [load.kv_level for load in loads], kv_weight)
    return [
        (load.room == 0, per_request * load.batch + per_block * load.kv_level, load.batch, -load.room) for load in loads
    ]


def _weights(batches: Sequence[int], levels: Sequence[int], kv_weight: float) -> tuple[float, float]:
    """What a request counts, and a block: both in units of their mean, so that neither counts more for being counted in
    larger numbers."""
    return (1 - kv_weight) / max(1, sum(batches)), kv_weight / max(1, sum(levels))


def _first(loads: Sequence[RankLoad], kv_weight: float | None) -> int:
    """The rank that a request should use first."""
    if isinstance(loads, RankedLoads):
        return loads.first(kv_weight)
    keys = _order_keys(loads, kv_weight)
    return keys.index(min(keys))


def place(
    num_tokens: int,
    block_size: int,
    loads: Sequence[RankLoad],
    *,
    segment_size: int,
    max_degree: int,
    policy: str = "balanced",
    turn: int = 0,
    home: int | None = None,
    preferred: int | None = None,
    headroom_blocks: int = 1,
    kv_weight: float | None = None,
    stripe_blocks: int | None = None,
    least_shard: int = 0,
) -> ShardMap | None:
    """Place a request, or say that there is no room now.

    Args:
        num_tokens: tokens the request has now (prompt, and output so far when it was preempted).
        block_size: tokens a block holds.
        loads: one a rank.
        segment_size: tokens a shard should hold before another rank is used.
        max_degree: most ranks the request may use.
        policy: ``balanced``, or ``round_robin``: ranks in turn, equal shares, whatever the load.
        turn: how many requests were placed before (``round_robin``).
        home: a rank that must be the home, because it has the request's sampling state.
        preferred: a rank that should be the home, because the client says so: it is wherever the request fits so;
            otherwise it is placed as any other. A given ``home`` counts more.
        headroom_blocks: free blocks that the home should have beyond the request, for the first new tokens.
        kv_weight: how much a rank's KV counts, against its batch, in the choice of ranks: between 0 and 1. None:
            the batch, and KV only between equals. Home moves even out batches later but never KV, so with them KV
            should count most.
        stripe_blocks: most blocks of a run, of which a rank then has several; None: one run a rank.
        least_shard: tokens; a request of one segment is split for want of room into shards of so many, if positive.

    Returns:
        Its shard map; None when the ranks cannot take the request now. A request of one segment waits for room on
        one rank rather than be split, unless no rank could ever hold it, its home is given, or ``least_shard`` is.
    """
    need = cdiv(num_tokens, block_size)
    limit = min(max_degree, len(loads))
    degree = start_degree(num_tokens, segment_size, limit)
    if home is not None and loads[home].room < 1 + headroom_blocks:
        return None
    if policy == "round_robin":
        order = [(turn + i) % len(loads) for i in range(len(loads))]
    else:
        if degree == 1 and home is None and preferred is None:
            # The first rank, found without sorting them, mostly does.
            first = _first(loads, kv_weight)
            if loads[first].room >= need + headroom_blocks:
                return ShardMap(block_size, (Run(first, 0, need),))
        keys = _order_keys(loads, kv_weight)
        order = sorted(range(len(loads)), key=keys.__getitem__)
    room = [load.room for load in loads]
    fits_one = need + headroom_blocks <= max(load.total_blocks for load in loads)
    most = limit if degree > 1 or home is not None or not fits_one else _may_grow(num_tokens, least_shard, limit)
    pins = [home]
    if home is None and preferred is not None and room[preferred] >= 1 + headroom_blocks:
        pins = [preferred, None]
    for pin in pins:
        for d in range(degree, most + 1):
            chosen = _participants(order, d, need, headroom_blocks, room, pin, swap=policy == "balanced")
            if chosen is not None:
                return _pour(need, block_size, loads, room, chosen, pin, headroom_blocks, policy, stripe_blocks)
    return None


def _may_grow(num_tokens: int, least_shard: int, limit: int) -> int:
    """Over how many ranks a request of one segment may be spread for want of room."""
    return max(1, min(limit, num_tokens // least_shard)) if least_shard > 0 else 1


def _pour(
    need: int,
    block_size: int,
    loads: Sequence[RankLoad],
    room: Sequence[int],
    chosen: list[int],
    home: int | None,
    headroom: int,
    policy: str,
    stripe: int | None,
) -> ShardMap:
    if home is None:
        able = [r for r in chosen if room[r] > headroom]
        home = able[0] if policy == "round_robin" else min(able, key=lambda r: (loads[r].batch, -room[r], r))
    used = [0 if policy == "round_robin" else loads[r].kv_level for r in chosen]
    space = [room[r] - headroom if r == home else room[r] for r in chosen]
    least = [1 if r == home else 0 for r in chosen]
    shares = dict(zip(chosen, water_fill(need, used, space, least), strict=True))
    return ShardMap(block_size, join(_runs(shares, home, max(shares.values()) if stripe is None else stripe)))


def _runs(shares: Mapping[int, int], home: int, stripe: int) -> list[Run]:
    """Ranks in turn, ascending from the one behind the home and round to it, with so many blocks at most each time; the
    last run is the home's."""
    order = sorted(shares, key=lambda r: (r <= home, r))
    left = dict(shares)
    last = left[home] % stripe or stripe
    left[home] -= last
    runs: list[Run] = []
    at = 0
    while any(left.values()):
        for rank in order:
            if blocks := min(stripe, left[rank]):
                runs.append(Run(rank, at, at + blocks))
                left[rank] -= blocks
                at += blocks
    return [*runs, Run(home, at, at + last)]


def stripe_blocks(budget: int, slots: int, threshold: int, block_size: int, chunk_tokens: int | None) -> int:
    """Blocks of a prompt that a rank computes in one step, while the other ranks compute theirs. A rank that cannot
    compute all of them makes the others wait, so they are no more than fit beside as many decoding requests as there
    may be. Half of a step, where nothing else is said: short prompts have what is left, at least their part
    (``chunk_shares``). With whole steps they would wait until the long one is computed.

    Args:
        budget: tokens a rank computes in a step at most.
        slots: tokens of requests that decode, at most.
        threshold: most tokens of a long prompt's chunk, if positive.
        block_size: tokens a block holds.
        chunk_tokens: most tokens of a chunk, if set.
    """
    half = budget // 2
    tokens = min(chunk_tokens or half, max(budget - slots, half))
    if threshold > 0:
        tokens = min(tokens, threshold)
    return max(1, tokens // block_size)


def queue_at(
    num_tokens: int, block_size: int, loads: Sequence[RankLoad], idle: Sequence[bool], home: int | None = None
) -> ShardMap | None:
    """A rank at which a request that found no room may wait by itself; None when there is none.

    vLLM's scheduler knows better than free-block counts when a request fits (its prefix may be cached), and starts
    it in the very step in which there is room; so one request a rank may wait there instead of in the common queue.

    Args:
        num_tokens: tokens the request has now.
        block_size: tokens a block holds.
        loads: one a rank.
        idle: for each rank, whether nobody waits there.
        home: the only rank allowed, if not None.
    """
    need = cdiv(num_tokens, block_size)
    able = [
        r
        for r, load in enumerate(loads)
        if idle[r] and load.slots > 0 and load.total_blocks >= need and home in (None, r)
    ]
    if not able:
        return None
    rank = min(able, key=lambda r: (-loads[r].free_blocks, loads[r].batch, r))
    return ShardMap(block_size, (Run(rank, 0, need),))
