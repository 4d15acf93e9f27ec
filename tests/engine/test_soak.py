# SPDX-License-Identifier: Apache-2.0
"""Everything at once on too small a cache: shared prefixes, bursts, aborts, resets; then every token checked."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable

import pytest

from .harness import Ask, Engine, prompt

pytestmark = pytest.mark.engine

SEEDS = [int(s) for s in os.environ.get("SOAK_SEEDS", "1").split(",")]
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "40"))


def mixed_requests(seed: int, count: int) -> list[Ask]:
    """Lengths mostly short with a long tail, a third on shared prefixes, bursts, some clients that leave."""
    rng = random.Random(seed)
    stems = [prompt(rng.choice([200, 700, 1600, 2500]), 9000 + 10 * seed + i) for i in range(4)]
    requests = []
    at = 0.0
    for i in range(count):
        length = min(3900, int(rng.paretovariate(0.9) * 60))
        stem = rng.choice(stems) if rng.random() < 0.35 else []
        tokens = [*stem, *prompt(max(1, min(length, 3900 - len(stem))), 10000 * seed + i)]
        params: dict[str, object] = dict(max_tokens=min(rng.choice([1, 8, 40, 120]), 4096 - len(tokens)))
        if rng.random() < 0.25:
            params |= dict(temperature=0.8, seed=i, repetition_penalty=1.1)
        leave = rng.choice([1, 4, 20]) if rng.random() < 0.15 else None
        requests.append(Ask(tokens, params, delay=at, leave_after=leave))
        at += rng.choice([0.0, 0.0, 0.02, 0.1, 0.3])
    return requests


@pytest.mark.parametrize("seed", SEEDS)
def test_soak(engines: Callable[..., Engine], stock: Engine, seed: int) -> None:
    engine = engines("small-caching")
    requests = mixed_requests(seed, REQUESTS)

    async def disturb(running: Engine) -> None:
        rng = random.Random(seed)
        for _ in range(4):
            await asyncio.sleep(rng.uniform(0.5, 2.0))
            await running.llm.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)

    ours, theirs = engine.ask(requests, disturb), stock.ask(requests)
    for index, (ask, mine, other) in enumerate(zip(requests, ours, theirs, strict=True)):
        if ask.leave_after is None:
            assert mine.tokens == other.tokens, (index, len(ask.prompt))
    engine.check_nothing_left()
