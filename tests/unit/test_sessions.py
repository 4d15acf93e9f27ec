# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions at the scheduler, in every state a session can be in: random worlds, and one state a test.

What a session is answered is that of its turns run alone: the prompt of each is all tokens so far, without the last one
of each turn, and the next chunk; as in vLLM (``Scheduler._update_request_as_session``).
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from . import rank_insides
from .scheduler_world import STOP, Device, Session, Truth, WorldError
from .world_shapes import Ask, Shape, salt_of, vllm_config  # noqa: F401
from .worlds import InMode, World, in_mode  # noqa: F401

WORLDS = int(os.environ.get("NANOCP_SESSION_WORLDS", "15"))


@dataclass
class SessionAsk(Ask):
    """A session: ``request`` is its first chunk.

    Attributes:
        session: what it is answered.
        chunks: the others, and when they come. The last one ends the input.
        served: how many turns have room; the others end with an error.
    """

    session: Session
    chunks: list[tuple[int, Request]]
    served: int


def chunk(name: str, tokens: Sequence[int], max_tokens: int = 4, last: bool = False, **more: Any) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=[STOP])
    return Request(name, list(tokens), params, None, resumable=not last, **more)


def draw_session(
    rng: random.Random, shape: Shape, number: int, comes: int, adapter: LoRARequest | None = None
) -> SessionAsk:
    hasher = get_request_block_hasher(shape.block_size, sha256) if shape.caching else None
    name, rank_tokens = f"s{number}", shape.blocks * shape.block_size
    gaps = rng.choice([[0], [0, 0, 3], [1, 20, 60]])
    turns: list[Truth] = []
    chunks: list[tuple[int, Request]] = []
    context: list[int] = []
    now, served = comes, 0
    for index in range(rng.randint(1, 6)):
        outputs = rng.choice([1, 2, rng.randint(2, 30)])
        stops = rng.random() < 0.4
        most = outputs + (rng.choice([1, 40]) if stops else 0)
        length = rng.choice([1, rng.randint(1, 30), rng.randint(30, 150), rng.randint(1, rank_tokens)])
        if index == 0 or rng.random() < 0.7:  # else it may outgrow its rank
            length = min(length, rank_tokens - most - len(context))
        length = min(length, rank_tokens - most - 1)  # or ``max_tokens`` would be taken as left out
        if length < 1:
            break
        tokens = [10 + rng.randrange(200) for _ in range(length)]
        turn = Truth(number, context + tokens, outputs, salt_of(shape, number, adapter), stops=stops)
        served += served == index and turn.num_prompt + most <= rank_tokens
        turns.append(turn)
        more = dict(arrival_time=float(now), block_hasher=hasher, lora_request=adapter)
        chunks.append((now, chunk(name, tokens, most, **more)))
        context = turn.tokens[: turn.num_prompt + outputs - 1]
        now += rng.choice(gaps)
    chunks.append((now, chunk(name, [0], 4, last=True, lora_request=adapter)))
    leaves = comes + rng.randint(0, 80) if served == len(turns) and rng.random() < 0.2 else None
    return SessionAsk(chunks[0][1], turns[0], comes, leaves, Session(turns), chunks[1:], served)


class SessionWorld(World):
    """Sessions among other requests."""

    log_level = logging.CRITICAL

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.finishes: Counter[str] = Counter()
        self.left: set[str] = set()
        truths = self.device.runners[0].truths
        truths |= {name: ask.session for name, ask in self.asks.items() if isinstance(ask, SessionAsk)}
        for rank in self.scheduler.ranks:
            rank_insides.count_give_ups(rank)

    def draw(self) -> list[Ask]:
        others = super().draw()
        others = others[:: self.rng.choice([1, 2, 4])]
        sessions = [
            draw_session(self.rng, self.shape, 100 + i, self.rng.randint(1, 60), self.draw_adapter())
            for i in range(self.rng.randint(1, 12))
        ]
        return [*others, *sessions]

    def arrivals(self) -> list[tuple[int, Request]]:
        coming = super().arrivals()
        for ask in self.asks.values():
            if isinstance(ask, SessionAsk):
                coming += ask.chunks
        return sorted(coming, key=lambda event: event[0])

    def arrive(self, request: Request) -> None:
        if request.request_id not in self.left:  # a client that has left sends nothing more
            super().arrive(request)

    def abort(self, now: bool) -> None:
        before = set(self.ended)
        super().abort(now)
        self.left |= self.ended - before

    def held(self, name: str, ask: Ask) -> bool | None:
        if isinstance(ask, SessionAsk) and name not in self.left and self.finishes[name] >= ask.served:
            return None  # until its input ends, or it is told that it has no room
        return super().held(name, ask)

    def check_nothing_left(self) -> None:
        super().check_nothing_left()
        self.counts["gave way"] += sum(map(rank_insides.give_ups, self.scheduler.ranks))

    def take(self, name: str, tokens: list[int], finish: FinishReason | None) -> None:
        ask = self.asks.get(name)
        if not isinstance(ask, SessionAsk) or name in self.ended:
            super().take(name, tokens, finish)
            return
        turn = ask.session.turns[self.finishes[name]]
        failing = self.finishes[name] >= ask.served
        answer = self.answers[name]
        answer += tokens
        if answer != ([] if failing else turn.outputs[: len(answer)]):
            raise WorldError(f"{name} is answered {answer} in turn {self.finishes[name]} instead of {turn.outputs}")
        if finish is None:
            return
        if (finish == FinishReason.ERROR) != failing or (not failing and len(answer) != len(turn.outputs)):
            raise WorldError(f"{name} ends its turn {self.finishes[name]} of {ask.served} by {finish} after {answer}")
        answer.clear()
        self.finishes[name] += 1
        self.counts["failed turns" if failing else "turns"] += 1
        if self.finishes[name] == len(ask.session.turns):
            self.ended.add(name)


def test_worlds(in_mode: InMode) -> None:  # noqa: F811
    counts = in_mode.run(SessionWorld, WORLDS)
    assert counts["turns"] > 100 and counts["failed turns"] > 3 and counts["preemptions"] > 0, counts
    assert counts["gave way"] > 3, counts


# -- one state after another ----------------------------------------------------------------------------------------


class Stage:
    """A scheduler of two small ranks and what its clients are answered, a step at a time."""

    def __init__(self, vllm_config: Any, asynchronous: bool = False, **sizes: Any) -> None:  # noqa: F811
        base = dict(seed=0, ranks=2, block_size=16, blocks=20, max_reqs=8, budget=512, segment=4096, degree=2)
        base |= dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
        self.shape = Shape(**{**base, **sizes})  # type: ignore[arg-type]
        self.scheduler = self.shape.scheduler(vllm_config, asynchronous)
        self.truths: dict[str, Truth | Session] = {}
        shape = self.shape
        self.device = Device(self.truths, 2, shape.blocks + 1, shape.block_size, shape.max_reqs, 2, 1, asynchronous)
        self.flying: deque[Any] = deque()
        self.depth = 2 if asynchronous else 1
        self.answers: dict[str, list[int]] = {}
        self.finishes: dict[str, list[FinishReason]] = {}

    def session(self, name: str, lengths: Sequence[int], outputs: int = 4, stops: bool = False) -> list[Request]:
        """Its chunks, the end included; what it is to be answered is in ``truths``."""
        number, context = len(self.truths), []
        turns: list[Truth] = []
        chunks: list[Request] = []
        for length in lengths:
            tokens = [20 + number] * length
            turns.append(Truth(number, context + tokens, outputs, salt=1 + number, stops=stops))
            context = turns[-1].tokens[: turns[-1].num_prompt + outputs - 1]
            chunks.append(chunk(name, tokens, outputs + 40 * stops))
        self.truths[name] = Session(turns)
        return [*chunks, chunk(name, [0], last=True)]

    def other(self, name: str, length: int, outputs: int) -> Request:
        truth = Truth(len(self.truths), [20 + len(self.truths)] * length, outputs, 1 + len(self.truths), stops=False)
        self.truths[name] = truth
        return Request(name, list(truth.tokens[:length]), SamplingParams(max_tokens=outputs, prompt_logprobs=0), None)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def rank_of(self, name: str) -> Any:
        return self.scheduler.ranks[self.scheduler.rank_of[name]]

    def preempt(self, name: str) -> Request:
        request = rank_insides.preempt(self.rank_of(name), name)
        self.scheduler._settle()
        return request

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            if self.scheduler.has_requests():
                output = self.scheduler.schedule()
                self.flying.append((output, self.device.execute(output)))
                if len(self.flying) < self.depth:
                    continue
            elif not self.flying:
                return
            for outputs in self.scheduler.update_from_output(*self.flying.popleft()).values():
                for answer in outputs.outputs:
                    self.answers.setdefault(answer.request_id, []).extend(answer.new_token_ids)
                    if answer.finish_reason is not None:
                        self.finishes.setdefault(answer.request_id, []).append(answer.finish_reason)

    def check(self, *names: str, failed: int = 0) -> None:
        """Run to the end: each session is answered all its turns, or all but the last ``failed``."""
        steps = 0
        while self.scheduler.has_requests() or self.flying:
            steps += 1
            assert steps < 500, self.scheduler.get_request_counts()
            self.step()
        for name in names:
            session = self.truths[name]
            assert isinstance(session, Session)
            served = session.turns[: len(session.turns) - failed]
            assert self.answers[name] == [token for turn in served for token in turn.outputs]
            assert [finish == FinishReason.ERROR for finish in self.finishes[name]] == (
                [False] * len(served) + [True] * failed
            )
        scheduler = self.scheduler
        assert scheduler.free_blocks() == [self.shape.blocks] * 2 and scheduler.get_request_counts() == (0, 0)
        assert not scheduler.failures.leftovers() and not scheduler.rank_of and not scheduler.unplaced


def test_all_chunks_before_the_first_step(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    stage.add(*stage.session("s", [20, 30, 40]))
    stage.check("s")


def test_chunks_while_it_waits_for_room(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    stage.add(*(stage.other(f"o{i}", 290, 10) for i in range(4)))
    stage.step()
    first, *rest = stage.session("s", [20, 30, 40])
    stage.add(first)
    stage.step()
    assert "s" in stage.scheduler.unplaced
    stage.add(*rest)
    stage.check("s")


def test_chunks_while_it_waits_at_a_rank(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    stage.add(*(stage.other(f"o{i}", 290, 10) for i in range(2)))
    stage.step()
    first, *rest = stage.session("s", [60, 30, 40])
    stage.add(first)
    stage.step()
    assert rank_insides.known(stage.rank_of("s"))["s"].status == RequestStatus.WAITING
    stage.add(*rest)
    stage.check("s")


def test_chunks_while_it_runs_and_while_it_is_idle(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    first, second, third, end = stage.session("s", [20, 30, 40])
    stage.add(first)
    stage.step(2)
    stage.add(second)  # runs
    stage.step(20)
    assert len(stage.finishes["s"]) == 2 and not stage.scheduler.has_unfinished_requests()
    stage.add(third)  # idle
    stage.step(20)
    stage.add(end)
    stage.check("s")


def test_chunks_while_it_is_preempted(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    first, *rest = stage.session("s", [20, 30, 40], outputs=8)
    stage.add(stage.other("o", 250, 60), stage.other("p", 250, 60))
    stage.step()
    stage.add(first)
    stage.step(3)
    stage.preempt("s")
    assert "s" in stage.scheduler.unplaced and "s" in stage.scheduler.rank_of
    stage.add(*rest)
    stage.check("s")


@pytest.mark.parametrize("queued", [0, 1, 3])
def test_a_turn_that_ends_after_a_preemption(vllm_config: Any, queued: int) -> None:  # noqa: F811
    """With async scheduling a request's last token may come when it has been preempted. vLLM alone would lose the
    session's prompt."""
    stage = Stage(vllm_config, asynchronous=True)
    first, *rest = stage.session("s", [20, 30, 40], stops=True)
    stage.add(first, *rest[:queued])
    stage.step(4)  # the fourth token, at which it stops, is in flight
    assert stage.preempt("s").num_output_tokens == 3
    stage.step(2)
    assert len(stage.finishes["s"]) == 1
    stage.add(*rest[queued:])
    stage.check("s")


def test_an_id_again_after_an_abort(vllm_config: Any) -> None:  # noqa: F811
    stage = Stage(vllm_config)
    stage.add(*stage.session("s", [20, 30])[:-1])
    stage.step(2)
    stage.scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
    stage.step()
    stage.answers.clear()
    stage.add(*stage.session("s", [25, 35]))
    stage.check("s")


@pytest.mark.parametrize("at_once", [True, False])
def test_one_that_outgrows_its_rank(vllm_config: Any, at_once: bool) -> None:  # noqa: F811
    """It ends with an error for each chunk that has no room; who waits behind it goes on."""
    stage = Stage(vllm_config)
    first, second, third, end = stage.session("s", [200, 200, 10])
    stage.add(first)
    if at_once:
        stage.add(second, third, end)
    stage.step(10)
    if not at_once:
        stage.add(second)
        stage.step(3)
        stage.add(third, end)
    stage.add(stage.other("o", 200, 5), stage.other("p", 200, 5))
    stage.check("s", failed=2)
    assert len(stage.answers["o"]) == len(stage.answers["p"]) == 5


def test_max_tokens_left_out_are_cut(vllm_config: Any) -> None:  # noqa: F811
    """A chunk that asks for all a rank has gets what is left of it."""
    stage = Stage(vllm_config)
    first, second, end = stage.session("s", [100, 100])
    session = stage.truths["s"]
    assert isinstance(session, Session)
    outputs = 320 - session.turns[1].num_prompt
    session.turns[1] = Truth(0, session.turns[1].tokens[: session.turns[1].num_prompt], outputs, 1, stops=False)  # type: ignore[index]
    second.max_tokens = 220
    stage.add(first, second, end)
    stage.check("s")


def test_sessions_that_hold_what_each_other_needs(vllm_config: Any) -> None:  # noqa: F811
    """A rank's blocks are full of sessions with a chunk that each wait for one more: in vLLM, for ever."""
    stage = Stage(vllm_config, max_reqs=4)
    names = ["a", "b", "c", "d"]
    inputs = {name: stage.session(name, [150, 20]) for name in names}
    stage.add(*(chunks[0] for chunks in inputs.values()))
    stage.step(10)
    assert stage.scheduler.free_blocks() == [0, 0]
    stage.add(*(chunk for chunks in inputs.values() for chunk in chunks[1:]))
    stage.check(*names)


def test_idle_sessions_make_way(vllm_config: Any) -> None:  # noqa: F811
    """A request that fits is not kept waiting by clients that say nothing."""
    stage = Stage(vllm_config)
    names = ["a", "b", "c", "d"]
    inputs = {name: stage.session(name, [150, 20]) for name in names}
    stage.add(*(chunks[0] for chunks in inputs.values()))
    stage.step(10)
    stage.add(stage.other("o", 280, 5))
    stage.step(15)
    assert len(stage.answers["o"]) == 5
    stage.add(*(chunk for chunks in inputs.values() for chunk in chunks[1:]))
    stage.check(*names)


def test_idle_sessions_count_once(vllm_config: Any) -> None:  # noqa: F811
    """Half of the slots are taken by idle sessions: the other half is for others."""
    stage = Stage(vllm_config, blocks=100, max_reqs=4)
    for number in range(4):
        stage.add(stage.session(f"s{number}", [20])[0])
    stage.step(10)
    stage.add(*(stage.other(f"o{number}", 20, 5) for number in range(4)))
    stage.step()
    assert sum(len(rank_insides.running(rank)) for rank in stage.scheduler.ranks) == 4
