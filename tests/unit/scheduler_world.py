# SPDX-License-Identifier: Apache-2.0
"""Ranks that exist only for the scheduler: they keep what model runners keep, and check every KV entry they read.

Where a token is computed, an entry goes to the block table's place: a hash of all tokens so far. Everything a query
attends to must be there, each position once. So whatever goes wrong on the way is found in the step in which it first
matters.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_nanocp.plan import Batch, PlanRow, StepPlan, idle_batch
from vllm_nanocp.sched.step_output import NanoCPSchedulerOutput
from vllm_nanocp.step_messages import with_generators

from .world_runners import GARBAGE, STOP, UNKNOWN, V1, V2, Known, Runner, Session, Truth, WorldError, base, fail

__all__ = ["GARBAGE", "STOP", "Device", "Session", "Truth", "WorldError", "base", "fail"]


def payloads(output: NanoCPSchedulerOutput) -> list[SchedulerOutput]:
    """What each rank's workers get."""
    return [pickle.loads(p.payload) if isinstance(p.payload, bytes) else p.payload for p in output.parts]


class Store:
    """A rank's KV: for every place the hash of the tokens up to there, and for messages whose it is and where."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.entries = np.zeros((num_blocks, block_size), dtype=np.int64)
        self.positions = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.owners = np.full((num_blocks, block_size), -1, dtype=np.int64)

    def wipe(self) -> None:
        self.entries[:], self.positions[:], self.owners[:] = 0, -1, -1

    def write(self, blocks: Sequence[int], first: int, end: int, truth: Truth, who: str) -> None:
        if end > len(blocks) * self.block_size:
            fail(f"{who}: {end} tokens do not fit into {len(blocks)} blocks")
        at = np.arange(first, end)
        held = np.asarray(blocks)[at // self.block_size]
        if not held.all():
            fail(f"{who}: positions {first} to {end - 1} go to the null block: {list(blocks)}")
        place = held, at % self.block_size
        self.entries[place], self.positions[place], self.owners[place] = truth.chain[first:end], at, truth.number

    def spoil(self, blocks: Sequence[int], first: int, end: int, who: str) -> None:
        """What drafts that are wrong leave behind; it must be written over before anybody reads it."""
        if end > len(blocks) * self.block_size:
            fail(f"{who}: {end} tokens with drafts do not fit into {len(blocks)} blocks")
        at = np.arange(first, end)
        held = np.asarray(blocks)[at // self.block_size]
        if not held.all():
            fail(f"{who}: drafts {first} to {end - 1} go to the null block: {list(blocks)}")
        self.entries[held, at % self.block_size], self.positions[held, at % self.block_size] = -7, at

    def read(self, blocks: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first entries of blocks, their positions and owners."""
        ids = list(blocks[: -(-length // self.block_size)])
        return (
            self.entries[ids].ravel()[:length],
            self.positions[ids].ravel()[:length],
            self.owners[ids].ravel()[:length],
        )


class Device:
    """All ranks together.

    Args:
        truths: of the requests, by id; may grow later.
        ranks: how many.
        num_blocks: of a rank's KV cache, with the null block.
        block_size: tokens a block holds.
        max_reqs: slots of a model runner.
        degree: most ranks that may hold KV of one request.
        version: of the model runner.
        asynchronous: whether steps are scheduled before the output of those before is known.
        queries: tokens that a request is decoded with, drafts included.
    """

    def __init__(
        self,
        truths: dict[str, Truth | Session],
        ranks: int,
        num_blocks: int,
        block_size: int,
        max_reqs: int,
        degree: int,
        version: int,
        asynchronous: bool,
        queries: int = 1,
    ) -> None:
        self.idle, self.most_drafts = idle_batch(queries if version == 2 else 1), queries - 1
        self.block_size, self.degree, self.version = block_size, degree, version
        self.stores = [Store(num_blocks, block_size) for _ in range(ranks)]
        make = V1 if version == 1 else V2
        self.runners: list[Runner] = [make(rank, truths, max_reqs, asynchronous) for rank in range(ranks)]
        self.shards: list[dict[str, list[int]]] = [{} for _ in range(ranks)]
        self._opened: set[str] = set()
        self.num_rows = self.num_arrivals = self.num_generators = 0
        self.drafts: Counter[str] = Counter()
        self.num_together = 0  # rows of a request of which another rank computes a part in the same step

    def wipe(self) -> None:
        """What was computed so far must not be read again."""
        for store in self.stores:
            store.wipe()

    def execute(self, output: NanoCPSchedulerOutput) -> list[ModelRunnerOutput]:
        """Run a step on all ranks: all write before any reads, as a layer does."""
        plan = output.plan
        parts = payloads(output)
        self._update_shards(plan)
        generators = [self._generators(runner, plan.departing) for runner in self.runners]
        for runner, part in zip(self.runners, parts, strict=True):
            runner.begin(part, plan)
        self._check_arrivals(plan, parts)
        self._check_batches(plan, parts)
        for runner, part in zip(self.runners, parts, strict=True):
            for req_id, count in part.num_scheduled_tokens.items():
                drafts = runner.drafts(runner.known[req_id], part.scheduled_spec_decode_tokens.get(req_id, ()))
                self._write(runner, runner.known[req_id], count, drafts)
        self._read(plan, parts)
        self._count_drafts(plan, parts)
        answers = [self._sample(runner, part) for runner, part in zip(self.runners, parts, strict=True)]
        return [with_generators(a, g) if g else a for a, g in zip(answers, generators, strict=True)]

    # -- the plan ----------------------------------------------------------------------------------------------

    def _update_shards(self, plan: StepPlan) -> None:
        for rank, opened in plan.opened.items():
            for shard, blocks in opened:
                if shard in self._opened:
                    fail(f"rank {rank}: shard id {shard} is used again")
                self._opened.add(shard)
                self.shards[rank][shard] = list(blocks)
        for shard in plan.closed:
            if shard not in self._opened:
                fail(f"shard {shard} closes, but never opened")
            for shards in self.shards:
                shards.pop(shard, None)

    def _generators(self, runner: Runner, departing: Iterable[str]) -> dict[str, bytes]:
        states = {req_id: runner.generator(req_id) for req_id in departing}
        return {req_id: state for req_id, state in states.items() if state is not None}

    def _check_arrivals(self, plan: StepPlan, parts: Sequence[SchedulerOutput]) -> None:
        news = {new.req_id for part in parts for new in part.scheduled_new_reqs}
        if not plan.arrived.keys() <= news:
            fail(f"{plan.arrived.keys() - news} arrive, but no rank meets them")
        self.num_arrivals += len(plan.arrived)
        self.num_generators += sum(arrival.generator is not None for arrival in plan.arrived.values())

    def _check_batches(self, plan: StepPlan, parts: Sequence[SchedulerOutput]) -> None:
        seen = []
        for runner, part in zip(self.runners, parts, strict=True):
            counts, drafts = part.num_scheduled_tokens, part.scheduled_spec_decode_tokens
            decodes = [runner.decodes(runner.known[r], n, len(drafts.get(r, ()))) for r, n in counts.items()]
            alike = len(set(counts.values())) == 1 and all(decodes)
            queries = next(iter(counts.values())) if alike else 0
            seen.append(Batch(len(counts), sum(counts.values()), queries) if counts else self.idle)
        if not any(part.num_scheduled_tokens for part in parts):
            seen = []
        if seen != plan.batches:
            fail(f"the ranks run {seen}, the plan says {plan.batches}")

    # -- KV ----------------------------------------------------------------------------------------------------

    def _write(self, runner: Runner, known: Known, count: int, drafts: Sequence[int]) -> None:
        count -= len(drafts)
        first, end, truth, who = known.computed, known.computed + count, known.truth, runner.who(known.req_id)
        known.accepted = truth.num_right(drafts, end)
        # A request may begin with its prompt's last token, and V2's with placeholders of drafts behind it.
        early = end < truth.num_prompt + (not runner.keeps_drafts)
        if drafts and (known.is_member or early or UNKNOWN in drafts):
            fail(f"{who}: {count} tokens from {first} on have drafts {drafts}")
        tokens, right = runner.inputs(known, count), truth.tokens[first:end]
        if tokens != right:
            wrong = next((i for i, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), len(tokens))
            fail(f"{who}: computes {tokens[wrong:][:3]}... at {first + wrong} instead of {right[wrong:][:3]}")
        good = end + known.accepted
        self.stores[runner.rank].write(known.blocks, first, good, truth, who)
        self.stores[runner.rank].spoil(known.blocks, good, end + len(drafts), who)

    def _read(self, plan: StepPlan, parts: Sequence[SchedulerOutput]) -> None:
        rows = {(row.home, row.req_id): row for row in plan.rows}
        if len(rows) != len(plan.rows):
            fail(f"a request has several rows: {plan.rows}")
        self.num_rows += len(rows)
        scheduled = Counter(base(req_id) for part in parts for req_id in part.num_scheduled_tokens)
        self.num_together += sum(scheduled[base(row.req_id)] > 1 for row in plan.rows)
        for runner, part in zip(self.runners, parts, strict=True):
            for req_id, count in part.num_scheduled_tokens.items():
                row = rows.pop((runner.rank, req_id), None)
                drafts = len(part.scheduled_spec_decode_tokens.get(req_id, ()))
                self._read_local(runner, runner.known[req_id], count, drafts, row)
                if row is not None:
                    self._read_shards(runner, runner.known[req_id], row)
        if rows:
            fail(f"rows of requests without tokens: {list(rows.values())}")

    def _read_local(self, runner: Runner, known: Known, count: int, drafts: int, row: PlanRow | None) -> None:
        start = 0 if row is None else row.first_block * self.block_size
        end, who = known.computed + count - drafts + known.accepted, runner.who(known.req_id)
        if row is not None and (row.num_queries, row.local_tokens) != (count, known.computed + known.ahead - start):
            fail(f"{who}: has {count} queries from {known.computed} + {known.ahead} on, the plan says {row}")
        blocks = known.blocks[start // self.block_size :]
        entries, positions, owners = self.stores[runner.rank].read(blocks, end - start)
        wrong = np.flatnonzero(entries != known.truth.chain[start:end])
        if wrong.size:
            at = int(wrong[0])
            found = f"position {positions[at]} of request {owners[at]}" if positions[at] >= 0 else "nothing"
            block = blocks[at // self.block_size]
            fail(f"{who}: reads {found} in block {block} for position {start + at} of request {known.truth.number}")

    def _read_shards(self, runner: Runner, known: Known, row: PlanRow) -> None:
        who, end = runner.who(known.req_id), row.first_block * self.block_size
        ranks = [holder.rank for holder in row.holders]
        if len(set(ranks)) != len(ranks) or len({*ranks, row.home}) > self.degree:
            fail(f"{who}: visits ranks {ranks}, with at most {self.degree} to hold it")
        seen = np.zeros(end, dtype=np.int64)
        for holder in row.holders:
            if holder.shard not in self.shards[holder.rank]:
                fail(f"{who}: visits {holder}, which is not open there")
            blocks = self.shards[holder.rank][holder.shard]
            if not 0 < holder.length <= len(blocks) * self.block_size:
                fail(f"{who}: visits {holder} of {len(blocks)} blocks")
            entries, positions, owners = self.stores[holder.rank].read(blocks, holder.length)
            bad = (positions < 0) | (positions >= end)
            bad |= entries != known.truth.chain[np.where(bad, 0, positions)]
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                fail(
                    f"{who}: finds position {positions[at]} of request {owners[at]} in block "
                    f"{blocks[at // self.block_size]} of {holder}"
                )
            np.add.at(seen, positions, 1)
        if (seen != 1).any():
            at = int(np.flatnonzero(seen != 1)[0])
            fail(f"{who}: finds position {at} {seen[at]} times in the shards of {row}")

    # -- output ------------------------------------------------------------------------------------------------

    def _sample(self, runner: Runner, part: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(part.num_scheduled_tokens)[::-1]  # a runner's order is its own
        tokens: list[list[int]] = []
        for req_id in ids:
            known, drafts = runner.known[req_id], part.scheduled_spec_decode_tokens.get(req_id, ())
            count = part.num_scheduled_tokens[req_id] - len(drafts)
            end, known.rejected, known.ahead = known.computed + count, len(drafts) - known.accepted, 0
            made = [known.truth.token(at) for at in range(end, end + known.accepted + 1)]
            if known.is_member:
                made = [GARBAGE]
            taken = runner.sampled(known, count, made[0])
            runner.accept(known, made[1:])
            tokens.append(made if taken else [])
            known.truth.draws += taken and not known.is_member
            known.computed += count + known.accepted
        runner.end(part)
        return ModelRunnerOutput(ids, {req_id: i for i, req_id in enumerate(ids)}, tokens)

    def _count_drafts(self, plan: StepPlan, parts: Sequence[SchedulerOutput]) -> None:
        visiting = {row.req_id for row in plan.rows}
        for runner, part in zip(self.runners, parts, strict=True):
            for req_id, drafts in part.scheduled_spec_decode_tokens.items():
                self.drafts += Counter(
                    verified=len(drafts),
                    accepted=runner.known[req_id].accepted,
                    sharded=req_id in visiting,
                    sharded_verified=len(drafts) * (req_id in visiting),
                    sharded_accepted=runner.known[req_id].accepted * (req_id in visiting),
                    moved=req_id in plan.arrived,
                    behind_others=part.num_scheduled_tokens[req_id] > len(drafts) + 1,
                )

    def propose(
        self, output: NanoCPSchedulerOutput, draft: Callable[[Truth, int], list[int]]
    ) -> list[DraftTokenIds | None]:
        """What the ranks draft after a step: for all that were in it, members too.

        Args:
            draft: given the truth of a request and the first position to draft for.
        """
        found: list[DraftTokenIds | None] = []
        for runner, part in zip(self.runners, payloads(output), strict=True):
            known = [runner.known[req_id] for req_id in part.num_scheduled_tokens]
            drafts = [draft(one.truth, one.computed + 1) for one in known]
            if runner.keeps_drafts:
                for one, mine in zip(known, drafts, strict=True):
                    one.drafts = [*mine, *[GARBAGE] * (self.most_drafts - len(mine))]
                drafts = [[UNKNOWN] * self.most_drafts for _ in known]
            found.append(DraftTokenIds([one.req_id for one in known], drafts) if known else None)
        return found

    def leftovers(self) -> dict[str, Any]:
        """What no request needs any more; empty after the last plan."""
        known = {runner.rank: list(runner.known) for runner in self.runners if runner.known}
        shards = {rank: list(shards) for rank, shards in enumerate(self.shards) if shards}
        return {name: found for name, found in (("requests", known), ("shards", shards)) if found}
