# SPDX-License-Identifier: Apache-2.0
"""Real engines for tests: an ``AsyncLLM`` on an event loop of its own, and requests that run concurrently on it."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_nanocp import status

BLOCK = 32
CHUNK = 512
# Settings of ``moves`` with which homes move and ranks spill whenever they can.
RESTLESS: dict[str, Any] = dict(
    batch_margin=0.0,
    kv_margin=0.0,
    min_steps_between=0,
    min_remaining_tokens=1,
    spare_blocks=0,
    growth_blocks=1,
    weigh_exchange=False,
)
# Seconds for all requests of a call together, and for an engine to start.
LIMIT_S = float(os.environ.get("ENGINE_LIMIT_S", "240"))
START_LIMIT_S = 240.0


@dataclass
class Ask:
    """One request: when it comes, when its client leaves (None: never), the rank that it wishes for, its LoRA adapter,
    and what is given instead of its prompt."""

    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    leave_after: int | None = None
    priority: int = 0
    rank: int | None = None
    adapter: LoRARequest | None = None
    embeddings: torch.Tensor | None = None

    def sampling_params(self) -> SamplingParams:
        defaults: dict[str, Any] = dict(temperature=0.0, max_tokens=16, ignore_eos=True)
        return SamplingParams(**{**defaults, **self.params}, output_kind=RequestOutputKind.CUMULATIVE)


@dataclass
class Answer:
    """What a client saw: per choice the tokens, text and top logprobs; and the prompt's logprobs."""

    tokens: list[list[int]]
    text: list[str]
    logprobs: list[Any]
    prompt_logprobs: Any
    finish: list[str | None]
    num_updates: int
    cached: int = 0
    sent: float = 0.0  # when, by time.monotonic
    first: float = 0.0  # when its first token came
    ended: float = 0.0


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids, the same for the same arguments; special tokens left out."""
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


class Engine:
    """A running engine. ``close`` it."""

    def __init__(self, model: str, ranks: int, nanocp: dict[str, Any] | None = None, **args: Any) -> None:
        self.ranks = ranks
        defaults: dict[str, Any] = dict(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=8192,
            max_num_seqs=32,
            max_num_batched_tokens=CHUNK,
            block_size=BLOCK,
            gpu_memory_utilization=0.3,
            enable_prefix_caching=False,
            num_gpu_blocks_override=2048,
        )
        if ranks > 1:
            defaults |= dict(
                enable_expert_parallel=True, additional_config={"nanocp": {"ranks": ranks, **(nanocp or {})}}
            )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._serial = 0
        self.llm: AsyncLLM = self.call(self._start(AsyncEngineArgs(**{**defaults, **args})), START_LIMIT_S)
        self.free_at_start = self.free_blocks() if ranks > 1 else []

    @staticmethod
    async def _start(args: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(args)

    def call(self, what: Coroutine[Any, Any, Any], limit: float = LIMIT_S) -> Any:
        """Run a coroutine on the engine's loop, within a time limit."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(what, limit), self._loop).result(limit + 5)

    def ask(
        self, asks: Sequence[Ask], during: Callable[[Engine], Coroutine[Any, Any, None]] | None = None
    ) -> list[Answer]:
        """Run requests concurrently, with something else beside them if given; answers in the order of the asks."""
        answers: list[Answer] = self.call(self._ask_all(asks, during))
        return answers

    async def _ask_all(self, asks: Sequence[Ask], during: Any) -> list[Answer]:
        jobs = [self._ask(ask) for ask in asks]
        if during is not None:
            jobs.append(during(self))
        return list(await asyncio.gather(*jobs))[: len(asks)]

    async def _ask(self, ask: Ask) -> Answer:
        await asyncio.sleep(ask.delay)
        self._serial += 1
        sent, first = time.monotonic(), 0.0
        last: RequestOutput | None = None
        choices: dict[int, CompletionOutput] = {}
        updates = 0
        given: Any = {"prompt_token_ids": ask.prompt}
        stream = self.llm.generate(
            given if ask.embeddings is None else {"prompt_embeds": ask.embeddings},
            ask.sampling_params(),
            f"ask-{self._serial}",
            lora_request=ask.adapter,
            priority=ask.priority,
            data_parallel_rank=ask.rank if self.ranks > 1 else None,
        )
        async for last in stream:
            updates += 1
            first = first or time.monotonic()
            choices.update({output.index: output for output in last.outputs})
            if ask.leave_after is not None and len(last.outputs[0].token_ids) >= ask.leave_after:
                break
        await stream.aclose()
        if last is None:
            return Answer([], [], [], None, [], 0)
        outputs = [choices[index] for index in sorted(choices)]
        return Answer(
            [list(o.token_ids) for o in outputs],
            [o.text for o in outputs],
            [o.logprobs for o in outputs],
            last.prompt_logprobs,
            [o.finish_reason for o in outputs],
            updates,
            last.num_cached_tokens or 0,
            sent,
            first,
            time.monotonic(),
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call(status.of_async_llm(self.llm))
        return found

    def free_blocks(self) -> list[int]:
        return list(self.status()["free_blocks"])

    def check_nothing_left(self) -> None:
        """All blocks free, nobody waiting or running, no shard remembered."""
        for _ in range(100):
            found = self.status()
            if found["free_blocks"] == self.free_at_start and not any(found["running"] + found["waiting"]):
                break
            self.call(asyncio.sleep(0.05))
        assert found["free_blocks"] == self.free_at_start
        assert found["running"] == found["waiting"] == [0] * self.ranks
        assert not found["sharded"] and not found["unplaced"]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.llm.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)


def assert_same_logprobs(ours: Any, stocks: Any, tolerance: float) -> None:
    """Top logprobs of each position agree on the candidates of stock's list that ours has, and on nearly all."""
    assert len(ours) == len(stocks)
    for mine, theirs in zip(ours, stocks, strict=True):
        common = set(mine) & set(theirs)
        # Candidates may trade the last place when they are within rounding of each other.
        assert len(common) >= len(theirs) - 1
        for token in common:
            assert abs(mine[token].logprob - theirs[token].logprob) <= tolerance
