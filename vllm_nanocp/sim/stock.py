# SPDX-License-Identifier: Apache-2.0
"""Who goes where in stock vLLM: data parallelism with its balancer or in turn; with one rank, tensor parallelism."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..placement import Run, ShardMap, cdiv
from .ranks import World
from .setup import Prompt

# Seconds between two looks of vLLM's front-ends at the engines' queues.
STATS_EVERY = 0.1


class Balancer:
    """vLLM's ``DPLBAsyncMPClient.get_core_engine_for_request``, in several front-ends.

    Args:
        ranks: how many.
        frontends: API servers, each of which has counts of its own.
        seed: of the front-ends that requests come through.
        look: of each rank, the requests that wait and run, and the part of the cache in use.
    """

    def __init__(self, ranks: int, frontends: int, seed: int, look: Callable[[], list[list[float]]]) -> None:
        self.ranks, self.frontends, self.look = ranks, frontends, look
        self._dice = random.Random(seed)
        # Of each front-end: what it knows of each rank, its own requests in flight there, and where it begins to look.
        self._known: list[list[list[float]]] = [[[0, 0, 0.0] for _ in range(ranks)] for _ in range(frontends)]
        self._inflight = [[0] * ranks for _ in range(frontends)]
        self._begin_at = [ranks * i // frontends for i in range(frontends)]
        self._looked = -1.0

    def choose(self, now: float) -> tuple[int, int]:
        """The rank of a request that comes at this second, and the front-end that it comes through."""
        if self._looked < 0 or now - self._looked >= STATS_EVERY:
            self._looked = now
            found = self.look()
            self._known = [[list(rank) for rank in found] for _ in range(self.frontends)]
        front = self._dice.randrange(self.frontends)
        known, inflight = self._known[front], self._inflight[front]
        best, least = 0, float("inf")
        for i in range(self.ranks):
            rank = (self._begin_at[front] + i) % self.ranks
            waiting, running, usage = known[rank]
            score: float = max(self.frontends * inflight[rank], waiting + running)
            score += waiting * 6.0 * max(0.0, usage - 0.5)
            if score < least:
                best, least = rank, score
        known[best][0] += self.frontends
        self._begin_at[front] = (self._begin_at[front] + 1) % self.ranks
        inflight[best] += 1
        return best, front

    def left(self, rank: int, front: int) -> None:
        """A request has ended."""
        self._inflight[front][rank] -= 1


class Stock:
    """vLLM's data parallelism: each request is bound to a rank when it comes, and waits in that rank's queue.

    Args:
        world: the ranks.
        balancer: ``vllm``, as ``DPLBAsyncMPClient.get_core_engine_for_request``; or ``round_robin``.
        frontends: API servers, each of which has counts of its own (``vllm``).
    """

    recomputes = True

    def __init__(self, world: World, balancer: str = "vllm", frontends: int = 1) -> None:
        self.world, self.balancer = world, balancer
        self.fills = world.setup.as_benchmarks
        ranks = world.setup.ranks
        self.queues: list[deque[int]] = [deque() for _ in range(ranks)]
        self.rank_of: dict[int, int] = {}
        self.via: dict[int, int] = {}
        self.turn = 0
        self._balancer = Balancer(ranks, frontends, world.setup.seed, self._look)

    def arrive(self, request: int) -> None:
        world = self.world
        need = cdiv(int(world.end[request]), world.setup.block_size)
        if need > world.setup.blocks:
            world.refuse(request)
            return
        rank = self._choose(request) if self.balancer == "vllm" else self.turn % world.setup.ranks
        self.turn += 1
        self.rank_of[request] = rank
        self.queues[rank].append(request)

    def _choose(self, request: int) -> int:
        rank, self.via[request] = self._balancer.choose(self.world.clock)
        return rank

    def _look(self) -> list[list[float]]:
        world, blocks = self.world, self.world.setup.blocks
        return [
            [len(queue), running, used / blocks]
            for queue, running, used in zip(self.queues, world.homes.tolist(), world.used.tolist(), strict=True)
        ]

    def admit(self) -> None:
        world, setup = self.world, self.world.setup
        decodes: list[int] | None = None
        for rank, queue in enumerate(self.queues):
            while queue:
                need = cdiv(int(world.length[queue[0]]), setup.block_size)
                if world.homes[rank] >= setup.slots or world.used[rank] + need > setup.blocks:
                    break
                if decodes is None:
                    decodes = world.decodes().tolist()
                if decodes[rank] + world.to_compute[rank] >= setup.budget:
                    break
                world.enter(queue.popleft(), ShardMap(setup.block_size, (Run(rank, 0, need),)))

    def balance(self) -> None:
        """Requests stay where they are."""

    def measured(self, *_: Any) -> None:
        """It learns nothing."""

    def spill(self, request: int) -> int | None:
        return None

    def victim(self, running: np.ndarray) -> int:
        return self.world.youngest(running)

    def return_(self, request: int, home: int) -> None:
        self.queues[self.rank_of[request]].appendleft(request)

    def left(self, request: int) -> None:
        rank = self.rank_of.pop(request)
        if request in self.via:
            self._balancer.left(rank, self.via.pop(request))

    def waiting(self) -> int:
        return sum(map(len, self.queues))

    def prompts(self, decodes: bool) -> None:
        """As much as fits."""

    def order(self, prompts: Sequence[Prompt], budget: int) -> list[tuple[Prompt, int]]:
        return [(prompt, budget) for prompt in prompts]
