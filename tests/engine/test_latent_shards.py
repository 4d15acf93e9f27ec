# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention over several ranks: the tokens and logprobs of the model in float64, whatever happens.

``tests/engine/test_latent.py`` holds the same reference against stock vLLM.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deepseek_reference import Decoded, DeepseekReference

from .conftest import DRAFTS
from .harness import RESTLESS, Answer, Ask, Engine, prompt
from .oracle import counted, teach

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BLOCK = 16  # the only size of vLLM's kernel
STEPS = 12
RECIPES: dict[str, dict[str, Any]] = {
    # Ranks take turns with a prompt, and each has two workers. LATENT_ENGINES=all starts this one, too.
    "two": dict(ranks=2, tensor_parallel_size=2, nanocp={"segment_size": 512, "parallel_prefill": False}),
    # So few blocks and so narrow margins that homes move and ranks spill all the time; 1,536 tokens a rank.
    "three": dict(
        ranks=3,
        nanocp={"segment_size": 512, "moves": RESTLESS, "scheduler_processes": True},
        num_gpu_blocks_override=97,
        max_model_len=4096,
        enable_prefix_caching=True,
    ),
    # The same with drafts by n-grams, or by what a test has taught the workers. LATENT_ENGINES=all, too.
    "drafting": dict(
        ranks=2,
        nanocp={"segment_size": 512, "moves": RESTLESS},
        num_gpu_blocks_override=145,
        max_model_len=4096,
        enable_prefix_caching=True,
        speculative_config=DRAFTS,
        worker_extension_cls="tests.engine.oracle.Oracle",
    ),
}


@pytest.fixture(scope="module", params=list(RECIPES) if os.environ.get("LATENT_ENGINES") == "all" else ["three"])
def latent(request: pytest.FixtureRequest, tiny_deepseek: str) -> Iterator[Engine]:
    engine = Engine(tiny_deepseek, block_size=BLOCK, attention_config={"backend": "CPU_MLA"}, **RECIPES[request.param])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(deepseek_reference: DeepseekReference) -> Any:
    """Greedy decoding of a prompt in float64, computed once."""

    @functools.cache
    def decode(tokens: tuple[int, ...], steps: int) -> Decoded:
        return deepseek_reference.decode(list(tokens), steps)

    return decode


def check(engine: Engine, expected: Any, asks: list[Ask]) -> tuple[list[Answer], dict[str, int]]:
    """Answers of requests that come together, and how many moves and spills there were meanwhile."""
    before = engine.status()
    answers = engine.ask(asks)
    engine.check_nothing_left()
    after = engine.status()
    for ask, answer in zip(asks, answers, strict=True):
        if ask.leave_after is not None:
            continue
        decoded = expected(tuple(ask.prompt), ask.params.get("max_tokens", 16))
        assert answer.tokens[0] == decoded.tokens, (len(ask.prompt), answer.tokens[0], decoded.tokens)
        for step, top in enumerate(answer.logprobs[0] or ()):
            for token, one in top.items():
                assert abs(one.logprob - decoded.logprobs[step, token].item()) < 1e-3, (len(ask.prompt), step)
    return answers, {name: after[name] - before[name] for name in ("moves", "spills")}


def mixed() -> list[Ask]:
    return [
        Ask(prompt(n, n), dict(max_tokens=STEPS, logprobs=3), delay=0.05 * i)
        for i, n in enumerate((3000, 1, 700, 16, 1500, 33, 513))
    ]


def test_mixed_lengths_at_once(latent: Engine, expected: Any) -> None:
    """Long prompts over all ranks beside short ones; and again, from the prefix cache where there is one."""
    check(latent, expected, mixed())
    answers, _ = check(latent, expected, mixed())
    assert latent.ranks == 2 or sum(answer.cached for answer in answers) > 100


def test_moves_and_spills(latent: Engine, expected: Any) -> None:
    """Both depend on how many run when the next one comes: again, slower or faster, until there were some."""
    happened: Counter[str] = Counter()
    for delay in (0.03, 0.06, 0.015, 0.12):
        asks = [Ask(prompt(90 + 23 * i, 500 + i), dict(max_tokens=60 + 3 * i), delay=delay * i) for i in range(16)]
        happened.update(check(latent, expected, asks)[1])
        if latent.ranks == 2 or (happened["moves"] and happened["spills"]):
            return
    raise AssertionError(happened)


def test_clients_that_leave(latent: Engine, expected: Any) -> None:
    asks = mixed()
    for ask in asks[::2]:
        ask.leave_after = 2
    check(latent, expected, asks)


def test_drafts_that_are_known(latent: Engine, expected: Any) -> None:
    """Right ones and wrong ones, beside n-grams; sharded requests take a step for four tokens, too."""
    if latent.llm.vllm_config.speculative_config is None:
        pytest.skip("it decodes without drafts")
    asks = [Ask(prompt(n, 900 + n), dict(max_tokens=41), delay=0.05 * i) for i, n in enumerate((40, 600, 1100, 300))]
    known = [(ask.prompt, expected(tuple(ask.prompt), 41).tokens) for ask in asks]
    teach(latent, [(*one, share) for one, share in zip(known, (1.0, 1.0, 0.5, 0.0), strict=True)])
    before = latent.status()["sharded_steps"]
    check(latent, expected, asks)
    drafts = counted(latent)
    print(drafts)
    assert latent.status()["sharded_steps"] > before and drafts["accepted"] > 60
