# SPDX-License-Identifier: Apache-2.0
"""Prefixes that several requests share while the first of them is still computed: tokens computed, blocks held and steps
to the first token, next to vLLM's own scheduler of one rank with as large a cache; and that nobody waits for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from .scheduler_world import Device, Truth
from .test_scheduler_world import Shape, vllm_config  # noqa: F401

BLOCK, BLOCKS, CHUNK = 32, 400, 512
LIMIT = 3000  # steps


def shape(**other: Any) -> Shape:
    values: dict[str, Any] = dict(
        seed=0,
        ranks=2,
        block_size=BLOCK,
        blocks=BLOCKS,
        max_reqs=32,
        budget=CHUNK,
        segment=256,
        degree=2,
        moves=False,
        caching=True,
        priorities=False,
        chunk=0,
        reserve=0,
        parallel=True,
    )
    return Shape(**{**values, **other})


@dataclass
class Load:
    """Prompts, the steps before which they come, and how many tokens each asks for."""

    prompts: list[list[int]]
    comes: list[int]
    outputs: int = 20


@dataclass
class Result:
    """What a load took.

    Attributes:
        computed: tokens.
        peak: KV blocks that requests held, all ranks together.
        first: steps from each request's coming to its first token.
        answers: tokens of each.
    """

    computed: int = 0
    peak: int = 0
    first: list[int] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)


def words(rng: random.Random, length: int) -> list[int]:
    return [10 + rng.randrange(200) for _ in range(length)]


def siblings() -> Load:
    """A request with n = 6."""
    return Load([words(random.Random(1), 1500)] * 6, [1] * 6)


def burst() -> Load:
    """Six requests that share 1,400 tokens and go on for 100, each its own way."""
    rng = random.Random(2)
    stem = words(rng, 1400)
    return Load([stem + words(rng, 100) for _ in range(6)], [1] * 6)


def stream(seed: int = 3) -> Load:
    """32 requests, each of which shares so much with an earlier one."""
    rng = random.Random(seed)
    prompts = [words(rng, rng.randint(300, 2000))]
    comes = [1]
    while len(prompts) < 32:
        stem = rng.choice(prompts)
        length = rng.randint(20, 2000)
        prompts.append((stem[: rng.randint(0, len(stem))] + words(rng, length))[:length])
        comes.append(comes[-1] + rng.choice([0, 0, 1, 1, 2, 6]))
    return Load(prompts, comes)


LOADS: dict[str, Callable[[], Load]] = {"siblings": siblings, "burst": burst, "stream": stream}


def requests_of(load: Load) -> tuple[list[Request], dict[str, Truth]]:
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(temperature=0.0, max_tokens=load.outputs, ignore_eos=True)
    requests = [
        Request(f"r{i}", list(prompt), params, None, arrival_time=float(i), block_hasher=hasher)
        for i, prompt in enumerate(load.prompts)
    ]
    truths = {r.request_id: Truth(i, load.prompts[i], load.outputs, salt=0, stops=False) for i, r in enumerate(requests)}
    return requests, truths


def drive(
    scheduler: Any,
    load: Load,
    execute: Callable[[Any, dict[str, Truth]], Any],
    held: Callable[[], int],
    during: Callable[[int, list[Request]], None] | None = None,
) -> Result:
    requests, truths = requests_of(load)
    result = Result(first=[0] * len(requests), answers={r.request_id: [] for r in requests})
    coming = dict(enumerate(requests))
    step = 0
    while coming or scheduler.has_requests():
        step += 1
        assert step < LIMIT, "somebody waits for ever"
        for number in [n for n in coming if load.comes[n] <= step]:
            scheduler.add_request(coming.pop(number))
        if during is not None:
            during(step, requests)
        output = scheduler.schedule()
        result.computed += output.total_num_scheduled_tokens
        result.peak = max(result.peak, held())
        for outputs in scheduler.update_from_output(output, execute(output, truths)).values():
            for answer in outputs.outputs:
                number = int(answer.request_id[1:])
                result.first[number] = result.first[number] or step - load.comes[number] + 1
                result.answers[answer.request_id] += answer.new_token_ids
    for name, answer in result.answers.items():
        assert answer == truths[name].outputs[: len(answer)], name
    return result


def stock(vllm_config: Any, sizes: Shape, load: Load) -> Result:
    """vLLM's scheduler of one rank that has all ranks' blocks."""
    config = sizes.config(vllm_config, False)
    config.additional_config = {}
    num_blocks = sizes.blocks * sizes.ranks + 1
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )

    def execute(output: Any, truths: dict[str, Truth]) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        tokens = []
        for name in ids:
            request = scheduler.requests[name]
            done = request.num_computed_tokens >= request.num_tokens
            tokens.append([truths[name].token(request.num_tokens)] if done else [])
        return ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)

    pool = scheduler.kv_cache_manager.block_pool
    return drive(scheduler, load, execute, lambda: num_blocks - 1 - pool.get_num_free_blocks())


def ours(
    vllm_config: Any, sizes: Shape, load: Load, during: Callable[[Any, int, list[Request]], None] | None = None
) -> Result:
    scheduler = sizes.scheduler(vllm_config, False)
    devices: list[Device] = []

    def execute(output: Any, truths: dict[str, Truth]) -> Any:
        if not devices:
            devices.append(
                Device(truths, sizes.ranks, sizes.blocks + 1, BLOCK, sizes.max_reqs, sizes.degree, 1, False)
            )
        return devices[0].execute(output)

    each = None if during is None else lambda step, requests: during(scheduler, step, requests)
    result = drive(scheduler, load, execute, lambda: sizes.blocks * sizes.ranks - sum(scheduler.free_blocks()), each)
    assert scheduler.free_blocks() == [sizes.blocks] * sizes.ranks
    assert not scheduler.unplaced and not scheduler.rank_of and not any(scheduler.members.leftovers())
    return result
