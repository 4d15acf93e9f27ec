# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions at the scheduler, in every state a session can be in: random worlds, and one state a test.

What a session is answered is that of its turns run alone: the prompt of each is all tokens so far, without the last one
of each turn, and the next chunk; as in vLLM (``Scheduler._update_request_as_session``).
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request

from vllm_nanocp.sched import mover as mover_module
from vllm_nanocp.sched import scheduler as scheduler_module

from .scheduler_world import STOP, Session, Truth, WorldError
from .test_scheduler_world import MODES, Ask, Shape, World, draw_asks, vllm_config  # noqa: F401

WORLDS = int(os.environ.get("NANOCP_SESSION_WORLDS", "15"))
IDS = ["v1", "v1-async", "v2", "v2-async"]


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


def draw_session(rng: random.Random, shape: Shape, number: int, comes: int) -> SessionAsk:
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
        turn = Truth(number, context + tokens, outputs, salt=0 if shape.caching else 1 + number, stops=stops)
        served += served == index and turn.num_prompt + most <= rank_tokens
        turns.append(turn)
        chunks.append((now, chunk(name, tokens, most, arrival_time=float(now), block_hasher=hasher)))
        context = turn.tokens[: turn.num_prompt + outputs - 1]
        now += rng.choice(gaps)
    chunks.append((now, chunk(name, [0], 4, last=True)))
    leaves = comes + rng.randint(0, 80) if served == len(turns) and rng.random() < 0.2 else None
    return SessionAsk(chunks[0][1], turns[0], comes, leaves, Session(turns), chunks[1:], served)


class SessionWorld(World):
    """Sessions among other requests."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.finishes: Counter[str] = Counter()
        self.left: set[str] = set()
        truths = self.device.runners[0].truths
        truths |= {name: ask.session for name, ask in self.asks.items() if isinstance(ask, SessionAsk)}
        for rank in self.scheduler.ranks:
            rank._give_up = self.counted("gave way", rank._give_up)  # type: ignore[method-assign]

    def counted(self, what: str, function: Any) -> Any:
        def call(session: Request) -> Any:
            self.counts[what] += 1
            return function(session)

        return call

    def draw(self) -> list[Ask]:
        others = draw_asks(self.rng, self.shape)
        others = others[:: self.rng.choice([1, 2, 4])]
        sessions = [
            draw_session(self.rng, self.shape, 100 + i, self.rng.randint(1, 60)) for i in range(self.rng.randint(1, 12))
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


@pytest.mark.parametrize(("version", "asynchronous"), MODES, ids=IDS)
def test_worlds(
    vllm_config: Any,  # noqa: F811
    version: int,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "vllm")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(version - 1))
    counts: Counter[str] = Counter()
    for seed in range(WORLDS):
        world = SessionWorld(vllm_config, seed, version, asynchronous)
        for module in (scheduler_module, mover_module):
            monkeypatch.setattr(module, "time", world)
        try:
            counts += world.run()
        except Exception as error:
            raise AssertionError(f"world {seed}, step {world.now}, {world.shape}: {error!r}") from error
    print(dict(counts))
    assert counts["turns"] > 100 and counts["failed turns"] > 3 and counts["preemptions"] > 0, counts
    assert counts["gave way"] > 3, counts
