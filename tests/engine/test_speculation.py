# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: whatever share of the drafts is right, wherever requests are, the tokens are stock vLLM's."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from .harness import Answer, Ask, Engine, assert_same_logprobs, prompt

pytestmark = pytest.mark.engine

MOST = 3  # drafts a step
# How often all requests are repeated with other prompts; more look further.
ROUNDS = int(os.environ.get("NANOCP_DRAFT_ROUNDS", "1"))
SHARES = (None, 0.0, 0.5, 1.0)  # of drafts that are right; None: drafts by n-grams


@pytest.fixture
def drafting(engines: Callable[..., Engine]) -> Engine:
    return engines("drafting")


def teach(engine: Engine, asks: list[Ask], answers: list[Answer], shares: list[float | None]) -> None:
    """Have each request drafted for, and such a share of it right; None: by n-grams."""
    known = [(a.prompt, b.tokens[0], s) for a, b, s in zip(asks, answers, shares, strict=True) if s is not None]
    engine.call(engine.llm.collective_rpc("teach", args=(known,)))


def counted(engine: Engine) -> Counter[str]:
    return sum(map(Counter, engine.call(engine.llm.collective_rpc("count_drafts"))), Counter())


def mixed(first: int) -> list[Ask]:
    """Lengths on both sides of a segment and of a rank's cache, and what sampling keeps of a request."""
    from vllm.sampling_params import StructuredOutputsParams

    numbers = dict(type="array", items=dict(type="integer"), minItems=20, maxItems=30)
    asks = []
    for i in range(24):
        length = (20, 47, 300, 513, 700, 1100)[i // 4] + i
        params: dict[str, Any] = dict(max_tokens=40 + 3 * i, logprobs=2 if i % 5 == 0 else None)
        if i % 6 == 1:
            params |= dict(repetition_penalty=1.2, presence_penalty=0.3)
        if i % 6 == 3:
            params |= dict(structured_outputs=StructuredOutputsParams(json=numbers), ignore_eos=False, max_tokens=90)
        asks.append(Ask(prompt(length, first + i), params, delay=0.03 * i))
    asks.append(Ask(prompt(2300, first + 99), dict(max_tokens=60), delay=0.5))  # larger than a rank
    return asks


async def disturb(running: Engine) -> None:
    for running_too in (False, True):
        await asyncio.sleep(1.5)
        await running.llm.reset_prefix_cache(reset_running_requests=running_too)


@pytest.mark.parametrize("which", range(ROUNDS))
def test_tokens(drafting: Engine, stock: Engine, which: int) -> None:
    asks = mixed(40000 + 1000 * which)
    theirs = stock.ask(asks)
    shares = [SHARES[i % 4] for i in range(len(asks))]
    teach(drafting, asks, theirs, shares)
    before = drafting.status()
    ours = drafting.ask(asks, disturb)
    drafting.check_nothing_left()
    for i, (ask, mine, other) in enumerate(zip(asks, ours, theirs, strict=True)):
        assert mine.tokens == other.tokens, (i, shares[i], len(ask.prompt), ask.params)
        assert mine.text == other.text
        if ask.params.get("logprobs"):
            assert_same_logprobs(mine.logprobs[0], other.logprobs[0], 1e-3)
    after, drafts = drafting.status(), counted(drafting)
    counts = {name: after[name] - before[name] for name in ("moves", "spills", "preemptions", "sharded_steps")}
    print(counts, drafts)
    assert min(counts.values()) > 0, counts
    assert drafts["accepted"] > 200 and drafts["by n-gram"] > 50, drafts


def test_drafts_spare_steps(drafting: Engine, stock: Engine) -> None:
    """All of them right: a sharded request takes a step for four tokens, also on its way over the ranks."""
    asks = [Ask(prompt(1300, 45000), dict(max_tokens=200))]
    theirs = stock.ask(asks)
    teach(drafting, asks, theirs, [1.0])
    assert drafting.ask(asks)[0].tokens == theirs[0].tokens
    drafting.check_nothing_left()
    drafts = counted(drafting)
    assert drafts["accepted"] == 150 - 1, drafts
