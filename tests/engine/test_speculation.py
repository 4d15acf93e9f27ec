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
SHARES = (None, 0.0, 0.5, 1.0)  # of drafts that are right; None: drafts by n-grams, or by a model


@pytest.fixture(params=["drafting", "drafting-model"])
def drafting(request: pytest.FixtureRequest, engines: Callable[..., Engine]) -> Engine:
    """Drafts by n-grams; by a random EAGLE3 head."""
    return engines(request.param)


def teach(engine: Engine, asks: list[Ask], answers: list[Answer], shares: list[float | None]) -> None:
    """Have each request drafted for, and such a share of it right; None: by n-grams, or by a model."""
    known = [(a.prompt, b.tokens[0], s) for a, b, s in zip(asks, answers, shares, strict=True) if s is not None]
    engine.call(engine.llm.collective_rpc("teach", args=(known,)))


def counted(engine: Engine) -> Counter[str]:
    return sum(map(Counter, engine.call(engine.llm.collective_rpc("count_drafts"))), Counter())


def mixed(first: int) -> list[Ask]:
    """Lengths on both sides of a segment, one that no rank can hold, and what sampling keeps of a request; each four
    have one kind of everything."""
    from vllm.sampling_params import StructuredOutputsParams

    numbers = dict(type="array", items=dict(type="integer"), minItems=8, maxItems=12)
    kinds: list[dict[str, Any]] = [
        dict(max_tokens=40, logprobs=2),
        dict(max_tokens=60, repetition_penalty=1.2, presence_penalty=0.3),
        dict(max_tokens=50, structured_outputs=StructuredOutputsParams(json=numbers), ignore_eos=False),
        dict(max_tokens=70),
    ]
    lengths = [20, 47, 300, 530, 700, 1000, 600, 100, 33, 520, 310, 1600]
    # Each kind is drafted for in another way in each four.
    order = [(i + i // 4) % 4 for i in range(len(lengths))]
    return [
        Ask(prompt(n, first + i), kinds[k], delay=0.05 * i) for i, (n, k) in enumerate(zip(lengths, order, strict=True))
    ]


async def disturb(running: Engine) -> None:
    for running_too in (False, True):
        await asyncio.sleep(0.7)
        await running.llm.reset_prefix_cache(reset_running_requests=running_too)


def since(before: dict[str, Any], engine: Engine) -> dict[str, int]:
    """What has happened in an engine since it had this status."""
    after = engine.status()
    return {name: after[name] - before[name] for name in ("moves", "spills", "preemptions", "sharded_steps")}


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
    counts, drafts = since(before, drafting), counted(drafting)
    print(counts, drafts)
    assert counts["moves"] + counts["spills"] > 0 and counts["preemptions"] and counts["sharded_steps"], counts
    assert drafts["accepted"] > 80 and drafts["by n-gram"] + drafts["by model"] > 30, drafts


@pytest.mark.parametrize(
    "drafting",
    [
        "drafting",
        pytest.param(
            "drafting-model",
            marks=pytest.mark.skipif("NANOCP_DRAFT_MODELS" not in os.environ, reason="NANOCP_DRAFT_MODELS is not set"),
        ),
    ],
    indirect=True,
)
def test_ranks_run_full(drafting: Engine, stock: Engine) -> None:
    """Requests that grow beyond what both ranks hold, all of them first at one."""
    asks = [Ask(prompt(100 + 3 * i, 48000 + i), dict(max_tokens=120 + 4 * i), rank=0) for i in range(14)]
    theirs = stock.ask(asks)
    teach(drafting, asks, theirs, [(1.0, 0.5)[i % 2] for i in range(len(asks))])
    before = drafting.status()
    ours = drafting.ask(asks)
    drafting.check_nothing_left()
    counts = since(before, drafting)
    print(counts, counted(drafting))
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert counts["moves"] and counts["spills"] and counts["sharded_steps"], counts


def test_drafts_spare_steps(drafting: Engine, stock: Engine) -> None:
    """All of them right: a sharded request takes a step for four tokens, also on its way over the ranks."""
    asks = [Ask(prompt(1300, 45000), dict(max_tokens=101))]
    theirs = stock.ask(asks)
    teach(drafting, asks, theirs, [1.0])
    assert drafting.ask(asks)[0].tokens == theirs[0].tokens
    drafting.check_nothing_left()
    drafts = counted(drafting)
    assert drafts["accepted"] == 75, drafts  # after the first token 25 steps of four


def test_up_to_the_model_length(drafting: Engine, stock: Engine) -> None:
    """Near it vLLM drafts no more, and verifies no drafts behind it."""
    asks = [Ask(prompt(2950, 46000), dict(max_tokens=50))]
    theirs = stock.ask(asks)
    teach(drafting, asks, theirs, [1.0])
    assert drafting.ask(asks)[0].tokens == theirs[0].tokens
    drafting.check_nothing_left()


@pytest.mark.parametrize("drafting", ["drafting"], indirect=True)
def test_seeds(drafting: Engine, stock: Engine, engines: Callable[..., Engine]) -> None:
    """Sampled tokens are those that stock vLLM samples with the same drafts, wherever requests are."""
    repaired = engines("stock-drafting")
    asks = [
        Ask(prompt(n, 47000 + i), dict(max_tokens=40, temperature=0.3, top_p=0.9, seed=i), rank=0)
        for i, n in enumerate([40, 560, 130, 333, 90])
    ]
    likely = stock.ask([Ask(ask.prompt, dict(max_tokens=40)) for ask in asks])
    for engine in (repaired, drafting):
        teach(engine, asks, likely, [1.0] * len(asks))
    before = drafting.status()
    theirs, ours = repaired.ask(asks), drafting.ask(asks)
    drafting.check_nothing_left()
    counts, drafts = since(before, drafting), counted(drafting)
    print(counts, drafts, counted(repaired))
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert counts["sharded_steps"] and counts["moves"] and drafts["accepted"] > 10, (counts, drafts)
