# SPDX-License-Identifier: Apache-2.0
"""What model runners keep of requests, for ranks that exist only for the scheduler (``scheduler_world``).

A request's tokens are known beforehand, as a function of its number, the position and all tokens before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from typing import NoReturn

import numpy as np
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_nanocp.plan import StepPlan

STOP = 3  # the token at which requests stop before they have made all they may
GARBAGE = 4  # what members sample; no request's output may have it
UNKNOWN = -1  # a token that V1's runner has sampled on the device and does not know on the host
_FIRST, _KINDS = 10, 200  # of ordinary tokens


class WorldError(AssertionError):
    """The scheduler told a rank something that a real one would have gone wrong with."""


def fail(message: str) -> NoReturn:
    raise WorldError(message)


def base(req_id: str) -> str:
    """The request that a member works for, or the id itself."""
    return req_id.split("#")[0]


class Truth:
    """A request run alone.

    Args:
        number: of the request.
        prompt: its tokens.
        outputs: how many it makes.
        salt: in all entries; the same for requests that may share a prefix.
        stops: whether the last output ends it, or it has made as many as it may.
    """

    def __init__(self, number: int, prompt: Sequence[int], outputs: int, salt: int, stops: bool) -> None:
        self.number, self.num_prompt, self.seeded = number, len(prompt), False
        self.tokens = list(prompt)
        entry, chain = hash((salt, 0)), []
        # One token and entry more than needed: a step in flight computes the last token, too.
        for position in range(len(prompt) + outputs + 1):
            if position >= len(prompt):
                last = stops and position == len(prompt) + outputs - 1
                self.tokens.append(STOP if last else _FIRST + hash((entry, number, position)) % _KINDS)
            entry = hash((entry, self.tokens[position]))
            chain.append(entry)
        self.chain = np.array(chain, dtype=np.int64)
        self.outputs = self.tokens[self.num_prompt : self.num_prompt + outputs]
        self.draws = 0  # tokens ever sampled for it, on any rank

    def num_right(self, drafts: Sequence[int], first: int) -> int:
        """How many drafts, for the positions from ``first`` on, are what the request makes."""
        end = self.num_prompt + len(self.outputs)
        right = self.tokens[first:end]
        return sum(takewhile(bool, map(eq, drafts, right)))

    def token(self, position: int) -> int:
        return self.tokens[position] if position < len(self.tokens) else GARBAGE


class Session:
    """A streaming-input session: each turn is a request of its own, whose prompt has all that was before.

    Args:
        turns: in their order.
    """

    def __init__(self, turns: Sequence[Truth]) -> None:
        self.turns = turns

    def turn(self, num_prompt: int) -> Truth:
        for turn in self.turns:
            if turn.num_prompt == num_prompt:
                return turn
        fail(f"a session has no turn with a prompt of {num_prompt}: {[turn.num_prompt for turn in self.turns]}")


@dataclass
class Known:
    """What a model runner keeps of a request."""

    req_id: str
    truth: Truth
    blocks: list[int]
    computed: int
    num_prompt: int
    tokens: list[int]
    prefill_len: int = 0
    last: int = UNKNOWN
    draws: int = 0
    # Drafts in the step at hand that are right, and those of the last one that were wrong.
    accepted: int = 0
    rejected: int = 0
    # Tokens that the scheduler takes for computed and that were drafts, which it does not know to be wrong.
    ahead: int = 0
    # Next drafts, where they stay on the device.
    drafts: list[int] | None = None

    @property
    def is_member(self) -> bool:
        return "#" in self.req_id


@dataclass
class Runner:
    """A model runner's bookkeeping. ``inputs`` and ``sampled`` are V1's or V2's ways with tokens."""

    rank: int
    truths: dict[str, Truth | Session]
    max_reqs: int
    asynchronous: bool
    # Whether drafts stay on the device.
    keeps_drafts = False
    known: dict[str, Known] = field(default_factory=dict)

    def who(self, req_id: str) -> str:
        return f"rank {self.rank}, {req_id}"

    def begin(self, part: SchedulerOutput, plan: StepPlan) -> None:
        """Take in a step's news, as far as the two runners agree."""
        cached = part.scheduled_cached_reqs
        for new in part.scheduled_new_reqs:
            if new.req_id in self.known:
                if not isinstance(self.truths[base(new.req_id)], Session):
                    fail(f"{self.who(new.req_id)}: comes as new but is known")
                self.replace(new.req_id)
            self.known[new.req_id] = self.meet(new, plan)
        for at, req_id in enumerate(cached.req_ids):
            if req_id not in self.known:
                fail(f"{self.who(req_id)}: has never been met, yet comes as known")
            self.go_on(self.known[req_id], cached, at)
        news = [new.req_id for new in part.scheduled_new_reqs]
        if sorted([*news, *cached.req_ids]) != sorted(part.num_scheduled_tokens):
            fail(f"rank {self.rank}: described {news} and {cached.req_ids}, scheduled {part.num_scheduled_tokens}")

    def replace(self, req_id: str) -> None:
        """A session goes on with its next chunk."""
        del self.known[req_id]

    def meet(self, new: NewRequestData, plan: StepPlan) -> Known:
        truth, prompt = self.truths[base(new.req_id)], list(new.prompt_token_ids or ())
        if isinstance(truth, Session):
            truth = truth.turn(len(prompt))
        known = Known(
            new.req_id, truth, list(new.block_ids[0]), new.num_computed_tokens, len(prompt), prompt, len(prompt)
        )
        if not known.is_member and len(prompt) != truth.num_prompt:
            fail(f"{self.who(new.req_id)}: has a prompt of {len(prompt)} tokens instead of {truth.num_prompt}")
        return known

    def go_on(self, known: Known, cached: CachedRequestData, at: int) -> None:
        blocks, computed = cached.new_block_ids[at], cached.num_computed_tokens[at]
        if known.req_id in cached.resumed_req_ids:
            known.blocks = list(blocks[0])  # type: ignore[index]
            known.computed = computed
            return
        known.blocks += blocks[0] if blocks is not None else []
        known.ahead = computed - known.computed
        if known.ahead not in ((0, known.rejected) if self.asynchronous else (0,)):
            fail(f"{self.who(known.req_id)}: has computed {known.computed} tokens, the scheduler says {computed}")

    def inputs(self, known: Known, count: int) -> list[int]:
        raise NotImplementedError

    def sampled(self, known: Known, count: int, token: int) -> bool:
        """After ``count`` tokens were computed: keep the token; False if the request is not that far."""
        raise NotImplementedError

    def accept(self, known: Known, tokens: Sequence[int]) -> None:
        """Keep what drafts have made beside the first token."""
        raise NotImplementedError

    def drafts(self, known: Known, scheduled: Sequence[int]) -> Sequence[int]:
        """The drafts that are verified, of which so many are scheduled."""
        if not self.keeps_drafts:
            return scheduled
        if known.drafts is None and known.computed == known.prefill_len - 1:  # begins so; vLLM's has zeros there
            known.drafts = [GARBAGE] * len(scheduled)
        if len(known.drafts or ()) < len(scheduled) or set(scheduled) - {UNKNOWN}:
            fail(f"{self.who(known.req_id)}: is to verify {scheduled}, has drafted {known.drafts}")
        return (known.drafts or [])[: len(scheduled)]

    def decodes(self, known: Known, count: int, drafts: int) -> bool:
        """Whether these tokens are a decode to the runner, which may replay a graph of such: one over others that are
        computed, wherever it came from, and drafts."""
        return count - drafts == 1 and known.computed + known.ahead > 0

    def end(self, part: SchedulerOutput) -> None:
        """After a step."""

    def generator(self, req_id: str) -> bytes | None:
        """State of a seeded request's generator: how many tokens it has drawn."""
        return None


@dataclass
class V1(Runner):
    """``vllm/v1/worker/gpu_model_runner.py``."""

    batch: set[str] = field(default_factory=set)
    # Tokens that the last step has sampled, and that the host does not know (with async scheduling).
    before: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)

    def begin(self, part: SchedulerOutput, plan: StepPlan) -> None:
        cached = part.scheduled_cached_reqs
        for req_id in part.finished_req_ids:
            self.known.pop(req_id, None)
            self._out(req_id)
        for req_id in self.batch - (part.num_scheduled_tokens.keys() - cached.resumed_req_ids):
            self._out(req_id)
        super().begin(part, plan)
        self.batch = set(part.num_scheduled_tokens)
        if len(self.batch) > self.max_reqs:
            fail(f"rank {self.rank}: {len(self.batch)} requests in a batch of {self.max_reqs}")

    def replace(self, req_id: str) -> None:
        super().replace(req_id)
        self._out(req_id)

    def _out(self, req_id: str) -> None:
        self.batch.discard(req_id)
        self.before.pop(req_id, None)

    def meet(self, new: NewRequestData, plan: StepPlan) -> Known:
        known = super().meet(new, plan)
        arrival = plan.arrived.get(new.req_id)
        if arrival is not None:
            known.tokens = known.tokens + list(arrival.tokens)
            known.draws = int(arrival.generator or 0)
        return known

    def go_on(self, known: Known, cached: CachedRequestData, at: int) -> None:
        super().go_on(known, cached, at)
        outputs, req_id = cached.num_output_tokens[at], known.req_id
        have = len(known.tokens) - known.num_prompt
        if outputs < have:
            if req_id not in cached.resumed_req_ids:
                fail(f"{self.who(req_id)}: has made {have} tokens, the scheduler says {outputs}")
            del known.tokens[known.num_prompt + outputs :]
        if req_id not in self.batch and self.asynchronous and outputs:
            if req_id not in cached.all_token_ids:
                fail(f"{self.who(req_id)}: comes back into the batch without its tokens")
            known.tokens[known.num_prompt :] = cached.all_token_ids[req_id][-outputs:]

    def inputs(self, known: Known, count: int) -> list[int]:
        tokens = known.tokens[known.computed : known.computed + count]
        if known.req_id in self.before and tokens:
            tokens[-1] = self.before[known.req_id]
        return tokens

    def sampled(self, known: Known, count: int, token: int) -> bool:
        if known.computed + count < len(known.tokens):
            return False
        known.tokens.append(UNKNOWN if self.asynchronous else token)
        self.now[known.req_id] = token
        if known.truth.seeded and not known.is_member:
            if known.draws != known.truth.draws:
                fail(f"{self.who(known.req_id)}: generator drew {known.draws} of {known.truth.draws} tokens so far")
            known.draws += 1
        return True

    def accept(self, known: Known, tokens: Sequence[int]) -> None:
        assert not (tokens and self.asynchronous)
        known.tokens += tokens

    def end(self, part: SchedulerOutput) -> None:
        if part.total_num_scheduled_tokens and self.asynchronous:
            self.before = self.now
        self.now = {}

    def generator(self, req_id: str) -> bytes | None:
        known = self.known.get(req_id)
        return str(known.draws).encode() if known is not None and known.truth.seeded else None


@dataclass
class V2(Runner):
    """``vllm/v1/worker/gpu/model_runner.py``."""

    keeps_drafts = True

    def begin(self, part: SchedulerOutput, plan: StepPlan) -> None:
        for req_id in part.finished_req_ids | (part.preempted_req_ids or set()):
            self.known.pop(req_id, None)
        if part.scheduled_cached_reqs.resumed_req_ids:
            fail(f"rank {self.rank}: {part.scheduled_cached_reqs.resumed_req_ids} resume without their tokens")
        super().begin(part, plan)
        if len(self.known) > self.max_reqs:
            fail(f"rank {self.rank}: {len(self.known)} requests in {self.max_reqs} slots")

    def meet(self, new: NewRequestData, plan: StepPlan) -> Known:
        known = super().meet(new, plan)
        if new.prefill_token_ids is None:
            fail(f"{self.who(new.req_id)}: comes without prefill_token_ids")
        known.tokens = list(new.prefill_token_ids)
        known.prefill_len = len(known.tokens)
        return known

    def inputs(self, known: Known, count: int) -> list[int]:
        end = known.computed + count
        tokens = known.tokens[known.computed : min(end, known.prefill_len)]
        return [*tokens, known.last] if end > known.prefill_len else tokens

    def sampled(self, known: Known, count: int, token: int) -> bool:
        if known.computed + count < known.prefill_len:
            return False
        known.last = token
        return True

    def accept(self, known: Known, tokens: Sequence[int]) -> None:
        if tokens:
            known.last = tokens[-1]

    def decodes(self, known: Known, count: int, drafts: int) -> bool:
        have = known.computed + known.ahead
        if have >= known.prefill_len and count - drafts != 1:
            fail(f"{self.who(known.req_id)}: decodes {count} tokens with {drafts} drafts")
        return have >= known.prefill_len or (count - drafts == 1 and have > 0)
