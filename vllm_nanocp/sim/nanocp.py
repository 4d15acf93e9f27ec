# SPDX-License-Identifier: Apache-2.0
"""Who goes where with the plugin: its own placement, queue and moves, imported, over simulated ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from ..placement import Prefix, RankLoad, ShardMap, Want, cdiv, place, place_after_prefix, queue_at
from ..placement.auto import AUTO, PRIOR, Bounds, Segments, choose, fixed
from ..placement.chunk_shares import PARTS, chunk_shares
from ..placement.chunk_shares import Prompt as ToCompute
from ..placement.cost import Coefficients, CostModel, StepLoad
from ..placement.moves import KV_WEIGHT, Candidate, MoveConfig, drifted, plan_moves, spill_target, with_reserve
from ..placement.place import start_degree, stripe_blocks
from ..placement.prefill_steps import Allowance, PrefillGap, PrefillSteps
from ..placement.queue import (
    ENDS_OVER,
    LOOKS,
    START_S,
    WINDOW,
    Blocked,
    as_overtaken,
    least_starts,
    may_start,
    ranks_for,
)
from ..placement.victims import Victim, victims
from ..placement.visits import Visits
from .ranks import World
from .setup import Prompt


@dataclass(frozen=True)
class Settings:
    """The plugin's, as its users set them; with ``auto`` full ranks spill, too."""

    segment_size: int | str = 65536
    max_degree: int | None = None
    moves: bool = False
    parallel_prefill: bool = True
    chunk_tokens: int | None = None
    prefill_gap: PrefillGap | None = None
    # What the cost model is taken to have learnt, whatever it has: to see what a wrong one costs.
    believed: Coefficients | None = None


class Plugin:
    """One queue over all ranks; requests are placed, sharded where they are long, and may move.

    Args:
        world: the ranks.
        settings: the plugin's.
    """

    def __init__(self, world: World, settings: Settings) -> None:
        setup = world.setup
        self.world, self.settings = world, settings
        self.fills, self.recomputes = False, not setup.as_benchmarks
        self.limit = min(settings.max_degree or setup.ranks, setup.ranks)
        self.auto = settings.segment_size == AUTO
        # Whether ranks' loads are those of ``sched`` with moves; and whether any are more than spills.
        self.moves = settings.moves or self.auto
        self.rules = MoveConfig(max_degree=self.limit, max_moves=MoveConfig.max_moves if settings.moves else 0)
        self.model = CostModel(PRIOR) if self.auto else CostModel()
        self.bounds = Bounds.of(setup.capacity)
        gap = settings.prefill_gap
        self.steps = None if gap is None else PrefillSteps(gap, setup.ranks, setup.budget)
        self.queue: deque[int] = deque()
        # Requests that wait at a rank for its next room, and what they need.
        self.parked: dict[int, tuple[int, ShardMap]] = {}
        self.blocked: dict[int, Blocked] = {}
        self.kept_home: dict[int, int] = {}
        self.most_output = int(world.requests.output.max())
        self.ends, self._gone = 0.0, 0
        self.freed = 0  # how often visits may have come free
        self.turn = 0
        stripe = stripe_blocks(setup.budget, setup.slots, 0, setup.block_size, settings.chunk_tokens)
        self.stripe = stripe if settings.parallel_prefill and self.limit > 1 else None

    # -- the queue -----------------------------------------------------------------------------------------------

    def arrive(self, request: int) -> None:
        setup = self.world.setup
        if cdiv(int(self.world.end[request]), setup.block_size) > self.limit * setup.blocks - self.limit:
            self.world.refuse(request)
            return
        self.queue.append(request)

    def segments(self) -> Segments:
        """How requests are cut now."""
        if isinstance(self.settings.segment_size, int):
            return fixed(self.settings.segment_size)
        kv_tokens = float(self.world.used.mean() + self.world.shared.mean()) * self.world.setup.block_size
        sharded = bool(self.world.guests.any())
        return choose(self.settings.believed or self.model.coefficients(), self.bounds, kv_tokens, sharded)

    def load(self, rank: int) -> RankLoad:
        """A rank's, whoever waits there included."""
        load = self.world.load(rank, reads=self.moves)
        if rank not in self.parked:
            return load
        blocks = min(self.parked[rank][1].num_blocks, load.free_blocks)
        free, used = load.free_blocks - blocks, load.used_blocks + blocks
        return replace(load, free_blocks=free, used_blocks=used, batch=load.batch + 1, slots=load.slots - 1)

    def loads(self) -> list[RankLoad]:
        return [self.load(rank) for rank in range(self.world.setup.ranks)]

    def admit(self) -> None:
        self.ends += (self._gone - self.ends) / ENDS_OVER
        self._gone = 0
        for rank, (request, shard_map) in list(self.parked.items()):
            if self.world.used[rank] + shard_map.num_blocks <= self.world.setup.blocks:
                del self.parked[rank]
                self.kept_home.pop(request, None)
                self.world.enter(request, shard_map)
        if self.queue:
            passed = self._scan(_Room(self.loads()))
            self.queue.extendleft(reversed(passed))

    def _scan(self, room: _Room) -> list[int]:
        """Place what fits of the first requests; those that do not are taken out of the queue and returned."""
        passed: list[int] = []
        looks, started, placed_behind = 0, 0, False
        least = least_starts(self.world.setup.ranks, self.ends)
        while self.queue and len(passed) < WINDOW and looks < LOOKS:
            if not may_start(started, least, started * START_S):
                break
            request = self.queue[0]
            if passed:
                if not any(room.free()):
                    break
                blocked = self.blocked.get(request)
                if blocked is not None and not blocked.may_fit(room.free(), room.richest(), room.most, self.freed):
                    passed.append(self.queue.popleft())
                    self._close_if_due(request, room)
                    continue
            if self._place(request, room, passed, may_wait=not passed and self._is_due(request)):
                started += 1
                placed_behind |= bool(passed)
            else:
                looks += bool(passed)
                passed.append(self.queue.popleft())
                self._close_if_due(request, room)
        # While nobody overtakes it, the first may as well wait at a rank.
        if passed and not placed_behind and not self._is_due(passed[0]):
            self.queue.appendleft(passed[0])
            if self._place(passed[0], room, [], may_wait=True):
                del passed[0]
            else:
                self.queue.popleft()
        return passed

    def _is_due(self, request: int) -> bool:
        return request in self.blocked and self.blocked[request].due

    def _close_if_due(self, request: int, room: _Room) -> None:
        blocked = self.blocked[request]
        if not blocked.due or (blocked.ranks and room.closed.issuperset(blocked.ranks)):
            return
        if not blocked.ranks or not room.closed.isdisjoint(blocked.ranks):
            blocked.ranks = ranks_for(blocked.want, room.free(kept=True), room.totals, room.closed)
        room.closed.update(blocked.ranks)

    def _rules(self, request: int) -> dict[str, Any]:
        segments = self.segments()
        return dict(
            segment_size=segments.of(int(self.world.length[request])),
            least_shard=segments.least,
            max_degree=self.limit,
            home=self.kept_home.get(request),
            headroom_blocks=int(self.world.end[request] > self.world.length[request]),
            stripe_blocks=self.stripe,
        )

    def _place(self, request: int, room: _Room, passed: list[int], may_wait: bool) -> bool:
        """Place the first of the queue; whether it has found room."""
        world, size = self.world, self.world.setup.block_size
        tokens, rules = int(world.length[request]), self._rules(request)
        loads = room.loads if not passed else [as_overtaken(load, size) for load in room.loads]
        if self.moves:
            loads = [with_reserve(load, self.rules.reserve_blocks) for load in loads]
        if passed:
            loads = [load.closed() if rank in room.closed else load for rank, load in enumerate(loads)]
        weight = KV_WEIGHT if self.moves else None
        shard_map = self._map(request, loads, rules, weight)
        lacks_visits = shard_map is not None and shard_map.degree > 1 and not self._has_room(shard_map)
        if lacks_visits:
            whole = rules | dict(segment_size=tokens, max_degree=1)
            if cdiv(tokens, size) + rules["headroom_blocks"] <= world.setup.blocks:
                shard_map = self._map(request, loads, whole, weight)
        if shard_map is None and may_wait and not lacks_visits and (tokens <= rules["segment_size"] or self.limit == 1):
            idle = [rank not in self.parked for rank in range(world.setup.ranks)]
            waits = queue_at(tokens, size, loads, idle, rules["home"])
            if waits is not None:
                self.parked[waits.home] = (self.queue.popleft(), waits)
                room.loads[waits.home] = self.load(waits.home)
                self.blocked.pop(request, None)
                return True
        if shard_map is None:
            limit = min(self.limit, world.setup.ranks)
            want = Want(
                cdiv(tokens, size) + rules["headroom_blocks"],
                start_degree(tokens, rules["segment_size"], limit),
                limit,
                rules["home"],
                loose=self.auto and limit > 1,
            )
            blocked = self.blocked.setdefault(request, Blocked(want, urgent=bool(world.preempted[request])))
            blocked.want, blocked.room = want, room.free(kept=not passed)
            blocked.visits = self.freed if lacks_visits else None
            return False
        self.queue.popleft()
        for other in passed:
            self.blocked[other].overtaken += max(1, shard_map.num_blocks)
        self.blocked.pop(request, None)
        self.kept_home.pop(request, None)
        self.turn += 1
        world.enter(request, shard_map)
        for run in shard_map.runs:
            room.loads[run.rank] = self.load(run.rank)
        return True

    def _map(
        self, request: int, loads: Sequence[RankLoad], rules: dict[str, Any], weight: float | None
    ) -> ShardMap | None:
        """Around what caches hold, or anywhere."""
        world = self.world
        tokens, size = int(world.length[request]), world.setup.block_size
        if world.caches is not None:
            runs = world.caches.find(world.hashes(request))
            if runs:
                prefix = Prefix(tuple(runs), (0,) * len(runs))
                around = place_after_prefix(prefix, tokens, size, loads, kv_weight=weight, **rules)
                if around is not None:
                    return around
        return place(tokens, size, loads, turn=self.turn, kv_weight=weight, **rules)

    def _has_room(self, shard_map: ShardMap) -> bool:
        """Whether graphs have room for what such a request visits."""
        room = self.world.setup.visits
        holders = {run.rank for run in shard_map.runs} - {shard_map.home}
        return room is None or self.world.visits(room).fits(shard_map.home, holders)

    def _visits(self) -> Visits | None:
        room = self.world.setup.visits
        return None if room is None else self.world.visits(room)

    def victim(self, running: np.ndarray) -> int:
        world = self.world
        if len(running) < 3:
            return world.youngest(running)
        others = running[running != running[np.argmin(world.requests.at[running])]]
        home = world.home[others[0]]
        frees = world.held[others, home].tolist()
        rows = zip(world.length[others].tolist(), frees, world.preempted[others].tolist(), strict=True)
        chosen = victims([Victim(*row) for row in rows], 1)
        return int(others[chosen[0]]) if chosen else world.youngest(running)

    def return_(self, request: int, home: int) -> None:
        self.kept_home[request] = home  # which has its sampling state
        self.queue.appendleft(request)

    def left(self, request: int) -> None:
        self._gone += 1
        self.freed += 1

    def waiting(self) -> int:
        return len(self.queue) + len(self.parked)

    # -- moves ---------------------------------------------------------------------------------------------------

    def _candidate(self, request: int) -> Candidate:
        world = self.world
        made = int(world.length[request] - world.requests.prompt[request])
        moved = int(world.last_move[request])
        return Candidate(
            request_id=f"{request:09}",
            home=int(world.home[request]),
            holders=tuple(np.flatnonzero(world.held[request]).tolist()),
            kv_tokens=int(world.length[request]),
            remaining_tokens=max(1, self.most_output - made),
            last_move=None if moved < 0 else moved,
        )

    def balance(self) -> None:
        if not self.rules.max_moves or not self.settings.moves or self.limit == 1:
            return
        world, size = self.world, self.world.setup.block_size
        loads = self.loads()
        sources = drifted(loads, self.rules)
        if not sources:
            return
        border = world.decoding[world.have[world.decoding] * size < world.length[world.decoding]]
        border = border[np.isin(world.home[border], sources)]
        if not len(border):
            return
        for move in plan_moves(
            loads,
            world.step_loads(world.decodes().tolist()),
            [self._candidate(request) for request in border.tolist()],
            step=world.step_number,
            block_size=size,
            model=self.model,
            config=self.rules,
            visits=self._visits(),
        ):
            world.counts.events["moves"] += 1
            world.move(int(move.request_id), move.target)
            self.freed += 1

    def measured(
        self,
        kv_tokens: np.ndarray,
        decodes: np.ndarray,
        guests: np.ndarray,
        seconds: float,
        tokens: int,
        pairs: float,
    ) -> None:
        if self.steps is not None:
            self.steps.observe(tokens, pairs, seconds)
        if self.moves and not tokens:
            exchange = bool(guests.any())
            rows = zip(kv_tokens.tolist(), decodes.tolist(), guests.tolist(), strict=True)
            self.model.observe([StepLoad(*row, exchange) for row in rows], seconds)

    def spill(self, request: int) -> int | None:
        if not self.moves or self.limit == 1:
            return None
        loads = [self.world.load(rank) for rank in range(self.world.setup.ranks)]
        size = self.world.setup.block_size
        candidate = self._candidate(request)
        target = spill_target(loads, candidate, block_size=size, config=self.rules, visits=self._visits())
        self.freed += target is not None
        return target

    # -- prompts -------------------------------------------------------------------------------------------------

    def prompts(self, decodes: bool) -> Allowance | None:
        if self.steps is None:
            return None
        return self.steps.begin(self.world.to_compute.tolist(), decodes, self.world.clock)

    def order(self, prompts: Sequence[Prompt], budget: int) -> list[tuple[Prompt, int]]:
        """The first to come has most of a step, the shortest have a part, as ``sched.rank.chunks`` gives it."""
        if len(prompts) == 1:
            return [(prompts[0], budget)]
        first = sorted(prompts, key=lambda prompt: self.world.requests.at[prompt.request])
        size, part = self.world.setup.block_size, min(self.world.setup.budget // PARTS, budget // 2)
        last = [prompt.index == len(prompt.runs) - 1 for prompt in first]
        if self.stripe is not None and any(len(prompt.runs) > 1 for prompt in first):
            part = max(0, min(part, budget - self.stripe * size))
        left = [ToCompute(prompt.left(size), more=not end) for prompt, end in zip(first, last, strict=True)]
        return list(zip(first, chunk_shares(left, budget, part), strict=True))


class _Room:
    """Room on the ranks in the step at hand, as requests that wait ask for it."""

    def __init__(self, loads: list[RankLoad]) -> None:
        self.loads = loads
        self.totals = [load.total_blocks for load in loads]
        self.most = max(self.totals)
        self.closed: set[int] = set()

    def free(self, kept: bool = False) -> list[int]:
        """Blocks on each rank; with ``kept`` also of those that are kept for requests that are due."""
        return [load.room if kept or rank not in self.closed else 0 for rank, load in enumerate(self.loads)]

    def richest(self) -> list[int]:
        """The same on so many of the richest ranks together."""
        return list(accumulate(sorted(self.free(), reverse=True)))
