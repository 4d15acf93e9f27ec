# SPDX-License-Identifier: Apache-2.0
"""The random worlds' sizes, settings and requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.tiny_models import make_qwen3_moe
from vllm_nanocp.rank_hint import prefer_rank
from vllm_nanocp.sched.scheduler import NanoCPScheduler

from . import loopback
from .world_runners import STOP, Truth

# Of the model runner, and whether steps are scheduled before the output of those before is known.
MODES = [(version, asynchronous) for version in (1, 2) for asynchronous in (False, True)]
MOVES: list[Any] = [
    # Homes move for any reason there is.
    dict(
        batch_margin=0.0,
        kv_margin=0.0,
        min_steps_between=0,
        spare_blocks=0,
        growth_blocks=1,
        min_remaining_tokens=0,
        weigh_exchange=False,
    ),
    dict(batch_margin=0.0, min_steps_between=3, spare_blocks=1, growth_blocks=2, min_remaining_tokens=4),
    True,
    False,
]
MAX_MODEL_LEN = 4096


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of an engine that never starts. The worlds change copies of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        folder: Path = tmp_path_factory.mktemp("model")
        init_none_hash(sha256)
        yield EngineArgs(
            model=str(make_qwen3_moe(folder)),
            dtype="float32",
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            enable_expert_parallel=True,
            additional_config={"nanocp": {"ranks": 2}},
        ).create_engine_config()


@dataclass(frozen=True)
class Shape:
    """A world's sizes and settings."""

    seed: int
    ranks: int
    block_size: int
    blocks: int
    max_reqs: int
    budget: int
    segment: int | str
    degree: int
    moves: Any
    caching: bool
    priorities: bool
    chunk: int
    reserve: int
    parallel: bool = False

    @classmethod
    def draw(cls, rng: random.Random, seed: int) -> Shape:
        block_size, ranks = rng.choice([16, 32]), rng.randint(2, 4)
        return cls(
            seed=seed,
            ranks=ranks,
            block_size=block_size,
            blocks=rng.randint(20, 60) * 16 // block_size,
            max_reqs=rng.choice([4, 8, 16, 24]),
            budget=rng.choice([48, 64, 128, 512]),
            segment=rng.choice([64, 128, 256, 4096]),
            degree=rng.choice([ranks, ranks, ranks, 2]),
            moves=MOVES[(0, 0, 1, 2, 3)[seed % 5]],
            caching=rng.random() < 0.6,
            priorities=rng.random() < 0.2,
            chunk=rng.choice([0, 0, 40]),
            reserve=rng.choice([0, 0, 4]),
            parallel=rng.random() < 0.7,
        )

    def config(self, vllm_config: Any, asynchronous: bool) -> Any:
        config = copy(vllm_config)
        for part in ("scheduler_config", "cache_config", "parallel_config"):
            setattr(config, part, copy(getattr(vllm_config, part)))
        scheduler, cache = config.scheduler_config, config.cache_config
        scheduler.async_scheduling = asynchronous
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = self.max_reqs, self.budget
        scheduler.long_prefill_token_threshold = self.chunk
        scheduler.policy = "priority" if self.priorities else "fcfs"
        cache.num_gpu_blocks, cache.block_size = self.blocks + 1, self.block_size
        cache.enable_prefix_caching = self.caching
        moves = self.moves | {"reserve_blocks": self.reserve} if isinstance(self.moves, dict) else self.moves
        settings = dict(ranks=self.ranks, segment_size=self.segment, max_degree=self.degree, moves=moves)
        settings["parallel_prefill"] = self.parallel
        settings["scheduler_processes"] = loopback.in_use
        config.additional_config = {"nanocp": settings}
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        return config

    def scheduler(self, vllm_config: Any, asynchronous: bool) -> NanoCPScheduler:
        config = self.config(vllm_config, asynchronous)
        spec = FullAttentionSpec(block_size=self.block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        return NanoCPScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=self.blocks + 1, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=self.block_size,
            hash_block_size=self.block_size,
            log_stats=self.seed % 2 == 0,
        )


@dataclass
class Ask:
    """A request, when it comes, and when its client leaves (if before its end)."""

    request: Request
    truth: Truth
    comes: int
    leaves: int | None


def no_adapter() -> LoRARequest | None:
    return None


def salt_of(shape: Shape, number: int, adapter: LoRARequest | None) -> int:
    """Requests share prefixes if they may share any and have the same adapter."""
    if not shape.caching:
        return 1 + number
    return 0 if adapter is None else adapter.lora_int_id


def draw_asks(
    rng: random.Random, shape: Shape, draw_adapter: Callable[[], LoRARequest | None] = no_adapter
) -> list[Ask]:
    hasher = get_request_block_hasher(shape.block_size, sha256) if shape.caching else None
    asks: list[Ask] = []
    now = 0
    rank_tokens = shape.blocks * shape.block_size
    for number in range(rng.randint(10, 40)):
        now += rng.choice([0, 0, 0, 1, 5, 20])
        whole = rng.random() < 0.1  # on one rank: with prompt logprobs it cannot be sharded
        most = rank_tokens if whole else int(rank_tokens * shape.degree * 0.8)
        outputs = rng.choice([1, rng.randint(2, 20), rng.randint(20, 120), rng.randint(50, 250)])
        length = rng.choice([rng.randint(1, 40), rng.randint(1, 40), rng.randint(20, 150), rng.randint(1, most)])
        length = max(1, min(length, most - outputs))
        prompt = [10 + rng.randrange(200) for _ in range(length)]
        if asks and rng.random() < 0.4:  # what another has asked for, and perhaps what it was answered
            other = rng.choice(asks).truth
            stem = other.tokens[: rng.choice([other.num_prompt, len(other.tokens) - 1])]
            prompt[: length - 1] = [token for token in stem[: length - 1] if token != STOP]
            prompt = prompt[:length] if len(prompt) >= length else prompt
        stops = rng.random() < 0.3
        adapter = draw_adapter()
        truth = Truth(number, prompt, outputs, salt_of(shape, number, adapter), stops=stops)
        truth.seeded = rng.random() < 0.3
        params = SamplingParams(
            temperature=0.9 if truth.seeded else 0.0,
            seed=number if truth.seeded or number % 3 == 0 else None,  # which means nothing to a greedy request
            max_tokens=outputs + (rng.choice([1, 50]) if stops else 0),
            stop_token_ids=[STOP],
            prompt_logprobs=1 if whole else None,
        )
        request = Request(
            f"r{number}",
            prompt,
            params,
            None,
            arrival_time=float(number),
            priority=rng.randrange(3) if shape.priorities else 0,
            lora_request=adapter,
            block_hasher=hasher,
        )
        if number % 5 == 0:  # its client wishes for a rank
            prefer_rank(request, number // 5 % shape.ranks)
        asks.append(Ask(request, truth, now, now + rng.randint(0, 80) if rng.random() < 0.15 else None))
    return with_siblings(asks, random.Random(shape.seed), hasher, shape)


def with_siblings(asks: list[Ask], rng: random.Random, hasher: Any, shape: Shape) -> list[Ask]:
    """Some ask for several answers, each of which is a request."""
    many = list(asks)
    for ask in asks:
        for _ in range(rng.choice([1, 3]) if rng.random() < 0.15 else 0):
            number, first, outputs = len(many), ask.request, ask.truth.outputs
            prompt = ask.truth.tokens[: ask.truth.num_prompt]
            salt = salt_of(shape, number, first.lora_request)
            twin = Truth(number, prompt, len(outputs), salt, stops=outputs[-1] == STOP)
            twin.seeded = ask.truth.seeded
            request = Request(
                f"r{number}",
                prompt,
                first.sampling_params,
                None,
                arrival_time=first.arrival_time,
                priority=first.priority,
                lora_request=first.lora_request,
                block_hasher=hasher,
            )
            many.append(Ask(request, twin, ask.comes, None))
    return sorted(many, key=lambda ask: ask.comes)
