# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention on CPU: stock vLLM with this package's repairs gives a float64 reference's tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.deepseek_reference import Decoded, DeepseekReference

from .harness import Answer, Ask, Engine, prompt

pytestmark = pytest.mark.engine

STEPS = 12
LENGTHS = [1, 2, 15, 16, 17, 100, 129, 500, 777, 1500, 3000]


@pytest.fixture(scope="module")
def decoded(deepseek_reference: DeepseekReference) -> list[tuple[list[int], Decoded]]:
    """Prompts, two of which share 400 tokens with others, and what follows them."""
    prompts = [prompt(length, 70 + i) for i, length in enumerate(LENGTHS)]
    prompts += [prompts[-1][:400] + prompt(5, 1), prompts[-2][:400] + prompt(130, 2)]
    return [(one, deepseek_reference.decode(one, STEPS)) for one in prompts]


def check(answers: list[Answer], decoded: list[tuple[list[int], Decoded]]) -> None:
    for answer, (given, wanted) in zip(answers, decoded, strict=True):
        assert answer.tokens == [wanted.tokens], len(given)
        for step, top in enumerate(answer.logprobs[0]):
            assert len(top) >= 5
            for token, found in top.items():
                assert abs(found.logprob - float(wanted.logprobs[step, token])) < 1e-3, (len(given), step)


def test_tokens_and_logprobs(engines: Callable[..., Engine], decoded: list[tuple[list[int], Decoded]]) -> None:
    asks = [Ask(given, dict(max_tokens=STEPS, logprobs=5)) for given, _ in decoded]
    check(engines("latent-stock").ask(asks), decoded)
