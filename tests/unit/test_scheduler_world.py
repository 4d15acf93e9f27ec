# SPDX-License-Identifier: Apache-2.0
"""The scheduler over ranks that exist only for it: random loads, aborts, resets and pauses, in every mode.

vLLM schedules asynchronously on GPUs only, and its V2 model runner runs there only. Here both are exercised without
any: ``scheduler_world`` keeps what the workers would, and finds every KV entry that is stale, missing or another's.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import KVEventBatch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.tiny_models import make_qwen3_moe
from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.rank_hint import prefer_rank
from vllm_nanocp.sched import mover as mover_module
from vllm_nanocp.sched import scheduler as scheduler_module
from vllm_nanocp.sched.scheduler import NanoCPScheduler

from .event_index import Index
from .scheduler_world import GARBAGE, STOP, Device, Truth, WorldError

# Worlds of each mode; more of them look further.
WORLDS = int(os.environ.get("NANOCP_WORLDS", "30"))
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
MAX_STEPS = 4000
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
    segment: int
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


def draw_asks(rng: random.Random, shape: Shape) -> list[Ask]:
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
        truth = Truth(number, prompt, outputs, salt=0 if shape.caching else 1 + number, stops=stops)
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
            block_hasher=hasher,
        )
        if number % 5 == 0:  # its client wishes for a rank
            prefer_rank(request, number // 5 % shape.ranks)
        asks.append(Ask(request, truth, now, now + rng.randint(0, 80) if rng.random() < 0.15 else None))
    return with_siblings(asks, random.Random(shape.seed), hasher, shape.caching)


def with_siblings(asks: list[Ask], rng: random.Random, hasher: Any, caching: bool) -> list[Ask]:
    """Some ask for several answers, each of which is a request."""
    many = list(asks)
    for ask in asks:
        for _ in range(rng.choice([1, 3]) if rng.random() < 0.15 else 0):
            number, first, outputs = len(many), ask.request, ask.truth.outputs
            prompt = ask.truth.tokens[: ask.truth.num_prompt]
            twin = Truth(number, prompt, len(outputs), 0 if caching else 1 + number, stops=outputs[-1] == STOP)
            twin.seeded = ask.truth.seeded
            request = Request(
                f"r{number}",
                prompt,
                first.sampling_params,
                None,
                arrival_time=first.arrival_time,
                priority=first.priority,
                block_hasher=hasher,
            )
            many.append(Ask(request, twin, ask.comes, None))
    return sorted(many, key=lambda ask: ask.comes)


class Events:
    """A router that follows a rank's KV events, each batch as it is published."""

    def __init__(self, number: int, rank: Any, block_size: int) -> None:
        self.rank, self.index = rank, Index(number, block_size)
        rank.kv_event_publisher = self

    def publish(self, batch: KVEventBatch) -> None:
        self.index.follow(batch.events)

    def check(self, requests: Iterable[Request]) -> bool:
        """It knows of each prompt what a request could use on this rank, and of nothing else.

        Returns:
            Whether the rank has blocks that it does not announce.
        """
        self.index.follow(self.rank.kv_cache_manager.take_events())
        usable: set[Any] = set()
        for request in requests:
            has, _ = self.rank.cached_run(request.block_hashes, 0)
            hashes = [maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes[:has]]
            found = self.index.match(list(request.all_token_ids)[: len(request.block_hashes) * self.index.block_size])
            if found != hashes:
                raise WorldError(f"rank {self.index.rank}: {len(found)} blocks of {request.request_id}, it has {has}")
            usable.update(hashes)
        if usable != self.index.nodes.keys():
            raise WorldError(f"rank {self.index.rank}: announces what no request can use")
        return len(self.rank.block_pool.cached_block_hash_to_block) > len(usable)


class World:
    """EngineCore's loop around the scheduler and ranks without work."""

    def __init__(self, vllm_config: Any, seed: int, version: int, asynchronous: bool) -> None:
        self.rng = random.Random(seed)
        self.shape = shape = Shape.draw(self.rng, seed)
        self.scheduler = shape.scheduler(vllm_config, asynchronous)
        self.events = [Events(i, rank, shape.block_size) for i, rank in enumerate(self.scheduler.ranks)]
        self.asks = {ask.request.request_id: ask for ask in self.draw()}
        truths = {name: ask.truth for name, ask in self.asks.items()}
        self.device = Device(
            truths, shape.ranks, shape.blocks + 1, shape.block_size, shape.max_reqs, shape.degree, version, asynchronous
        )
        self.depth = 2 if asynchronous else 1
        self.flying: deque[tuple[Any, Any]] = deque()
        self.answers: dict[str, list[int]] = {name: [] for name in self.asks}
        self.ended: set[str] = set()
        self.now = 0
        self.counts: Counter[str] = Counter()
        self.clock = 0.0

    def draw(self) -> list[Ask]:
        return draw_asks(self.rng, self.shape)

    def arrivals(self) -> list[tuple[int, Request]]:
        """What comes, and when, in this order."""
        return [(ask.comes, ask.request) for ask in self.asks.values()]

    def monotonic(self) -> float:
        """The scheduler's clock: a step takes what the dice say, so that worlds are the same each time."""
        return self.clock

    def run(self) -> Counter[str]:
        coming = deque(self.arrivals())
        paused_until = 0
        while coming or self.flying or self.scheduler.has_requests() or paused_until:
            self.now += 1
            if self.now > MAX_STEPS:
                self.starved()
            while coming and coming[0][0] <= self.now:
                self.arrive(coming.popleft()[1])
            paused_until = self.pause(paused_until)
            self.reset()
            self.abort(self.rng.random() < 0.5)
            self.step()
            if self.now % 16 == 0:
                self.check_events()
        self.check_nothing_left()
        self.check_events()
        scheduler, device = self.scheduler, self.device
        self.counts += Counter(
            steps=scheduler.num_steps,
            moves=scheduler.mover.num_moves,
            spills=scheduler.mover.num_spills,
            preemptions=scheduler.num_preemptions,
            set_aside=scheduler.prefixes.num_set_aside,
            rows=device.num_rows,
            together=device.num_together,
            arrivals=device.num_arrivals,
            generators=device.num_generators,
        )
        return self.counts

    # -- what happens ------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def step(self) -> None:
        """As ``EngineCore.step`` and ``step_with_batch_queue`` do."""
        self.clock += self.rng.uniform(0.004, 0.01)
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.flying.append((output, self.device.execute(output)))
            executed = output.total_num_scheduled_tokens > 0
            if len(self.flying) < self.depth and (executed or self.scheduler.has_requests()):
                return
        elif not self.flying:
            return
        output, answers = self.flying.popleft()
        self.abort(self.rng.random() < 0.5)
        for outputs in self.scheduler.update_from_output(output, answers).values():
            for answer in outputs.outputs:
                self.take(answer.request_id, answer.new_token_ids, answer.finish_reason)

    def take(self, name: str, tokens: list[int], finish: FinishReason | None) -> None:
        if name not in self.asks or name in self.ended:
            raise WorldError(f"{name} has no client, but is answered {tokens}")
        wanted, answer = self.asks[name].truth.outputs, self.answers[name]
        answer += tokens
        if answer != wanted[: len(answer)] or GARBAGE in answer:
            raise WorldError(f"{name} is answered {answer} instead of {wanted}")
        if finish is not None:
            self.ended.add(name)
            if len(answer) != len(wanted):
                raise WorldError(f"{name} ends after {len(answer)} of {len(wanted)} tokens")

    def abort(self, now: bool) -> None:
        for name, ask in self.asks.items():
            if now and ask.leaves is not None and ask.comes <= ask.leaves <= self.now and name not in self.ended:
                ended = self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                if [request.request_id for request in ended] != [name]:
                    raise WorldError(f"{name} was to be aborted, but {ended} were")
                self.ended.add(name)
                self.counts["aborts"] += 1

    def reset(self) -> None:
        if self.rng.random() >= 0.02:
            return
        running = self.rng.random() < 0.5
        done = self.scheduler.reset_prefix_cache(reset_running_requests=running)
        self.counts["resets"] += 1
        if running and not done:
            raise WorldError("a reset with running requests did not free all blocks")
        if done:
            self.device.wipe()

    def pause(self, until: int) -> int:
        """Pause, or go on when it is time to."""
        if until:
            if self.now >= until:
                self.scheduler.set_pause_state(PauseState.UNPAUSED)
                return 0
        elif self.rng.random() < 0.01:
            self.counts["pauses"] += 1
            self.scheduler.set_pause_state(self.rng.choice([PauseState.PAUSED_ALL, PauseState.PAUSED_NEW]))
            return self.now + self.rng.randint(1, 30)
        return until

    # -- the end -----------------------------------------------------------------------------------------------

    def check_events(self) -> None:
        for events in self.events:
            self.counts["withheld"] += events.check(ask.request for ask in self.asks.values())

    def starved(self) -> None:
        waiting = [name for name in self.asks if name not in self.ended]
        raise WorldError(f"after {self.now} steps {waiting} have not ended: {self.scheduler.get_request_counts()}")

    def check_nothing_left(self) -> None:
        scheduler, mover = self.scheduler, self.scheduler.mover
        missing = self.asks.keys() - self.ended
        if missing:
            raise WorldError(f"{missing} never ended")
        assert not scheduler.has_unfinished_requests() and scheduler.get_request_counts() == (0, 0)
        assert scheduler.free_blocks() == [self.shape.blocks] * self.shape.ranks
        left = {
            "members": scheduler.members.leftovers(),
            "prefixes": scheduler.prefixes.leftovers(),
            "admission": scheduler.admission.leftovers(),
            "unplaced": scheduler.unplaced,
            "failures": scheduler.failures.leftovers(),
            "waiting": list(scheduler.waiting),
            "rank_of": scheduler.rank_of,
            "_preempted": scheduler._preempted,
            "leaving": mover.leaving,
            "_states": mover._states,
            "_last_move": mover._last_move,
            "_undone": mover._undone,
        }
        for i, rank in enumerate(scheduler.ranks):
            manager = rank.kv_cache_manager.coordinator.single_type_managers[0]
            left[f"rank {i}"] = [
                *rank._strangers,
                *rank.requests,
                *rank.running,
                *manager.req_to_blocks,
                *manager.num_cached_block,
                *rank.deferred_waiting,
                *rank._inflight_prefills,
                *rank._leaving,
                *rank._coming,
                *rank.outgrown,
                *rank._to_share,
            ]
        found = {name: value for name, value in left.items() if value} | self.device.leftovers()
        if found:
            raise WorldError(f"left over: {found}")


@pytest.mark.parametrize(("version", "asynchronous"), MODES, ids=["v1", "v1-async", "v2", "v2-async"])
def test_worlds(
    vllm_config: Any,
    version: int,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "vllm")
    # The platform has no V2 runner; the schedulers ask for nothing but this.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(version - 1))
    counts: Counter[str] = Counter()
    for seed in range(WORLDS):
        world = World(vllm_config, seed, version, asynchronous)
        for module in (scheduler_module, mover_module):
            monkeypatch.setattr(module, "time", world)
        try:
            counts += world.run()
        except Exception as error:
            raise AssertionError(f"world {seed}, step {world.now}, {world.shape}: {error!r}") from error
    print(dict(counts))
    assert counts["moves"] > 25 and counts["spills"] > 25 and counts["preemptions"] > 0, counts
    assert min(counts[kind] for kind in ("together", "withheld", "set_aside")) > 25, counts
    assert counts["aborts"] and counts["resets"] and counts["pauses"], counts
    assert (counts["generators"] > 0) == (version == 1), counts


@pytest.mark.parametrize("moves", [False, True])
def test_a_burst_spreads(vllm_config: Any, moves: bool) -> None:
    """Requests that come at once behind one that runs, so that none of them reads any KV when the next is placed."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=400, max_reqs=24, budget=512, segment=4096, degree=2)
    shape = Shape(**sizes, moves=moves, caching=False, priorities=False, chunk=0, reserve=0)  # type: ignore[arg-type]
    scheduler = shape.scheduler(vllm_config, False)
    for number in range(16):
        prompt = [10 + number] * 300
        scheduler.add_request(Request(f"r{number}", prompt, SamplingParams(max_tokens=50), None))
        if number == 0:
            scheduler.schedule()
            assert sum(len(rank.running) for rank in scheduler.ranks) == 1
    scheduler.schedule()
    assert [len(rank.requests) for rank in scheduler.ranks] == [8, 8]


@pytest.mark.parametrize(("parallel", "steps"), [(False, 14), (True, 8)])
def test_ranks_compute_a_prompt_together(vllm_config: Any, parallel: bool, steps: int) -> None:
    """1,792 tokens with budgets of 128: 14 chunks; or 16 smaller ones, two a step."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=200, max_reqs=8, budget=128, segment=1024, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0, parallel=parallel)
    scheduler = Shape(**sizes, **rest).scheduler(vllm_config, False)  # type: ignore[arg-type]
    request = Request("r", [10] * (16 * 112), SamplingParams(max_tokens=50), None)
    scheduler.add_request(request)
    while request.num_computed_tokens < request.num_tokens:
        scheduler.schedule()
    assert scheduler.num_steps == steps
    assert scheduler.sharded["r"].shard_map.tokens_by_rank(2, request.num_tokens) == [896, 896]
    scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert scheduler.free_blocks() == [200, 200]


@pytest.mark.parametrize("degree", [1, 2])
def test_a_model_without_kv(vllm_config: Any, degree: int) -> None:
    """No request could be placed."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=200, max_reqs=8, budget=128, segment=1024, degree=degree)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    config = Shape(**sizes, **rest).config(vllm_config, False)  # type: ignore[arg-type]
    with pytest.raises(NanoCPConfigError, match="nanocp: a model that keeps no KV"):
        NanoCPScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=16,
            hash_block_size=16,
        )
