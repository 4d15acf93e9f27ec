# SPDX-License-Identifier: Apache-2.0
"""Engines are slow to start: each is shared by all tests, and must be as empty after a test as before it.

All that these tests have at once is about 10 GiB; other tests run at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import forked  # noqa: F401  (before any engine starts)
from tests.tiny_adapters import MODULES, RANK
from tests.tiny_drafts import drafts

from .harness import RESTLESS, Engine

# Per-rank blocks of the small engines: 1,536 tokens, while a request may have 4,096.
SMALL_BLOCKS = 49
# Nearly every n-gram is found: there are 512 tokens.
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
# Two ranks that run full, and whose requests move whenever they can.
FULL_RANKS: dict[str, Any] = dict(
    ranks=2,
    nanocp={"segment_size": 512, "moves": RESTLESS | {"reserve_blocks": 0}},
    num_gpu_blocks_override=SMALL_BLOCKS,
    max_model_len=3000,
    enable_prefix_caching=True,
)
ADAPTERS = dict(
    enable_lora=True, max_loras=2, max_lora_rank=RANK, lora_target_modules=list(MODULES), enable_prompt_embeds=True
)
# Whether each engine has its ranks' schedulers where it has them not by default: in processes, or in the engine's own.
OTHER_FORM = os.environ.get("NANOCP_OTHER_FORM", "0") == "1"
# Engines that are closed after a module of tests, since no later one uses them: each has half a GiB for each process.
# One that is asked for all the same is started again.
LAST_USED = {
    "test_adapters": ["adapters", "adapters-stock"],
    "test_for_trainers": ["tensor-parallel"],
    "test_latent": ["latent-stock"],
    "test_lifecycle": ["two", "three", "small-stock"],
    "test_moves": ["round-robin"],
    "test_soak": ["small-caching"],
    "test_speculation": ["drafting-model", "stock-drafting"],
}


class Engines:
    """Starts engines by name, once.

    Args:
        recipes: what each is made of.
    """

    def __init__(self, recipes: dict[str, dict[str, Any]]) -> None:
        self._recipes = recipes
        self._running: dict[str, Engine] = {}

    def __call__(self, name: str) -> Engine:
        if name not in self._running:
            recipe = self._recipes[name]
            if OTHER_FORM and recipe["ranks"] > 1:
                apart = recipe["nanocp"].get("scheduler_processes", False)
                recipe = recipe | {"nanocp": recipe["nanocp"] | {"scheduler_processes": not apart}}
            self._running[name] = Engine(**recipe)
        return self._running[name]

    def close(self, names: Iterable[str] | None = None) -> None:
        """Close these, or all."""
        names = list(self._running) if names is None else names
        ending = [self._running.pop(name) for name in names if name in self._running]
        with ThreadPoolExecutor() as pool:  # each takes some seconds
            list(pool.map(Engine.close, ending))


@pytest.fixture(scope="module", autouse=True)
def _close_what_is_used_no_more(request: pytest.FixtureRequest, engines: Engines) -> Iterator[None]:
    """``LAST_USED``."""
    yield
    engines.close(LAST_USED.get(request.module.__name__.rsplit(".", 1)[-1], ()))


@pytest.fixture(scope="package")  # then their memory is free for the servers
def engines(tiny_model: str, tiny_deepseek: str, tiny_eagle3: str) -> Iterator[Engines]:
    """Starts engines by name, once."""
    recipes: dict[str, dict[str, Any]] = {
        # Stock on latent attention: each prompt at once, no prefix caching. Without a repair its rotary embeddings are
        # wrong.
        "latent-stock": dict(
            ranks=1,
            model=tiny_deepseek,
            attention_config={"backend": "CPU_MLA"},
            block_size=16,
            worker_cls="tests.engine.repaired.Worker",
        ),
        # Chunks large enough for all: stock vLLM on CPU dies of a seeded request that takes more than one.
        "stock": dict(ranks=1, max_num_batched_tokens=1 << 17, num_gpu_blocks_override=4096),
        "two": dict(ranks=2, nanocp={"segment_size": 1024, "parallel_prefill": False}),  # ranks take turns
        "three": dict(
            ranks=3,
            nanocp={"segment_size": 512, "scheduler_processes": True, "prefill_gap": {"ms": 60, "late_ms": 20}},
            enable_prefix_caching=True,
        ),
        # Stock that preempts: 3,072 tokens for all requests together.
        "small-stock": dict(ranks=1, num_gpu_blocks_override=2 * SMALL_BLOCKS - 1, max_model_len=2048),
        "small": dict(
            ranks=3,
            nanocp={"segment_size": 1024, "moves": False},  # so that it preempts
            num_gpu_blocks_override=SMALL_BLOCKS,
            max_model_len=4096,
            scheduling_policy="priority",
            async_scheduling=False,
        ),
        "small-caching": dict(
            ranks=3,
            nanocp={"segment_size": "auto"},
            num_gpu_blocks_override=SMALL_BLOCKS,
            max_model_len=4096,
            enable_prefix_caching=True,
        ),
        # A cache so small and margins so narrow that homes move and ranks spill all the time.
        "moving": dict(
            ranks=3,
            nanocp={"segment_size": 1024, "moves": RESTLESS, "scheduler_processes": True},
            num_gpu_blocks_override=SMALL_BLOCKS,
            max_model_len=4096,
            enable_prefix_caching=True,
        ),
        # The same with drafts: by n-grams, or by what a test has taught the workers.
        "drafting": dict(
            **FULL_RANKS,
            speculative_config=DRAFTS,
            worker_extension_cls="tests.engine.oracle.Oracle",
        ),
        # Stock with the same drafts, and without its faults on CPU.
        "stock-drafting": dict(
            ranks=1,
            speculative_config=DRAFTS,
            worker_cls="tests.engine.repaired.Worker",
            worker_extension_cls="tests.engine.oracle.Oracle",
        ),
        # The same with drafts of a random EAGLE3 head.
        "drafting-model": dict(
            **FULL_RANKS,
            speculative_config=drafts(tiny_eagle3, "eagle3"),
            worker_extension_cls="tests.engine.oracle.Oracle",
        ),
        # LoRA adapters of two at once, and prompts given as embeddings; stock with this package's repairs of that.
        "adapters": dict(
            **FULL_RANKS,
            **ADAPTERS,
        ),
        "adapters-stock": dict(ranks=1, worker_cls="tests.engine.repaired.Worker", **ADAPTERS),
        # What "moving" is compared with: vLLM's own way of several ranks.
        "round-robin": dict(
            ranks=3,
            nanocp={"placement": "round_robin", "max_degree": 1},
            num_gpu_blocks_override=SMALL_BLOCKS,
            max_model_len=32 * (SMALL_BLOCKS - 1),
            enable_prefix_caching=True,
        ),
        "tensor-parallel": dict(
            ranks=2,
            nanocp={"segment_size": 512},
            tensor_parallel_size=2,
            worker_extension_cls="tests.engine.trainer.Trainer",
        ),
    }

    engines = Engines({name: {"model": tiny_model, **recipe} for name, recipe in recipes.items()})
    yield engines
    engines.close()


@pytest.fixture
def stock(engines: Callable[..., Engine]) -> Engine:
    return engines("stock")


@pytest.fixture(params=["two", "three"])
def nanocp(request: pytest.FixtureRequest, engines: Callable[..., Engine]) -> Iterator[Engine]:
    """Two ranks without prefix caching; three with it."""
    engine = engines(request.param)
    yield engine
    engine.check_nothing_left()


@pytest.fixture
def two(engines: Callable[..., Engine]) -> Iterator[Engine]:
    engine = engines("two")
    yield engine
    engine.check_nothing_left()


@pytest.fixture
def three(engines: Callable[..., Engine]) -> Iterator[Engine]:
    engine = engines("three")
    yield engine
    engine.check_nothing_left()


@pytest.fixture
def small(engines: Callable[..., Engine]) -> Iterator[Engine]:
    engine = engines("small")
    yield engine
    engine.check_nothing_left()
