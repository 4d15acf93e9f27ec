# SPDX-License-Identifier: Apache-2.0
"""Home moves: which decoding requests go on at another rank, in a step.

A move copies no KV. What a request has stays where it lies, its old home becomes one of its holders, and the KV of its
new tokens goes to the new home. So a move evens out batches at once and KV only slowly, by where it grows, and it
costs a guest: the old home now serves the request's queries. Moves happen at block borders, when the last block is
full. The idea is NanoCP's (arXiv 2605.21100), that a request's experts and its KV need not be bound to one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .checks import is_integer, is_number
from .cost import CostModel, StepLoad
from .place import RankLoad, cdiv
from .visits import Visits

# How much a rank's KV counts in placement where homes move, against its batch, which moves even out.
KV_WEIGHT = 0.8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoding request whose last block is full.

    Attributes:
        request_id: its id.
        home: the rank that computes its tokens.
        holders: ranks with a shard of it, the home or not.
        kv_tokens: KV tokens it has on all ranks.
        remaining_tokens: tokens it may still make, at most.
        last_move: the step in which it last changed its home; None if it never did.
        adapter: by number; None: it has none.
    """

    request_id: str
    home: int
    holders: tuple[int, ...]
    kv_tokens: int
    remaining_tokens: int
    last_move: int | None = None
    adapter: int | None = None

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks that hold, or are about to hold, a shard."""
        return frozenset((*self.holders, self.home))


@dataclass(frozen=True, slots=True)
class Move:
    """A request continues at ``target`` instead of ``source``."""

    request_id: str
    source: int
    target: int


@dataclass(frozen=True)
class MoveConfig:
    """When and how much to move.

    Attributes:
        batch_margin: a rank's batch may exceed the mean by this fraction before requests leave it.
        kv_margin: the same for its KV blocks. Large, for moves do little about it: KV only grows elsewhere.
        min_gap: a request moves only to a rank whose batch is smaller by at least this many; 2 or more, for with 1
            the two ranks would only change places.
        min_steps_between: steps between two moves of one request.
        max_moves: moves in one step.
        spare_blocks: blocks that stay free at a target, beside what the request may still need there.
        growth_blocks: most blocks that are kept for a request's growth; few requests use all tokens they may.
        reserve_blocks: blocks that admission leaves free for the growth of each request that runs (``with_reserve``).
        min_remaining_tokens: a request that ends sooner stays.
        weigh_exchange: while no request is sharded, none moves unless even ranks would win more time than the exchange
            then costs every step.
        max_degree: most ranks that may hold a shard of one request; None means all.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    batch_margin: float = 0.1
    kv_margin: float = 0.2
    min_gap: int = 2
    min_steps_between: int = 64
    max_moves: int = 8
    spare_blocks: int = 16
    growth_blocks: int = 128
    reserve_blocks: int = 4
    min_remaining_tokens: int = 64
    weigh_exchange: bool = True
    max_degree: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_margin", "kv_margin"):
            if not (is_number(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        least = {"min_gap": 2, "min_steps_between": 0, "max_moves": 0, "spare_blocks": 0, "growth_blocks": 1}
        least |= {"reserve_blocks": 0, "min_remaining_tokens": 0}
        if self.max_degree is not None:
            least["max_degree"] = 1
        for name, low in least.items():
            if not (is_integer(value := getattr(self, name)) and value >= low):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if not isinstance(self.weigh_exchange, bool):
            raise ValueError(f"weigh_exchange must be true or false, got {self.weigh_exchange!r}")

    def growth(self, remaining_tokens: int, block_size: int) -> int:
        """Blocks a rank must have free for a request with this many tokens to come."""
        return max(1, min(self.growth_blocks, cdiv(remaining_tokens, block_size)))

    def may_hold(self, candidate: Candidate, rank: int) -> bool:
        """Whether the bound on the degree lets a rank hold a shard of a request."""
        ranks = candidate.ranks
        return rank in ranks or self.max_degree is None or len(ranks) < self.max_degree


def with_reserve(load: RankLoad, blocks: int) -> RankLoad:
    """A rank's load as admission should see it: ``blocks`` for each request in its batch do not count as free.

    Without a reserve, waiting requests take every block as it comes free, and those that run must spill for each
    block they grow by, which scatters them over the ranks.
    """
    return load.with_less(min(load.free_blocks, blocks * load.batch))


def drifted(loads: Sequence[RankLoad], config: MoveConfig) -> list[int]:
    """Ranks that requests should leave, those with too large a batch first; ``plan_moves`` looks only at these.

    Args:
        loads: one a rank.
        config: the margins.
    """
    batches = [load.batch for load in loads]
    used = [load.kv_level for load in loads]
    ranks = range(len(loads))
    mean_batch, mean_used = sum(batches) / max(1, len(loads)), sum(used) / max(1, len(loads))
    least = min(batches, default=0)
    crowded = [r for r in ranks if batches[r] > mean_batch * (1 + config.batch_margin) and batches[r] > least + 1]
    heavy = [r for r in ranks if used[r] > mean_used * (1 + config.kv_margin) and batches[r] > least + 1]
    crowded.sort(key=lambda r: (-batches[r], r))
    heavy.sort(key=lambda r: (-used[r], r))
    return list(dict.fromkeys([*crowded, *heavy]))


def plan_moves(
    loads: Sequence[RankLoad],
    work: Sequence[StepLoad],
    candidates: Iterable[Candidate],
    *,
    step: int,
    block_size: int,
    model: CostModel,
    config: MoveConfig | None = None,
    visits: Visits | None = None,
) -> list[Move]:
    """Which requests change their home now. Deterministic; an empty list when the ranks are even.

    From the rank whose batch (then, whose KV) is too far above the mean, the cheapest request goes to where the step
    stays shortest: first those that the target holds a shard of already, for they bring no new guest; then those
    with little KV for the tokens they may still make. No move makes the predicted step longer or the spread of the
    batches larger, none goes to a rank without room for the request's growth. The first move makes every step pay for
    an exchange (``weigh_exchange``).

    Args:
        loads: one a rank.
        work: what each rank will do in a decode step: KV tokens of decoding requests, decoding requests, guests.
            Prefill chunks do not belong there: they pass.
        candidates: requests at a block border; those on ranks that are not ``drifted`` are not looked at.
        step: number of this step.
        block_size: tokens a block holds.
        model: predicts the times.
        config: margins and bounds.
        visits: that there are, if moves may bring too many; the moves' are added.

    Returns:
        Moves, at most one a request.
    """
    config = MoveConfig() if config is None else config
    sources = drifted(loads, config)
    if not sources or not config.max_moves or (config.weigh_exchange and not _pays_exchange(work, model)):
        return []
    by_home: dict[int, list[Candidate]] = {rank: [] for rank in sources}
    for candidate in candidates:
        rested = candidate.last_move is None or step - candidate.last_move >= config.min_steps_between
        if candidate.home in by_home and rested and candidate.remaining_tokens >= config.min_remaining_tokens:
            by_home[candidate.home].append(candidate)
    plan = _Plan(loads, work, model, config, block_size, visits)
    for source in sources:
        waiting = by_home[source]
        while waiting and len(plan.moves) < config.max_moves and plan.is_drifted(source):
            moved = plan.move_one(source, waiting)
            if moved is None:
                break
            waiting.remove(moved)
    return plan.moves


def _pays_exchange(work: Sequence[StepLoad], model: CostModel) -> bool:
    """Whether even ranks with an exchange take no longer than the ranks do now."""
    if any(load.exchange for load in work):
        return True
    ranks = len(work)
    kv_tokens, batch = (sum(load.kv_tokens for load in work), sum(load.batch for load in work))
    even = StepLoad(kv_tokens // ranks, batch // ranks, exchange=True)
    return model.predict(even) <= model.predict_step(work)


class _Plan:
    """Loads as they will be after the moves planned so far."""

    def __init__(
        self,
        loads: Sequence[RankLoad],
        work: Sequence[StepLoad],
        model: CostModel,
        config: MoveConfig,
        block_size: int,
        visits: Visits | None,
    ) -> None:
        self.visits = visits
        self.moves: list[Move] = []
        self.batch = [load.batch for load in loads]
        self.used = [load.kv_level for load in loads]
        self.free = [load.free_blocks for load in loads]
        self.slots = [load.slots for load in loads]
        self.loads = list(loads)  # for their adapters
        self.work = list(work)
        self.model = model
        self.config = config
        self.block_size = block_size
        mean_batch = sum(self.batch) / len(loads)
        self.most_batch = mean_batch * (1 + config.batch_margin)
        self.most_after = max(self.most_batch, math.ceil(mean_batch))  # a target's batch, once the request is there
        self.most_used = sum(self.used) / len(loads) * (1 + config.kv_margin)
        self.step_time = model.predict_step(work)

    def is_drifted(self, rank: int) -> bool:
        return self.batch[rank] > self.most_batch or self.used[rank] > self.most_used

    def targets(self, source: int) -> list[int]:
        """Ranks that may take a request from ``source``, that with the shortest predicted time first."""
        crowded = self.batch[source] > self.most_batch
        times: dict[int, float] = {}
        for rank, batch in enumerate(self.batch):
            near = batch + self.config.min_gap > self.batch[source] or batch + 1 > self.most_after
            # Where KV is the trouble, new KV must go to where there is little of it.
            heavy = not crowded and self.used[rank] * (1 + self.config.kv_margin) > self.used[source]
            if near or heavy or self.slots[rank] < 1:
                continue
            time = self.model.predict(_changed(self.work[rank], 1, 0))
            if time <= self.step_time:
                times[rank] = time
        return sorted(times, key=lambda r: (times[r], self.batch[r], self.used[r], r))

    def move_one(self, source: int, candidates: Sequence[Candidate]) -> Candidate | None:
        """Plan the cheapest move from ``source``; None when there is none."""
        order = self.targets(source)
        place = {rank: i for i, rank in enumerate(order)}
        best: tuple[tuple[bool, float, int, str], Candidate, int] | None = None
        for candidate in candidates:
            need = self.config.growth(candidate.remaining_tokens, self.block_size) + self.config.spare_blocks
            fitting = [
                r
                for r in order
                if self.free[r] >= need
                and self.config.may_hold(candidate, r)
                and self.loads[r].takes(candidate.adapter)
                and may_visit(self.visits, candidate, r)
            ]
            if not fitting:
                continue
            target = min(fitting, key=lambda r: (r not in candidate.holders, place[r]))
            cost = candidate.kv_tokens / max(1, candidate.remaining_tokens)
            key = (target not in candidate.holders, cost, place[target], candidate.request_id)
            if (best is None or key < best[0]) and self.no_slower(candidate, target):
                best = (key, candidate, target)
        if best is None:
            return None
        self.apply(best[1], best[2])
        return best[1]

    def after(self, candidate: Candidate, target: int) -> tuple[StepLoad, StepLoad]:
        """Work of the source and of the target after a move."""
        stays = candidate.home in candidate.holders
        joins = target in candidate.holders
        return (
            _changed(self.work[candidate.home], -1, int(stays)),
            _changed(self.work[target], 1, -int(joins)),
        )

    def no_slower(self, candidate: Candidate, target: int) -> bool:
        return all(self.model.predict(load) <= self.step_time for load in self.after(candidate, target))

    def apply(self, candidate: Candidate, target: int) -> None:
        source = candidate.home
        self.work[source], self.work[target] = self.after(candidate, target)
        self.batch[source] -= 1
        self.batch[target] += 1
        self.slots[source] += 1
        self.slots[target] -= 1
        self.loads[target] = self.loads[target].with_adapter(candidate.adapter)
        if self.visits is not None:
            self.visits.add(target, candidate.ranks)
        # Promised, so that the moves of one step do not all count on the same blocks.
        self.free[target] -= self.config.growth(candidate.remaining_tokens, self.block_size)
        self.moves.append(Move(candidate.request_id, source, target))


def _changed(load: StepLoad, batch: int, guests: int) -> StepLoad:
    return replace(load, batch=max(0, load.batch + batch), guests=max(0, load.guests + guests))


def may_visit(visits: Visits | None, candidate: Candidate, target: int) -> bool:
    """Whether there is room for what a request visits once it goes on at a rank."""
    return visits is None or visits.fits(target, candidate.ranks)


def spill_target(
    loads: Sequence[RankLoad],
    candidate: Candidate,
    *,
    block_size: int,
    config: MoveConfig | None = None,
    visits: Visits | None = None,
) -> int | None:
    """Where a request goes on that needs a block which its home does not have; None when no rank has one.

    One block and a slot (and one for its adapter) are enough: a short stay elsewhere is cheaper than to compute
    everything again after a preemption. Ranks with room for all that the request may still need come first, then those
    that hold a shard of it, then small batches, then much room. Neither margins nor ``min_steps_between`` apply.

    Args:
        loads: one a rank.
        candidate: the request.
        block_size: tokens a block holds.
        config: the bound on the degree, and how much growth counts.
        visits: that there are, if this may bring too many.
    """
    config = MoveConfig() if config is None else config
    need = config.growth(candidate.remaining_tokens, block_size) + config.spare_blocks
    able = [
        rank
        for rank, load in enumerate(loads)
        if rank != candidate.home
        and load.slots > 0
        and load.free_blocks > 0
        and config.may_hold(candidate, rank)
        and load.takes(candidate.adapter)
        and may_visit(visits, candidate, rank)
    ]
    return min(
        able,
        default=None,
        key=lambda r: (
            loads[r].free_blocks < need,
            r not in candidate.holders,
            loads[r].batch,
            -loads[r].free_blocks,
            r,
        ),
    )
