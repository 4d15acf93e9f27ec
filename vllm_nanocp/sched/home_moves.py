# SPDX-License-Identifier: Apache-2.0
"""Home moves and spills: which requests leave their rank is policy (``placement.moves``); how, is here.

A request leaves when its last block is full. It is scheduled no more; once what it has in flight has come back, its
blocks go to a member that keeps them, and it goes on at its new home, from the next token. With async scheduling that
costs it one step, and the tokens it goes on with are then all known.

Accepted drafts seldom end with a block. So one that is decoded with drafts leaves at any time: its full blocks stay,
and what the last one has is computed again at the new home, with the next step and its drafts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from vllm.sampling_params import SamplingType
from vllm.v1.request import Request, RequestStatus

from ..placement.auto import PRIOR
from ..placement.cost import CostModel, StepLoad
from ..placement.moves import Candidate, MoveConfig, drifted, plan_moves, spill_target
from ..placement.place import RankedLoads, RankLoad
from ..plan import Arrival
from .rank.adapters import adapter_of
from .sharded_request import ShardedRequest, can_shard

if TYPE_CHECKING:
    from .rank.interface import Decoding, Part
    from .rank.rank_view import RankView
    from .state import SchedulerState

_importance = attrgetter("priority", "arrival_time")  # less is more


def _give_to_holders(read: list[int], sharded: ShardedRequest) -> None:
    """KV tokens that a request at its home reads, all of which were counted there, go to the ranks that hold them."""
    read[sharded.rank] -= sharded.local_start
    for rank, (_, tokens) in sharded.open_shards.items():
        read[rank] += tokens


class Ahead(NamedTuple):
    """What sharded requests will have on a rank.

    Attributes:
        homes: of how many it will be the home and has not begun to.
        adapters: of those that it computes a run of, now or later; None: without one.
        read: KV tokens that a step will read once all decode, beside those of the rank's own requests: of a burst,
            those placed first must count for the next ones, before any of them runs.
        prompts: tokens of runs that it computes later.
    """

    homes: int
    adapters: set[int | None]
    read: int
    prompts: int


@dataclass(slots=True)
class Visits:
    """Which KV running sharded requests read that their ranks' numbers do not say.

    Attributes:
        visitors: those that run.
        at: at which state of the sharded requests.
        read: KV tokens on each rank, beside those of the requests that run there.
        guests: queries of other ranks on each.
        exchange: whether there are any.
    """

    visitors: list[ShardedRequest]
    at: int
    read: list[int]
    guests: list[int]
    exchange: bool

    @classmethod
    def of(cls, visitors: list[ShardedRequest], ranks: int, at: int) -> Visits:
        read, guests = [0] * ranks, [0] * ranks
        for sharded in visitors:
            _give_to_holders(read, sharded)
            for rank in sharded.open_shards:
                guests[rank] += rank != sharded.rank
        return cls(visitors, at, read, guests, any(guests))


class Mover:
    """Watches the ranks' loads and takes requests from one to another.

    Args:
        scheduler: over all ranks.
        config: when to move.
        moves: whether homes move at all.
        generators: whether the model runners sample seeded requests with generators, whose state must come along.
    """

    def __init__(self, scheduler: SchedulerState, config: MoveConfig, moves: bool, generators: bool) -> None:
        self.scheduler = scheduler
        self.config = config
        self.moves = moves
        self.generators = generators
        # States of generators, of requests on their way or not yet known to their new model runner; None: to come.
        self._states: dict[str, bytes | None] = {}
        auto = scheduler.config.segments is None
        self.model = CostModel(PRIOR) if auto else CostModel()
        self.learns = moves or auto
        # Requests on their way, and where to.
        self.leaving: dict[str, int] = {}
        # How often requests have begun to leave, or have not arrived: what they visit, and from where, is another then.
        self.num_turns = 0
        self._last_move: dict[str, int] = {}
        # Tokens that requests had when their leaving was undone.
        self._undone: dict[str, int] = {}
        self._last_update = 0.0
        self.last_work = [StepLoad(0, 0)] * scheduler.config.ranks
        self.num_moves = self.num_spills = 0
        # Loads, and ranks whose numbers have changed since; what is ahead, and at which state of the sharded requests.
        count = scheduler.config.ranks
        self._loads = RankedLoads([RankLoad(0, 0, 0, 0)] * count)
        self.changed = set(range(count))
        self._visits = Visits.of([], count, -1)
        self._ahead: list[Ahead] | None = None
        self._ahead_at = 0

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Before the ranks are scheduled: let those arrive that can, and let others leave."""
        if not self.moves:
            return
        self._arrive()
        for rank in range(len(self.scheduler.ranks)):
            self.spill(rank, arrives=True)
        self._move()
        # Without async scheduling nothing is in flight now.
        self._arrive()

    def observe(self, parts: Sequence[Part], work: Sequence[StepLoad], scheduled: float) -> None:
        """Learn from a step whose output has come, if all ranks decoded, with drafts or without: prompts take their
        time otherwise.

        Args:
            parts: the ranks' of that step.
            work: what each rank did in it.
            scheduled: when it was, by ``time.monotonic``.
        """
        now = time.monotonic()
        if any(part.tokens for part in parts) and not any(part.prompt_tokens for part in parts):
            self.model.observe(work, now - max(scheduled, self._last_update))
        self._last_update = now

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        target = self.leaving.pop(request_id, None)
        if target is not None:
            self.num_turns += 1
            self.scheduler.ranks[target].expect_no_more(request_id)
        self._last_move.pop(request_id, None)
        self._undone.pop(request_id, None)
        self._states.pop(request_id, None)

    def note_generators(self, asked: Sequence[str], states: dict[str, bytes]) -> None:
        """What the workers have reported of departing requests; those without a report stay."""
        for request_id in asked:
            if request_id in states and request_id in self._states:
                self._states[request_id] = states[request_id]
            elif request_id in self.leaving:
                self._stay(request_id)

    def arrival(self, request_id: str, tokens: list[int]) -> Arrival:
        """What the new home's model runner must know of a request, once it meets it."""
        return Arrival(tokens, self._states.pop(request_id, None))

    def cancel(self) -> None:
        """All that are on their way stay where they are."""
        for request_id in list(self.leaving):
            self._stay(request_id)

    def _stay(self, request_id: str) -> None:
        """Undo a leaving. The request does not leave again before it has made a token. Whatever undid it once may
        undo it every time, and while it is leaving nobody schedules it: it would never run."""
        rank = self.scheduler.ranks[self.scheduler.rank_of[request_id]]
        rank.stay(request_id)
        rank.unwatch(request_id)
        self._undone[request_id] = self.scheduler.requests[request_id].num_tokens
        self.scheduler.ranks[self.leaving.pop(request_id)].expect_no_more(request_id)
        self.num_turns += 1
        self._states.pop(request_id, None)

    # -- loads -------------------------------------------------------------------------------------------------

    def loads(self) -> RankedLoads:
        """What placement knows of each rank, requests on their way and those with their home still ahead included.

        Kept, and taken anew for ranks whose numbers have changed: a burst asks once for each of its requests.
        """
        members = self.scheduler.members
        if self._ahead is None or self._ahead_at != members.changes:
            self._ahead, self._ahead_at = self._look_ahead(), members.changes
            self.changed.update(range(len(self._ahead)))
        if self.changed:
            for rank in self.changed:
                self._loads.put(rank, self._load(self.scheduler.ranks[rank].view, self._ahead[rank]))
            self.changed.clear()
        return self._loads

    def _load(self, view: RankView, ahead: Ahead) -> RankLoad:
        read = (view.tokens + ahead.read) // self.scheduler.block_size if self.moves else None
        load = view.load(ahead.homes, read, ahead.prompts)
        for adapter in ahead.adapters:
            load = load.with_adapter(adapter)
        return load

    def _look_ahead(self) -> list[Ahead]:
        """What sharded requests will have on each rank that its numbers do not say."""
        count = len(self.scheduler.ranks)
        homes, read, prompts = [0] * count, [0] * count, [0] * count
        adapters: list[set[int | None]] = [set() for _ in range(count)]
        for sharded in self.scheduler.sharded.values():
            for run in sharded.shard_map.runs[sharded.active :]:
                adapters[run.rank].add(adapter_of(sharded.request))
            if sharded.at_home:
                _give_to_holders(read, sharded)
                continue
            homes[sharded.shard_map.home] += sharded.shard_map.home != sharded.rank
            for run, tokens in sharded.runs_to_come():
                prompts[run.rank] += tokens
            read[sharded.rank] -= sharded.member.num_tokens
            for rank, tokens in enumerate(sharded.shard_map.tokens_by_rank(count, sharded.request.num_tokens)):
                read[rank] += tokens
        return list(map(Ahead, homes, adapters, read, prompts))

    def work(self) -> list[StepLoad]:
        """What the ranks' running requests read and compute in a step."""
        running, leaving = RequestStatus.RUNNING, self.leaving
        sharded = self.scheduler.sharded.items()
        visitors = [its for name, its in sharded if its.member.status is running and name not in leaving]
        visits = self._visits
        if visits.at != self.scheduler.members.changes or visits.visitors != visitors:
            visits = self._visits = Visits.of(visitors, len(self.scheduler.ranks), self.scheduler.members.changes)
        return [
            StepLoad(max(0, rank.view.computed + read), rank.view.running, guests, visits.exchange)
            for rank, read, guests in zip(self.scheduler.ranks, visits.read, visits.guests, strict=True)
        ]

    # -- who goes ----------------------------------------------------------------------------------------------

    def _candidates(self, rank: int) -> Iterator[tuple[Candidate, Decoding]]:
        """Decoding requests of a rank that may leave it, and what the rank says of them."""
        for at in self.scheduler.ranks[rank].decoding():
            request = self.scheduler.requests.get(at.request_id)
            if request is None or not self._may_go(request, at):  # a member has no generation to go on with
                continue
            sharded = self.scheduler.sharded.get(at.request_id)
            candidate = Candidate(
                request_id=at.request_id,
                home=rank,
                holders=() if sharded is None else tuple(sharded.open_shards),
                kv_tokens=at.computed,
                remaining_tokens=request.max_tokens - at.made,
                last_move=self._last_move.get(at.request_id),
                adapter=adapter_of(request),
            )
            yield candidate, at

    def _may_go(self, request: Request, at: Decoding) -> bool:
        sharded, block_size = self.scheduler.sharded.get(request.request_id), self.scheduler.block_size
        if at.computed // block_size * block_size <= (0 if sharded is None else sharded.local_start):
            return False  # it has only just come, or not one full block
        if at.known <= self._undone.get(request.request_id, -1):
            return False
        return request.request_id in self.scheduler.rank_of and can_shard(request) and at.made < request.max_tokens

    def _move(self) -> None:
        if not self.config.max_moves:
            return
        loads = self.loads()
        sources = drifted(loads, self.config)
        if not sources:
            return
        candidates = [candidate for rank in sources for candidate, _ in self._candidates(rank)]
        if not candidates:
            return
        now = self.scheduler.num_steps
        block_size = self.scheduler.block_size
        for move in plan_moves(
            loads,
            self.work(),
            candidates,
            step=now,
            block_size=block_size,
            model=self.model,
            config=self.config,
            visits=self.scheduler.graph_room.near(self.config.max_moves),
        ):
            self._leave(move.request_id, move.source, move.target)
            self.num_moves += 1
            self.scheduler.collector.moved()

    def short_ranks(self) -> list[int]:
        """Ranks whose requests need more blocks than are free, after all spills, though a spill would do."""
        if not self.moves:
            return []
        return [number for number, rank in enumerate(self.scheduler.ranks) if rank.view.spare_blocks < 0]

    def spill(self, rank: int, arrives: bool = False) -> None:
        """Requests that need a block which the rank does not have go on elsewhere; or others that leave it theirs.

        Args:
            rank: where.
            arrives: whether those that can go on at another rank at once will do so before this one is scheduled.
        """
        short = -self.scheduler.ranks[rank].view.spare_blocks
        if short <= 0 or not self.moves:
            return
        # Requests that wait have no claim before those that run.
        loads = [
            replace(load, free_blocks=max(0, other.view.spare_blocks))
            for load, other in zip(self.loads(), self.scheduler.ranks, strict=True)
        ]
        for candidate, relief in self._first_to_go(rank, arrives):
            visits = self.scheduler.graph_room.near(1)
            target = spill_target(
                loads, candidate, block_size=self.scheduler.block_size, config=self.config, visits=visits
            )
            if target is None:
                continue
            self._leave(candidate.request_id, rank, target)
            there = loads[target]
            loads[target] = replace(
                there.with_adapter(candidate.adapter),
                free_blocks=there.free_blocks - 1,
                batch=there.batch + 1,
                slots=there.slots - 1,
            )
            self.num_spills += 1
            self.scheduler.collector.spilled()
            short -= relief
            if short <= 0:
                self.scheduler.collector.prevented_preemption()
                return

    def _first_to_go(self, rank: int, arrives: bool) -> list[tuple[Candidate, int]]:
        """In the order in which vLLM would preempt them, those whose leaving helps in this step; by how many blocks.

        At a block border a request leaves the block that it would take. One that is decoded with drafts may be in the
        middle of its last block, which is free only when it has gone: with something in flight, or a generator whose
        state must come along, that is too late.
        """
        candidates = [
            (candidate, relief)
            for candidate, at in self._candidates(rank)
            if (relief := at.missing + (at.rest if arrives and self._goes_at_once(at) else 0))
        ][::-1]
        if self.scheduler.by_priority:
            requests = self.scheduler.requests
            candidates.sort(key=lambda c: _importance(requests[c[0].request_id]), reverse=True)
        return candidates

    def _goes_at_once(self, at: Decoding) -> bool:
        request = self.scheduler.requests[at.request_id]
        return not at.flying and not (self._seeded(request) and self._states.get(at.request_id) is None)

    # -- how ---------------------------------------------------------------------------------------------------

    def _leave(self, request_id: str, source: int, target: int) -> None:
        request = self.scheduler.requests[request_id]
        self.scheduler.ranks[source].watch(request)
        self.scheduler.ranks[source].leave(request_id)
        if self._seeded(request) and request_id not in self._states:  # else its generator has not even arrived here
            self._states[request_id] = None
            self.scheduler.members.ask_for_generator(request_id)
        self.scheduler.ranks[target].expect(request_id, adapter_of(request))
        self.leaving[request_id] = target
        self.num_turns += 1
        self._last_move[request_id] = self.scheduler.num_steps

    def _seeded(self, request: Request) -> bool:
        """Whether V1's model runner makes a generator for a request; of a greedy one's seed it makes nothing."""
        params = request.sampling_params
        return self.generators and params is not None and params.sampling_type == SamplingType.RANDOM_SEED

    def _arrive(self) -> None:
        for request_id, target in list(self.leaving.items()):
            source = self.scheduler.rank_of[request_id]
            request = self.scheduler.requests[request_id]
            if request.num_in_flight_tokens or request.num_output_placeholders:
                continue
            if self._states.get(request_id, b"") is None:
                continue
            del self.leaving[request_id]
            self.scheduler.members.move_home(request, source, target)
