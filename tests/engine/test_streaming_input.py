# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions on real engines, and what the engine itself ends with an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
import vllm
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind

from vllm_nanocp.entry import http_limits as admission

from .harness import Ask, Engine, prompt

pytestmark = pytest.mark.engine

TURN_TOKENS = 6
TURN_LIMIT_S = 60.0


async def session(
    engine: Engine, name: str, lengths: Sequence[int], pause: float | None, **params: Any
) -> tuple[list[int], list[str]]:
    """What a session's client gets: all tokens, and how its turns ended as far as it sees. Its chunks come so many
    seconds apart; None: each when the turn of the one before is over."""

    async def over(turns: int) -> None:
        end = time.monotonic() + TURN_LIMIT_S
        while len(tokens) // TURN_TOKENS + ends.count("error") < turns and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def chunks() -> AsyncGenerator[StreamingInput, None]:
        for number, length in enumerate(lengths):
            yield StreamingInput(prompt={"prompt_token_ids": prompt(length, 7000 + length + number)})
            await (over(number + 1) if pause is None else asyncio.sleep(pause))

    settings: dict[str, Any] = dict(temperature=0.0, max_tokens=TURN_TOKENS, ignore_eos=True)
    settings |= dict(output_kind=RequestOutputKind.DELTA, **params)
    tokens: list[int] = []
    ends: list[str] = []
    async for output in engine.llm.generate(chunks(), SamplingParams(**settings), name):
        tokens += output.outputs[0].token_ids
        if output.outputs[0].finish_reason is not None:
            ends.append(output.outputs[0].finish_reason)
    return tokens, ends


def run(engine: Engine, others: list[Ask], *sessions: tuple[Sequence[int], float]) -> Any:
    """Sessions beside other requests, all at once."""

    async def everything() -> Any:
        asks = [engine._ask(ask) for ask in others]
        streams = [session(engine, f"s{i}", lengths, pause) for i, (lengths, pause) in enumerate(sessions)]
        answers = await asyncio.gather(*asks, *streams)
        return [answer.tokens for answer in answers[: len(asks)]], [tokens for tokens, _ in answers[len(asks) :]]

    return engine.call(everything())


def test_sessions_where_there_is_little_room(stock: Engine, small: Engine) -> None:
    """Chunks come before their session is placed, while it waits, runs, or is preempted, and after its turn."""
    others = [Ask(prompt(1000, 70 + i), dict(max_tokens=60)) for i in range(6)]
    sessions = [([20, 30, 40, 1], 0.0), ([300, 200, 100], 0.0), ([40, 400, 5], 0.05), ([500, 3, 300], 0.3)]
    sessions += [([90, 90, 90, 90, 90], 0.0), ([1, 1, 1], 0.0)]
    assert run(small, others, *sessions) == run(stock, others, *sessions)


def test_a_session_that_outgrows_its_rank(stock: Engine, small: Engine) -> None:
    """The first two chunks have room on a rank of 1,536 tokens. The client learns of the others' end, and is not left
    waiting. Of each one's in vLLM 0.32; in 0.33 the first one ends the session, and nothing of it stays."""
    lengths = [600, 500, 600, 10]
    tokens, ends = small.call(session(small, "s", lengths, None))
    before_last = "error" if vllm.__version__.startswith("0.32.") else "length"
    assert (tokens, ends[-2:]) == (stock.call(session(stock, "s", lengths[:2], 0.0))[0], [before_last, "error"])
    # All chunks at once: the client may see several ends as one.
    tokens, ends = small.call(session(small, "t", lengths, 0.0))
    assert tokens == small.call(session(small, "u", lengths[:2], 0.0))[0] and ends[-1] == "error"
    small.check_nothing_left()


def test_a_request_that_no_rank_can_hold(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Front-ends that do not check (vLLM's in Rust) hand it to the engine."""
    monkeypatch.setattr(admission, "check", lambda *args: None)
    asks = [Ask(prompt(2000, 1), dict(prompt_logprobs=1)), *(Ask(prompt(30, i)) for i in range(4))]
    answers = small.ask(asks)
    assert [answer.finish for answer in answers] == [["error"], *[["length"]] * 4]
    assert [len(answer.tokens[0]) for answer in answers] == [0, 16, 16, 16, 16]


def test_greedy_requests_with_a_seed_spill(engines: Callable[..., Engine], stock: Engine) -> None:
    """Whether one does depends on how many run when the next one comes: again, slower or faster, until one did."""
    moving = engines("moving")
    before = moving.status()["spills"]
    for delay in (0.02, 0.05, 0.01, 0.1):
        asks = [Ask(prompt(250 + 20 * i, 40 + i), dict(max_tokens=150, seed=i), delay=delay * i) for i in range(16)]
        ours = moving.ask(asks)
        moving.check_nothing_left()
        assert [answer.tokens for answer in ours] == [answer.tokens for answer in stock.ask(asks)]
        if moving.status()["spills"] > before:
            return
    raise AssertionError("no request has spilled")
