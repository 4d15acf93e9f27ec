# SPDX-License-Identifier: Apache-2.0
"""Home moves and spills: which requests leave their rank is policy (``placement.moves``); how, is here.

A request leaves when its last block is full. It is scheduled no more; once what it has in flight has come back, its
blocks go to a member that keeps them, and it goes on at its new home, from the next token. With async scheduling that
costs it one step, and the tokens it goes on with are then all known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

from vllm.v1.request import Request

from ..placement.cost import CostModel, StepLoad
from ..placement.moves import Candidate, MoveConfig, drifted, plan_moves, spill_target
from ..placement.place import RankLoad
from ..plan import Arrival
from .sharded import can_shard

if TYPE_CHECKING:
    from .scheduler import NanoCPScheduler

_computed = attrgetter("num_computed_tokens")


class Mover:
    """Watches the ranks' loads and takes requests from one to another.

    Args:
        scheduler: over all ranks.
        config: when to move.
        moves: whether homes move at all.
        generators: whether the model runners sample seeded requests with generators, whose state must come along.
    """

    def __init__(self, scheduler: NanoCPScheduler, config: MoveConfig, moves: bool, generators: bool) -> None:
        self.scheduler = scheduler
        self.config = config
        self.moves = moves
        self.generators = generators
        # States of generators, of requests on their way or not yet known to their new model runner; None: to come.
        self._states: dict[str, bytes | None] = {}
        self.model = CostModel()
        # Requests on their way, and where to.
        self.leaving: dict[str, int] = {}
        self._last_move: dict[str, int] = {}
        self._last_update = 0.0
        self.last_work = [StepLoad(0, 0)] * scheduler.config.ranks
        self.num_moves = self.num_spills = 0

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Before the ranks are scheduled: let those arrive that can, and let others leave."""
        if not self.moves:
            return
        self._arrive()
        for rank in range(len(self.scheduler.ranks)):
            self._spill(rank)
        self._move()
        # Without async scheduling nothing is in flight now.
        self._arrive()

    def observe(self, work: Sequence[StepLoad], scheduled: float) -> None:
        """Learn from a step whose output has come.

        Args:
            work: what each rank did in it.
            scheduled: when it was.
        """
        now = time.monotonic()
        self.model.observe(work, now - max(scheduled, self._last_update))
        self._last_update = now

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.leaving.pop(request_id, None)
        self._last_move.pop(request_id, None)
        self._states.pop(request_id, None)

    def note_generators(self, states: dict[str, bytes]) -> None:
        """What a worker has reported of departing requests."""
        for request_id, state in states.items():
            if request_id in self._states:
                self._states[request_id] = state

    def arrival(self, request_id: str, tokens: list[int]) -> Arrival:
        """What the new home's model runner must know of a request, once it meets it."""
        return Arrival(tokens, self._states.pop(request_id, None))

    def cancel(self) -> None:
        """All that are on their way stay where they are."""
        for request_id in self.leaving:
            rank = self.scheduler.ranks[self.scheduler.rank_of[request_id]]
            rank.stay(rank.requests[request_id])
            self._states.pop(request_id, None)
        self.leaving.clear()

    # -- loads -------------------------------------------------------------------------------------------------

    def loads(self) -> list[RankLoad]:
        """What placement knows of each rank, requests on their way and those with their home still ahead included."""
        scheduler = self.scheduler
        ahead = [0] * len(scheduler.ranks)
        for target in self.leaving.values():
            ahead[target] += 1
        for sharded in scheduler.sharded.values():
            if not sharded.at_home and sharded.shard_map.home != sharded.rank:
                ahead[sharded.shard_map.home] += 1
        if not self.moves:
            return [rank.load(scheduler.block_size, more) for rank, more in zip(scheduler.ranks, ahead, strict=True)]
        return [
            replace(rank.load(scheduler.block_size, more), read_blocks=work.kv_tokens // scheduler.block_size)
            for rank, more, work in zip(scheduler.ranks, ahead, self.work(), strict=True)
        ]

    def work(self) -> list[StepLoad]:
        """What the ranks' running requests read and compute in a step."""
        scheduler = self.scheduler
        read = [sum(map(_computed, rank.running)) for rank in scheduler.ranks]
        guests = [0] * len(read)
        for sharded in scheduler.sharded.values():
            if sharded.started:
                read[sharded.rank] -= sharded.local_start
                for rank, (_, tokens) in sharded.open_shards.items():
                    read[rank] += tokens
                    guests[rank] += rank != sharded.rank
        return [
            StepLoad(max(0, tokens), len(rank.running), visiting)
            for rank, tokens, visiting in zip(scheduler.ranks, read, guests, strict=True)
        ]

    # -- who goes ----------------------------------------------------------------------------------------------

    def _candidates(self, rank: int) -> Iterator[Candidate]:
        """Decoding requests of a rank whose last block is full."""
        block_size = self.scheduler.block_size
        for request in self.scheduler.ranks[rank].running:
            computed = request.num_computed_tokens
            if computed % block_size or computed < request.num_prompt_tokens or not self._may_go(request):
                continue
            sharded = self.scheduler.sharded.get(request.request_id)
            made = request.num_output_tokens + request.num_output_placeholders
            yield Candidate(
                request_id=request.request_id,
                home=rank,
                holders=() if sharded is None else tuple(sharded.open_shards),
                kv_tokens=computed,
                remaining_tokens=request.max_tokens - made,
                last_move=self._last_move.get(request.request_id),
            )

    def _may_go(self, request: Request) -> bool:
        sharded = self.scheduler.sharded.get(request.request_id)
        if sharded is not None and request.num_computed_tokens <= sharded.local_start:
            return False  # it has only just come
        return (
            request.request_id in self.scheduler.rank_of
            and can_shard(request)
            and request.num_output_tokens + request.num_output_placeholders < request.max_tokens
        )

    def _move(self) -> None:
        loads = self.loads()
        sources = drifted(loads, self.config)
        if not sources:
            return
        candidates = [candidate for rank in sources for candidate in self._candidates(rank)]
        if not candidates:
            return
        now = self.scheduler.num_steps
        block_size = self.scheduler.block_size
        for move in plan_moves(
            loads, self.work(), candidates, step=now, block_size=block_size, model=self.model, config=self.config
        ):
            self._leave(move.request_id, move.source, move.target)
            self.num_moves += 1
            self.scheduler.collector.moved()

    def _spill(self, rank: int) -> None:
        """Requests that need a block which the rank does not have go on elsewhere."""
        scheduler = self.scheduler.ranks[rank]
        short = -scheduler.spare_blocks
        if short <= 0:
            return
        # Requests that wait have no claim before those that run.
        loads = [
            replace(load, free_blocks=max(0, other.spare_blocks))
            for load, other in zip(self.loads(), self.scheduler.ranks, strict=True)
        ]
        # The last to come goes first, as it would be the first to be preempted.
        for candidate in list(self._candidates(rank))[::-1]:
            target = spill_target(loads, candidate, block_size=self.scheduler.block_size, config=self.config)
            if target is None:
                return
            self._leave(candidate.request_id, rank, target)
            loads[target] = replace(loads[target], free_blocks=loads[target].free_blocks - 1)
            self.num_spills += 1
            self.scheduler.collector.spilled()
            self.scheduler.collector.prevented_preemption()
            short -= 1
            if short <= 0:
                return

    # -- how ---------------------------------------------------------------------------------------------------

    def _leave(self, request_id: str, source: int, target: int) -> None:
        scheduler = self.scheduler.ranks[source]
        request = scheduler.requests[request_id]
        scheduler.leave(request)
        params = request.sampling_params
        seeded = self.generators and params is not None and params.seed is not None
        if seeded and request_id not in self._states:  # else its generator has not even arrived here
            self._states[request_id] = None
            self.scheduler.ask_for_generator(request_id)
        self.leaving[request_id] = target
        self._last_move[request_id] = self.scheduler.num_steps

    def _arrive(self) -> None:
        for request_id, target in list(self.leaving.items()):
            source = self.scheduler.rank_of[request_id]
            request = self.scheduler.ranks[source].requests[request_id]
            if request.num_in_flight_tokens or request.num_output_placeholders:
                continue
            if self._states.get(request_id, b"") is None:
                continue
            del self.leaving[request_id]
            self.scheduler.move_home(request, source, target)
