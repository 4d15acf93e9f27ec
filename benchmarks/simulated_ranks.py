# SPDX-License-Identifier: Apache-2.0
"""Ranks that serve requests in simulated steps, with the real placement and home moves. See balance_simulation.py."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.simulated_load import COUNTS, RATIOS, Arrivals, Averages, Scenario
from benchmarks.simulated_prefixes import HASHED, PrefixCaches
from vllm_nanocp.placement import Prefix, RankLoad, ShardMap, place, place_after_prefix
from vllm_nanocp.placement.cost import CostModel, StepLoad
from vllm_nanocp.placement.moves import Candidate, drifted, plan_moves, spill_target, with_reserve


class Simulation:
    """One policy serving the arrivals. State of requests is in arrays by their number."""

    def __init__(self, scenario: Scenario, arrivals: Arrivals, policy: str) -> None:
        self.s = scenario
        self.policy = policy
        self.arrivals = arrivals
        n, ranks = len(arrivals.at), scenario.ranks
        self.blocks = scenario.capacity // scenario.block_size
        self.length = arrivals.prompt.copy()  # tokens a request has
        self.end = arrivals.prompt + arrivals.output
        self.home = np.full(n, -1)
        self.held = np.zeros((n, ranks), dtype=np.int32)  # blocks a rank holds of a request
        self.last_move = np.full(n, -1)
        self.admitted = np.zeros(n, dtype=np.int64)  # a number that grows with each admission
        self.used = np.zeros(ranks, dtype=np.int64)
        self.shared = np.zeros(ranks, dtype=np.int64)  # blocks saved because several requests share them
        # Admitted requests by their home, and by the rank that computes them now.
        self.homes, self.computing = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
        self.decoding = np.zeros(0, dtype=np.int64)
        self.guests = np.zeros(ranks, dtype=np.int64)
        self.read = np.zeros(ranks, dtype=np.int64)  # blocks of decoding requests
        # Prompts in work at each rank: [request, its runs, which of them, next token].
        self.prefilling: list[deque[list[Any]]] = [deque() for _ in range(ranks)]
        self.queues: list[deque[int]] = [deque() for _ in range(ranks if policy == "round_robin" else 1)]
        self.turn_of: dict[int, int] = {}
        self.caches = PrefixCaches(ranks, scenario.block_size) if scenario.prefixes else None
        self.hit_tokens = self.prompt_tokens = 0
        self.model = CostModel()
        self.dice = random.Random(0)
        self.rules = replace(scenario.moves, max_degree=scenario.max_degree)
        self.averages = Averages()
        self.degrees: Counter[int] = Counter()
        self.clock = self.errors = self.latency = 0.0
        self.step = self.next = self.serial = self.finished = 0
        self.most_output = int(arrivals.output.max())
        span = float(arrivals.at[-1])
        self.window = (span * scenario.warm_up, span)

    # -- admission -----------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        at = self.arrivals.at
        while self.next < len(at) and at[self.next] <= self.clock:
            self.turn_of[self.next] = self.next
            self.queues[self.next % len(self.queues)].append(self.next)
            self.next += 1

    def rank_load(self, rank: int, reserve: int = 0) -> RankLoad:
        used, batch = int(self.used[rank]), int(self.homes[rank])
        # Placement as it is by default knows nothing of reads.
        level = None if self.policy == "batch_first" else used + int(self.shared[rank])
        load = RankLoad(self.blocks - used, used, batch, self.s.slots - batch, level)
        return with_reserve(load, reserve) if reserve else load

    def admit(self) -> None:
        if not any(self.queues):
            return
        reserve = self.s.moves.reserve_blocks if self.policy == "moves" else 0
        loads = [self.rank_load(rank, reserve) for rank in range(self.s.ranks)]
        for queue in self.queues:
            while queue:
                shard_map = self.place(queue[0], loads)
                if shard_map is None:
                    break
                self.enter(queue.popleft(), shard_map)
                for run in shard_map.runs:
                    loads[run.rank] = self.rank_load(run.rank, reserve)

    def place(self, request: int, loads: Sequence[RankLoad]) -> ShardMap | None:
        tokens = int(self.length[request])
        if self.policy == "round_robin":
            rules: dict[str, Any] = dict(max_degree=1, policy="round_robin", turn=self.turn_of[request])
        else:
            weight = None if self.policy == "batch_first" else self.s.kv_weight
            rules = dict(max_degree=self.s.max_degree, kv_weight=weight)
        rules["segment_size"] = self.s.segment_size
        fresh = place(tokens, self.s.block_size, loads, **rules)
        if fresh is None or self.caches is None or self.policy == "round_robin":
            return fresh
        runs = self.caches.find(self.hashes(request))
        prefix = Prefix(tuple(runs), (0,) * len(runs))
        after = place_after_prefix(prefix, tokens, self.s.block_size, loads, **rules) if runs else None
        return fresh if after is None else after

    def hashes(self, request: int) -> Sequence[int]:
        """Of the prompt's blocks that may come from a cache: full ones without the last token."""
        return self.arrivals.hashes[request][: (int(self.arrivals.prompt[request]) - 1) // HASHED]

    def enter(self, request: int, shard_map: ShardMap) -> None:
        self.home[request] = shard_map.home
        self.homes[shard_map.home] += 1
        for run in shard_map.runs:
            self.held[request, run.rank] += run.num_blocks
            self.used[run.rank] += run.num_blocks
        hits = 0
        if self.caches:
            hits, shared = self.caches.adopt(request, self.hashes(request), shard_map)
            self.used -= shared
            self.shared += shared
            self.hit_tokens += hits
        self.prompt_tokens += int(self.length[request])
        index = next(i for i, run in enumerate(shard_map.runs) if run.end_block * self.s.block_size > hits)
        first = shard_map.runs[index]
        self.prefilling[first.rank].append([request, shard_map.runs, index, hits])
        self.computing[first.rank] += 1
        self.admitted[request] = self.serial
        self.serial += 1

    # -- a step --------------------------------------------------------------------------------------------------

    def prefill(self, decodes: Sequence[int]) -> list[int]:
        """Compute chunks beside ``decodes``; the prompt tokens each rank computed. Whoever ends its prompt decodes."""
        computed = [0] * self.s.ranks
        passed: list[list[Any]] = []
        begun: list[int] = []
        for rank, queue in enumerate(self.prefilling):
            budget = max(1, self.s.chunk - decodes[rank])
            while queue and budget:
                work = queue[0]
                request, runs, index, at = work
                end = min(runs[index].end_block * self.s.block_size, int(self.length[request]))
                chunk = min(budget, end - at)
                budget -= chunk
                computed[rank] += chunk
                work[3] += chunk
                if work[3] < end:
                    continue
                queue.popleft()
                work[2] += 1
                if work[2] < len(runs):
                    self.computing[rank] -= 1
                    passed.append(work)
                else:
                    begun.append(request)
        for work in passed:  # the next run begins in the next step
            rank = work[1][work[2]].rank
            self.computing[rank] += 1
            self.prefilling[rank].append(work)
        self.begin(begun)
        return computed

    def begin(self, requests: list[int]) -> None:
        for request in requests:
            self.read += self.held[request]
            self.guests += self.held[request] > 0
            self.guests[self.home[request]] -= 1
        self.decoding = np.concatenate([self.decoding, np.array(requests, dtype=np.int64)])

    def grow(self) -> None:
        """Decoding requests get the block that their next token needs; where there is none, they spill or preempt."""
        border = self.decoding[self.length[self.decoding] % self.s.block_size == 0]
        need = np.bincount(self.home[border], minlength=self.s.ranks)
        tight = self.used + need > self.blocks
        plain = border[~tight[self.home[border]]]
        homes = self.home[plain]
        self.held[plain, homes] += 1
        self.used += np.where(tight, 0, need)
        self.read += np.where(tight, 0, need)
        for request in border[tight[self.home[border]]].tolist():
            self.grow_tight(request)

    def grow_tight(self, request: int) -> None:
        while self.home[request] >= 0:  # it may preempt itself
            home = int(self.home[request])
            if self.used[home] < self.blocks:
                self.held[request, home] += 1
                self.used[home] += 1
                self.read[home] += 1
                return
            target = None
            if self.policy == "moves":
                loads = [self.rank_load(rank) for rank in range(self.s.ranks)]
                candidate = self.candidate(request)
                target = spill_target(loads, candidate, block_size=self.s.block_size, config=self.rules)
            if target is None:
                self.count("preemptions")
                here = self.decoding[self.home[self.decoding] == home]
                self.preempt(int(here[np.argmax(self.admitted[here])]))
            else:
                self.count("spills")
                self.move(request, target)

    def preempt(self, request: int) -> None:
        """vLLM's way: the youngest gives up its blocks and is computed again, before others."""
        self.leave(np.array([request]))
        self.queues[self.turn_of[request] % len(self.queues)].appendleft(request)

    def leave(self, requests: np.ndarray) -> None:
        """Decoding requests give back all blocks."""
        held = self.held[requests]
        total = held.sum(axis=0)
        homes = np.bincount(self.home[requests], minlength=self.s.ranks)
        self.used -= total
        self.read -= total
        self.guests -= (held > 0).sum(axis=0)
        at_home = requests[self.held[requests, self.home[requests]] > 0]
        self.guests += np.bincount(self.home[at_home], minlength=self.s.ranks)
        self.homes -= homes
        self.computing -= homes
        if self.caches:
            for request in requests.tolist():
                shared = self.caches.release(request)
                self.used += shared
                self.shared -= shared
        self.held[requests] = 0
        self.home[requests] = -1
        self.decoding = self.decoding[~np.isin(self.decoding, requests)]

    def decode(self) -> None:
        self.length[self.decoding] += 1
        done = self.decoding[self.length[self.decoding] >= self.end[self.decoding]]
        if len(done):
            for degree in (self.held[done] > 0).sum(axis=1).tolist():
                self.degrees[degree] += 1
            self.finished += len(done)
            self.latency += float((self.clock - self.arrivals.at[done]).sum())
            self.leave(done)

    # -- moves ---------------------------------------------------------------------------------------------------

    def candidate(self, request: int) -> Candidate:
        made = int(self.length[request] - self.arrivals.prompt[request])
        moved = int(self.last_move[request])
        return Candidate(
            request_id=f"{request:08}",
            home=int(self.home[request]),
            holders=tuple(np.flatnonzero(self.held[request]).tolist()),
            kv_tokens=int(self.length[request]),
            remaining_tokens=max(1, self.most_output - made),
            last_move=None if moved < 0 else moved,
        )

    def step_loads(self, queries: Sequence[int]) -> list[StepLoad]:
        size = self.s.block_size
        exchange = bool(self.guests.any())
        return [
            StepLoad(kv * size, n, guests, exchange)
            for kv, n, guests in zip(self.read.tolist(), queries, self.guests.tolist(), strict=True)
        ]

    def rebalance(self) -> None:
        loads = [self.rank_load(rank) for rank in range(self.s.ranks)]
        sources = drifted(loads, self.rules)
        if not sources:
            return
        border = self.decoding[self.length[self.decoding] % self.s.block_size == 0]
        border = border[np.isin(self.home[border], sources)]
        if not len(border):
            return
        homes = np.bincount(self.home[self.decoding], minlength=self.s.ranks).tolist()
        moves = plan_moves(
            loads,
            self.step_loads(homes),
            [self.candidate(request) for request in border.tolist()],
            step=self.step,
            block_size=self.s.block_size,
            model=self.model,
            config=self.rules,
        )
        for move in moves:
            self.count("moves")
            self.move(int(move.request_id), move.target)

    def move(self, request: int, target: int) -> None:
        source = int(self.home[request])
        self.guests[source] += self.held[request, source] > 0
        self.guests[target] -= self.held[request, target] > 0
        for counts in (self.homes, self.computing):
            counts[source] -= 1
            counts[target] += 1
        self.home[request] = target
        self.last_move[request] = self.step

    # -- the run -------------------------------------------------------------------------------------------------

    def measured(self) -> bool:
        return self.window[0] <= self.clock <= self.window[1]

    def count(self, what: str) -> None:
        if self.measured():
            self.averages.counts[what] += 1

    def snapshot(self) -> dict[str, float]:
        """What is averaged, as it is in this step."""
        decodes = np.bincount(self.home[self.decoding], minlength=self.s.ranks)
        values = {
            "usage": float(self.used.mean()) / self.blocks,
            "fullest": float(self.used.max()) / self.blocks,
            "batch": float(self.computing.mean()),
            "decodes": float(decodes.mean()),
            "guests": float(self.guests.mean()),
            "waiting": float(sum(map(len, self.queues))),
        }
        named = {"kv": self.used, "batch": self.computing, "kv_read": self.read, "decodes": decodes}
        for name, array in named.items():
            mean = float(array.mean())
            values[f"{name}_ratio"] = float(array.max()) / mean if mean else 1.0
        return values

    def seconds(self, loads: Sequence[StepLoad]) -> float:
        """How long the step takes: its slowest rank, and some noise."""
        c = self.s.cost
        slowest = max(c.base + c.kv_token * x.kv_tokens + c.query * x.batch + c.guest * x.guests for x in loads)
        slowest += c.exchange * loads[0].exchange
        return slowest * max(0.5, self.dice.gauss(1.0, self.s.noise))

    def advance(self) -> None:
        """One step of all ranks.

        Raises:
            RuntimeError: nothing runs, nothing will arrive, and a request still waits.
        """
        self.arrive()
        self.admit()
        if self.policy == "moves":
            self.rebalance()
        self.grow()
        if self.caches:
            self.caches.evict((self.blocks - self.used).tolist())
        before = self.snapshot() if self.measured() else None
        decodes = np.bincount(self.home[self.decoding], minlength=self.s.ranks).tolist()
        work = self.step_loads(decodes)
        self.decode()
        computed = self.prefill(decodes)
        if not any(decodes) and not any(computed):
            if self.next == len(self.arrivals.at):
                raise RuntimeError(f"requests wait for ever: {self.queues}")
            self.clock = float(self.arrivals.at[self.next])
            return
        loads = [StepLoad(x.kv_tokens, x.batch + n, x.guests, x.exchange) for x, n in zip(work, computed, strict=True)]
        seconds = self.seconds(loads)
        self.errors += abs(self.model.predict_step(loads) / seconds - 1) if before else 0.0
        self.model.observe(loads, seconds)
        if before:
            self.averages.add(seconds, before)
        self.clock += seconds
        self.step += 1

    def run(self) -> Simulation:
        """Serve all requests."""
        while self.finished < len(self.arrivals.at):
            self.advance()
        return self

    def figures(self) -> dict[str, Any]:
        """What was measured; see the module."""
        a = self.averages
        total = sum(self.degrees.values())
        figures: dict[str, Any] = {f"{name}_ratio": round(a.mean(f"{name}_ratio"), 3) for name in RATIOS}
        figures |= {
            f"mean_{name}": round(a.mean(name), 3) for name in ("usage", "fullest", "batch", "decodes", "guests")
        }
        figures |= {
            "mean_waiting": round(a.mean("waiting"), 2),
            "step_ms": round(1e3 * a.seconds / max(1, a.steps), 2),
            "steps": a.steps,
            "cached_prompt": round(self.hit_tokens / max(1, self.prompt_tokens), 3),
            "latency_s": round(self.latency / max(1, self.finished), 2),
            "model_error": round(self.errors / max(1, a.steps), 4),
        }
        figures |= {f"{what}_per_1000_steps": round(1e3 * a.counts[what] / max(1, a.steps), 1) for what in COUNTS}
        figures["degrees"] = {d: round(self.degrees[d] / total, 4) for d in sorted(self.degrees)}
        return figures
