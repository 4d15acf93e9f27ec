# SPDX-License-Identifier: Apache-2.0
"""Ranks that step together: batches, KV blocks, chunks of prompts, growth and preemption as vLLM's schedulers do it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..placement import RankLoad, ShardMap
from ..placement.cost import StepLoad
from ..placement.prefill_steps import Allowance
from ..placement.visits import Visits
from .prefixes import PrefixCaches
from .setup import Counts, Policy, Prompt, Setup
from .trace import PREFIX_TOKENS, InputError, Requests


class World:
    """Ranks that serve requests. What is known of requests is in arrays by their number.

    Args:
        setup: the ranks.
        requests: in order of arrival.
    """

    policy: Policy

    def __init__(self, setup: Setup, requests: Requests) -> None:
        self.setup, self.requests = setup, requests
        n, ranks = len(requests), setup.ranks
        self._dice = random.Random(setup.seed)
        way = setup.machine.frontend * requests.prompt * np.array([self._noise() for _ in range(n)])
        self.ready = requests.at + way  # when each is at the scheduler
        self.arrivals = np.argsort(self.ready, kind="stable")
        self.length = requests.prompt.copy()  # tokens a request has
        self.end = requests.prompt + requests.output
        self.home = np.full(n, -1)
        self.held = np.zeros((n, ranks), dtype=np.int32)  # blocks a rank holds of a request
        self.have = np.zeros(n, dtype=np.int64)  # blocks that all hold
        self.entered = np.zeros(n, dtype=np.int64)  # a number that grows with each entry
        self.last_move = np.full(n, -1)
        self.preempted = np.zeros(n, dtype=bool)
        self.first, self.last = np.full(n, np.nan), np.full(n, np.nan)  # seconds of first and last token
        self.used, self.shared, self.read, self.guests, self.homes = (np.zeros(ranks, dtype=np.int64) for _ in range(5))
        self.to_compute = np.zeros(ranks, dtype=np.int64)  # tokens of prompts, by the rank of their run at hand
        self.decoding = np.zeros(0, dtype=np.int64)
        self.prompts: list[deque[Prompt]] = [deque() for _ in range(ranks)]
        self.opened = np.zeros(ranks)  # tokens taken as computed in the step at hand
        self.caches = PrefixCaches(ranks, setup.block_size) if setup.prefix_caching and requests.prefix else None
        self.counts = Counts()
        self.refused: list[int] = []
        self.clock = 0.0
        self.next = self.step_number = self.serial = self.finished = 0
        self._begun: list[int] = []

    def _noise(self) -> float:
        return max(0.5, self._dice.gauss(1.0, self.setup.noise)) if self.setup.noise else 1.0

    # -- what policies ask ---------------------------------------------------------------------------------------

    def load(self, rank: int, reads: bool = False) -> RankLoad:
        """As placement sees a rank between two steps; with what a step reads, if so asked."""
        used, batch = int(self.used[rank]), int(self.homes[rank])
        backlog = 2 * int(self.to_compute[rank]) // self.setup.budget
        level = used + int(self.shared[rank]) if reads else None
        return RankLoad(self.setup.blocks - used, used, batch, self.setup.slots - batch, level, backlog=backlog)

    def decodes(self) -> np.ndarray:
        """Decoding requests by their home."""
        return np.bincount(self.home[self.decoding], minlength=self.setup.ranks)

    def step_loads(self, queries: Sequence[int]) -> list[StepLoad]:
        """What decoding takes of each rank."""
        size, exchange = self.setup.block_size, bool(self.guests.any())
        rows = zip(self.read.tolist(), queries, self.guests.tolist(), strict=True)
        return [StepLoad(kv * size, n, guests, exchange) for kv, n, guests in rows]

    def visits(self, room: int) -> Visits:
        """Between ranks, of all that decode or will."""
        found = Visits(self.setup.ranks, room)
        held = self.held > 0
        for home in range(self.setup.ranks):
            here = held[self.home == home]
            here[:, home] = False  # a graph has as much room for a rank's visits to itself as it has rows
            found.pairs[home] = here.sum(axis=0).tolist()
            found.rows[home] = int(here.any(axis=1).sum())
        return found

    def hashes(self, request: int) -> Sequence[int]:
        """Of the prompt's blocks that may come from a cache: full ones without the last token."""
        return self.requests.prefix[request][: (int(self.requests.prompt[request]) - 1) // PREFIX_TOKENS]

    # -- who comes and goes --------------------------------------------------------------------------------------

    def refuse(self, request: int) -> None:
        """A request that no rank could ever hold."""
        self.refused.append(request)
        self.finished += 1

    def enter(self, request: int, shard_map: ShardMap) -> None:
        """A request takes its blocks and begins."""
        self.home[request] = shard_map.home
        self.homes[shard_map.home] += 1
        for run in shard_map.runs:
            self.held[request, run.rank] += run.num_blocks
            self.used[run.rank] += run.num_blocks
            self.have[request] += run.num_blocks
        self.entered[request] = self.serial
        self.serial += 1
        hits = 0
        if self.caches:
            hits, shared = self.caches.adopt(request, self.hashes(request), shard_map)
            self.used -= shared
            self.shared += shared
        if self.setup.decode_only and not (self.preempted[request] and self.policy.recomputes):
            self.opened[shard_map.home] += self.length[request] if self.policy.fills else 0
            self._begin([request])
            return
        size = self.setup.block_size
        index = next(i for i, run in enumerate(shard_map.runs) if run.end_block * size > hits)
        prompt = Prompt(request, shard_map.runs, index, hits, int(self.length[request]))
        self.prompts[prompt.rank].append(prompt)
        self.to_compute[prompt.rank] += prompt.left(size)

    def _begin(self, requests: list[int]) -> None:
        for request in requests:
            self.read += self.held[request]
            self.guests += self.held[request] > 0
            self.guests[self.home[request]] -= self.held[request, self.home[request]] > 0
        self.decoding = np.concatenate([self.decoding, np.array(requests, dtype=np.int64)])

    def _leave(self, requests: np.ndarray) -> None:
        """Decoding requests give back all blocks."""
        held, homes = self.held[requests], self.home[requests]
        total = held.sum(axis=0)
        self.used -= total
        self.read -= total
        self.guests -= (held > 0).sum(axis=0)
        at_home = homes[held[np.arange(len(requests)), homes] > 0]
        self.guests += np.bincount(at_home, minlength=self.setup.ranks)
        self.homes -= np.bincount(homes, minlength=self.setup.ranks)
        if self.caches:
            for request in requests.tolist():
                shared = self.caches.release(request)
                self.used += shared
                self.shared -= shared
        self.held[requests] = 0
        self.have[requests] = 0
        self.home[requests] = -1
        self.decoding = self.decoding[~np.isin(self.decoding, requests)]

    def move(self, request: int, target: int) -> None:
        """A decoding request goes on at another rank; what it has stays."""
        source = int(self.home[request])
        self.guests[source] += self.held[request, source] > 0
        self.guests[target] -= self.held[request, target] > 0
        self.homes[source] -= 1
        self.homes[target] += 1
        self.home[request] = target
        self.last_move[request] = self.step_number

    def _preempt(self, home: int) -> None:
        """One gives up its blocks and is computed again, before others."""
        request = self.policy.victim(self.decoding[self.home[self.decoding] == home])
        self.counts.events["preemptions"] += 1
        self._leave(np.array([request]))
        self.preempted[request] = True
        self.policy.return_(request, home)

    # -- a step --------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        while self.next < len(self.arrivals):
            request = int(self.arrivals[self.next])
            if self.ready[request] > self.clock:
                return
            self.next += 1
            self.policy.arrive(request)

    def _grow(self) -> None:
        """Decoding requests get the block that their next token needs; where there is none, they spill or preempt."""
        size = self.setup.block_size
        border = self.decoding[self.have[self.decoding] * size < self.length[self.decoding]]
        if not len(border):
            return
        need = np.bincount(self.home[border], minlength=self.setup.ranks)
        tight = self.used + need > self.setup.blocks
        is_tight = tight[self.home[border]]
        self._take(border[~is_tight])
        for request in border[is_tight].tolist():
            self._grow_tight(request)

    def youngest(self, requests: np.ndarray) -> int:
        """Which of these has entered last."""
        return int(requests[np.argmax(self.entered[requests])])

    def _take(self, requests: np.ndarray) -> None:
        """One block more for each at its home."""
        homes = self.home[requests]
        self.held[requests, homes] += 1
        self.have[requests] += 1
        more = np.bincount(homes, minlength=self.setup.ranks)
        self.used += more
        self.read += more

    def _grow_tight(self, request: int) -> None:
        while self.home[request] >= 0:  # it may preempt itself
            home = int(self.home[request])
            if self.used[home] < self.setup.blocks:
                self._take(np.array([request]))
                return
            target = self.policy.spill(request)
            if target is None:
                self._preempt(home)
            else:
                self.counts.events["spills"] += 1
                self.move(request, target)

    def _compute(self, decodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of prompts beside the decodes: tokens each rank computes of them, and pairs it attends to."""
        computed, pairs = np.zeros(self.setup.ranks), np.zeros(self.setup.ranks)
        if not any(self.prompts):
            return computed, pairs
        budgets = np.maximum(0, self.setup.budget - decodes).tolist()
        allowed = self.policy.prompts(bool(decodes.any()))
        left = None if allowed is None else [replace(allowed) for _ in self.prompts]
        gone: list[tuple[int, Prompt]] = []
        for rank, prompts in enumerate(self.prompts):
            for prompt, most in self.policy.order(prompts, budgets[rank]) if prompts else ():
                self._chunks(prompt, most, budgets, computed, pairs, left)
                if prompt.at >= prompt.end or prompt.rank != rank:
                    gone.append((rank, prompt))
        for rank, prompt in gone:
            self.prompts[rank].remove(prompt)
            if prompt.at >= prompt.end:
                self._begun.append(prompt.request)
            else:
                self.prompts[prompt.rank].append(prompt)
        for rank, prompts in enumerate(self.prompts):
            self.to_compute[rank] = sum(prompt.left(self.setup.block_size) for prompt in prompts)
        return computed, pairs

    def _chunks(
        self,
        prompt: Prompt,
        most: int,
        budgets: list[int],
        computed: np.ndarray,
        pairs: np.ndarray,
        allowed: list[Allowance] | None,
    ) -> None:
        """A prompt's chunk at its rank, and those that follow on others in the same step, as long as they are whole."""
        size = self.setup.block_size
        while (tokens := min(most, budgets[prompt.rank], prompt.left(size))) > 0:
            if allowed is not None and not (tokens := allowed[prompt.rank].take(prompt.at, tokens)):
                return
            budgets[prompt.rank] -= tokens
            computed[prompt.rank] += tokens
            # Its queries attend where the KV is.
            holders = sorted({run.rank for run in prompt.runs[: prompt.index + 1]})
            each = tokens * (prompt.at + tokens / 2) / len(holders)
            pairs[holders] += each * self.setup.machine.visit
            pairs[prompt.rank] -= each * (self.setup.machine.visit - 1)
            prompt.at += tokens
            if prompt.left(size) or prompt.at >= prompt.end:
                return
            prompt.index += 1
            most = prompt.left(size)
            if most > budgets[prompt.rank]:
                return

    def _emit(self) -> None:
        """A token of each that decoded, and the first of those whose prompts are done."""
        begun, self._begun = self._begun, []
        if begun:
            self._begin(begun)
        decoding = self.decoding
        self.length[decoding] += 1
        self.first[decoding] = np.where(np.isnan(self.first[decoding]), self.clock, self.first[decoding])
        done = decoding[self.length[decoding] >= self.end[decoding]]
        if len(done):
            self.last[done] = self.clock
            self.finished += len(done)
            for degree in (self.held[done] > 0).sum(axis=1).tolist():
                self.counts.degrees[degree] += 1
            self._leave(done)
            for request in done.tolist():
                self.policy.left(request)

    def _note(self, seconds: float) -> None:
        counts = self.counts
        counts.steps += 1
        counts.seconds += seconds
        counts.kv += seconds * float(self.used.mean()) / self.setup.blocks
        counts.fullest = max(counts.fullest, float(self.used.max()) / self.setup.blocks)
        counts.kv_ratio += seconds * float(self.used.max()) / max(1.0, float(self.used.mean()))
        counts.batch_ratio += seconds * float(self.homes.max()) / max(1e-9, float(self.homes.mean()))

    def step(self) -> None:
        """One step of all ranks.

        Raises:
            InputError: nothing runs, nothing will come, and a request still waits.
        """
        self._arrive()
        self.policy.admit()
        self.policy.balance()
        self._grow()
        if self.caches:
            self.caches.evict((self.setup.blocks - self.used).tolist())
        decodes = self.decodes()
        work = self.read * self.setup.block_size
        guests = self.guests.copy()
        computed, pairs = self._compute(decodes)
        if not decodes.any() and not computed.any():
            if self.finished == len(self.requests):  # the last of them were refused
                return
            if self.next == len(self.arrivals):
                raise InputError(f"{self.policy.waiting()} requests find no room on empty ranks; use a larger capacity")
            self.clock = max(self.clock, float(self.ready[self.arrivals[self.next]]))
            return
        room = self.setup.visits
        captured = room is None or bool(computed.any()) or self.visits(room).most <= room
        self.counts.events["outside"] += not captured
        seconds = self.setup.machine.seconds(work, decodes, computed, pairs, guests, self.opened, captured)
        seconds *= self._noise()
        self.opened[:] = 0
        self.policy.measured(work, decodes, guests, seconds, int(computed.sum()), float(pairs.max()))
        self._note(seconds)
        self.clock += seconds
        self.step_number += 1
        self._emit()

    def run(self) -> World:
        """Serve all requests."""
        while self.finished < len(self.requests):
            self.step()
        return self
