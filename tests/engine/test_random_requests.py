# SPDX-License-Identifier: Apache-2.0
"""Random requests with everything that a client can ask for: engines of several ranks answer as stock vLLM does."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.random_runs import COUNT, MARKS, SEEDS

from .compared import differences
from .conftest import DRAFTS
from .harness import RESTLESS, Engine
from .random_requests import Case, Maker, Seen, watch

pytestmark = MARKS

NAMES = os.environ.get("NANOCP_RANDOM_ENGINES", "two,three").split(",")
AT_ONCE = 60
LONGEST = 2500
LIMIT_S = 600.0
# Of both engines. Stock vLLM with this package's repairs: on CPU it dies of a seeded request that takes two chunks.
COMMON: dict[str, Any] = dict(max_model_len=LONGEST, enable_prefix_caching=True, max_logprobs=20)
STOCK: dict[str, Any] = dict(
    ranks=1, max_num_batched_tokens=1 << 15, num_gpu_blocks_override=4096, worker_cls="tests.engine.repaired.Worker"
)
LATENT: dict[str, Any] = dict(block_size=16, attention_config={"backend": "CPU_MLA"})
# What each engine is beside COMMON, and what stock beside it is; both start for it.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two": (
        dict(
            ranks=2,
            nanocp={"segment_size": 200, "moves": RESTLESS},
            num_gpu_blocks_override=81,
            enable_prompt_embeds=True,
        ),
        dict(enable_prompt_embeds=True),
    ),
    "three": (
        dict(
            ranks=3,
            nanocp={"segment_size": 160, "moves": RESTLESS, "scheduler_processes": True},
            num_gpu_blocks_override=81,
            scheduling_policy="priority",
        ),
        dict(scheduling_policy="priority"),
    ),
    "sync": (
        dict(
            ranks=2,
            nanocp={"segment_size": "auto", "prefill_gap": {"ms": 60, "late_ms": 20}},
            num_gpu_blocks_override=81,
            async_scheduling=False,
        ),
        dict(async_scheduling=False),
    ),
    "drafting": (
        dict(
            ranks=2,
            nanocp={"segment_size": 200, "moves": RESTLESS, "scheduler_processes": True},
            num_gpu_blocks_override=81,
            speculative_config=DRAFTS,
        ),
        dict(speculative_config=DRAFTS),
    ),
    "latent": (
        LATENT | dict(ranks=3, nanocp={"segment_size": 200, "moves": RESTLESS}, num_gpu_blocks_override=161),
        LATENT | dict(enable_prefix_caching=False),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_stocks(name: str, tiny_model: str, tiny_deepseek: str) -> None:
    model = tiny_deepseek if name == "latent" else tiny_model
    mine, stocks = ENGINES[name]
    embeddings = None
    if mine.get("enable_prompt_embeds"):
        embeddings = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    ours, stock = Engine(model, **COMMON | mine), Engine(model, **COMMON | STOCK | stocks)
    found: list[str] = []
    answered = 0
    try:
        for seed in SEEDS:
            maker = Maker(seed, LONGEST, drafting=name == "drafting", ranks=ours.ranks, embeddings=embeddings)
            for part in range(0, COUNT, AT_ONCE):
                cases = maker.many(min(AT_ONCE, COUNT - part))
                label = f"{name} seed {seed} part {part}"
                differ, answers = compare(ours, stock, cases, label, disturbed=seed % 2 == 1)
                found, answered = found + differ, answered + answers
                ours.check_nothing_left()
        status = {key: value for key, value in ours.status().items() if key not in ("finished", "sharded")}
        print(status)
    finally:
        ours.close()
        stock.close()
    assert not found, "\n".join(found)
    assert answered > COUNT * len(SEEDS) / 2, "what is compared is refused"
    assert status["sharded_steps"] > 0 or mine["nanocp"]["segment_size"] == "auto", "what is compared is short"


def compare(ours: Engine, stock: Engine, cases: list[Case], label: str, disturbed: bool) -> tuple[list[str], int]:
    """Both engines' answers to requests that come together: what differs, and how many of ours had tokens."""
    answers = asked(ours, cases, label, disturbed)
    expected = asked(stock, cases, label, False)
    refused = Counter(seen.error[0] for seen in answers if seen.error)
    ends = Counter(choice.finish for seen in answers for choice in seen.choices.values())
    print(label, "refused", dict(refused), "ends", dict(ends), "cached", sum(seen.cached or 0 for seen in answers))
    found = []
    for index, (case, mine, theirs) in enumerate(zip(cases, answers, expected, strict=True)):
        for one in differences(case, mine, theirs, ours.llm.vllm_config.cache_config.block_size):
            length = len(case.given.get("prompt_token_ids", ())) or list(case.given)
            found.append(f"{label} request {index}: {one}\n    of {length} {case.params}")
            print(found[-1], flush=True)
    return found, sum(any(choice.tokens for choice in seen.choices.values()) for seen in answers)


def asked(engine: Engine, cases: list[Case], label: str, disturbed: bool) -> list[Seen]:
    async def all_at_once() -> list[Seen]:
        jobs = [watch(engine, case, f"ask-{label}-{index}".replace(" ", "-")) for index, case in enumerate(cases)]
        disturbing = asyncio.create_task(disturb(engine, label)) if disturbed else None
        seen = await asyncio.gather(*jobs)
        if disturbing is not None:
            await disturbing
        return seen

    seen: list[Seen] = engine.call(all_at_once(), LIMIT_S)
    assert not engine.llm.errored, (label, engine.ranks, "the engine has ended")
    return seen


async def disturb(engine: Engine, label: str) -> None:
    """The prefix cache is reset, and the engine paused."""
    rng = random.Random(label)
    for _ in range(3):
        await asyncio.sleep(rng.uniform(0.3, 1.5))
        if rng.random() < 0.6:
            await engine.llm.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        else:
            await engine.llm.pause_generation(mode="keep", clear_cache=False)
            await asyncio.sleep(0.1)
            await engine.llm.resume_generation()
