# SPDX-License-Identifier: Apache-2.0
"""Homes that move and ranks that spill: the same tokens as stock, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Answer, Ask, Engine, assert_same_logprobs, prompt

pytestmark = pytest.mark.engine

TRACE = Path(__file__).parents[1] / "data" / "conversation_lengths.json"
# Prompts are scaled down by the first, outputs by the second: so that many of them fill a block.
SCALE, OUTPUT_SCALE = 32, 8
# How many requests of the trace; 300 are all there are.
REQUESTS = int(os.environ.get("MOVES_REQUESTS", "60"))
# Later requests may end before an earlier one has its first token only if they ran beside it: at most so many.
OVERTAKEN = 3 * 32


def traced(count: int, seed: int, leave: float = 0.0) -> list[Ask]:
    """The trace scaled down. Requests with the same first prefix id share their first block of tokens."""
    rng = random.Random(seed)
    asks = []
    for i, (_, tokens_in, tokens_out, prefix) in enumerate(json.loads(TRACE.read_text())["requests"][:count]):
        length = max(1, tokens_in // SCALE)
        stem = prompt(min(32, length - 1), prefix) if length > 1 else []
        params: dict[str, object] = dict(
            max_tokens=max(1, tokens_out // OUTPUT_SCALE), logprobs=2 if i % 7 == 0 else None
        )
        if i % 5 == 1:
            params |= dict(repetition_penalty=1.2, presence_penalty=0.3)
        if i % 5 == 2:
            params |= dict(temperature=0.9, seed=i)
        if i % 5 == 3:
            params |= dict(min_tokens=params["max_tokens"], ignore_eos=False)
        gone = rng.choice([1, 3, 6]) if rng.random() < leave else None
        tokens = [*stem, *prompt(length - len(stem), 70000 + i)]
        asks.append(Ask(tokens, params, delay=0.02 * i, leave_after=gone))
    return asks


def run(engine: Engine, asks: list[Ask], during: Callable | None = None) -> tuple[list[Answer], dict[str, int]]:
    """Answers, and what was counted meanwhile."""
    before = engine.status()
    answers = engine.ask(asks, during)
    engine.check_nothing_left()
    after = engine.status()
    names = ("moves", "spills", "preemptions", "avoidable_preemptions")
    return answers, {name: after[name] - before[name] for name in names}


def assert_nobody_starved(answers: list[Answer]) -> None:
    for i, answer in enumerate(answers):
        overtaken = sum(later.ended < answer.first for later in answers[i + 1 :])
        assert overtaken <= OVERTAKEN, (i, overtaken)


def check(
    moving: Engine, stock: Engine, asks: list[Ask], during: Callable | None = None, moves: int = 1, spills: int = 1
) -> dict[str, int]:
    ours, counts = run(moving, asks, during)
    assert_nobody_starved(ours)
    theirs = stock.ask(asks)
    for i, (ask, mine, other) in enumerate(zip(asks, ours, theirs, strict=True)):
        if ask.leave_after is None:
            assert mine.tokens == other.tokens, (i, len(ask.prompt), ask.params)
            if ask.params.get("logprobs"):
                assert_same_logprobs(mine.logprobs[0], other.logprobs[0], 1e-3)
    print(counts)
    assert counts["moves"] >= moves and counts["spills"] >= spills, counts
    return counts


@pytest.mark.skipif("MOVES_REQUESTS" not in os.environ, reason="takes a minute: MOVES_REQUESTS=60")
def test_a_trace(engines: Callable[..., Engine], stock: Engine) -> None:
    check(engines("moving"), stock, traced(REQUESTS, seed=0))


def test_with_aborts_and_resets(engines: Callable[..., Engine], stock: Engine) -> None:
    async def disturb(running: Engine) -> None:
        rng = random.Random(1)
        for _ in range(6):
            await asyncio.sleep(rng.uniform(0.3, 1.0))
            await running.llm.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)

    # A reset preempts all, so ranks are seldom full: there may be no spill.
    counts = check(engines("moving"), stock, traced(REQUESTS * 7 // 10, seed=1, leave=0.2), disturb, moves=0, spills=0)
    assert counts["moves"] + counts["spills"] > 0, counts


@pytest.mark.skipif(
    REQUESTS < 100, reason="takes two minutes: MOVES_REQUESTS=100; unit/test_preemptions.py has its kind"
)
def test_nobody_is_preempted_while_a_rank_has_room(engines: Callable[..., Engine]) -> None:
    """Where vLLM's own ranks preempt again and again, because requests stay where they are."""
    moving, round_robin = engines("moving"), engines("round-robin")
    fitting = [ask for ask in traced(300, seed=2) if len(ask.prompt) + ask.params["max_tokens"] <= 1400]
    asks = fitting[:90]
    _, stays = run(round_robin, asks)
    _, moves = run(moving, asks)
    print(stays, moves)
    assert stays["preemptions"] >= len(asks) // 12 and stays["avoidable_preemptions"] > 0, stays
    assert moves["avoidable_preemptions"] == 0 and moves["spills"] > 0, moves


def test_long_outputs_move_again_and_again(engines: Callable[..., Engine], stock: Engine) -> None:
    """Requests of many blocks' output that go round the ranks."""
    asks = [Ask(prompt(20 + 13 * i, 500 + i), dict(max_tokens=150 + 7 * i), delay=0.05 * i) for i in range(18)]
    asks[3].params |= dict(repetition_penalty=1.3, frequency_penalty=0.2, logprobs=3)
    asks[5].params |= dict(stop=["zz"], min_tokens=40)
    asks += [Ask(prompt(9, 900 + i), dict(max_tokens=4), delay=0.3 + 0.04 * i) for i in range(40)]
    check(engines("moving"), stock, asks, spills=0)


def test_structured_output_moves(engines: Callable[..., Engine], stock: Engine) -> None:
    """From one process to another, where its grammar is compiled anew and takes the tokens made so far."""
    from vllm.sampling_params import StructuredOutputsParams

    numbers = dict(type="array", items=dict(type="integer"), minItems=60, maxItems=80)
    long_words = ["".join(random.Random(seed).choices("abcdefgh ", k=260)) for seed in range(2)]
    kinds = [
        dict(regex="([a-f]{3}-[0-9]{2} ){40}"),
        dict(json=numbers),
        dict(choice=long_words),
        dict(grammar='root ::= ("x" "y"+ "z" | "q")+'),
    ]
    asks = [
        Ask(
            prompt(20 + 13 * i, 1500 + i),
            dict(max_tokens=100 + 9 * i, ignore_eos=False, structured_outputs=StructuredOutputsParams(**kinds[i % 4])),
            delay=0.05 * i,
            rank=0,  # so that batches are uneven, however long a step takes
        )
        for i in range(16)
    ]
    # All that decode long enough to move are structured.
    asks += [Ask(prompt(9, 1900 + i), dict(max_tokens=4), delay=0.3 + 0.04 * i) for i in range(30)]
    check(engines("moving"), stock, asks, spills=0)
