# SPDX-License-Identifier: Apache-2.0
"""``--prefill-schedule-interval``: the same steps start prompts as with vLLM's engines, one a rank."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import DPEngineCoreProc
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_nanocp.sched.cadence import PrefillCadence

from . import rank_insides
from .scheduler_world import Device, Truth, payloads
from .world_shapes import Shape, vllm_config  # noqa: F401
from .worlds import InMode, World, in_mode  # noqa: F401

RANKS = 2
# Prompt and output tokens, by the step in which they come: while others decode, and after all have ended.
LOAD = {
    0: [(40, 12), (20, 30)],
    1: [(64, 9), (30, 5)],
    7: [(200, 6)],
    11: [(16, 3), (50, 8), (70, 20)],
    60: [(33, 14)],
    62: [(90, 4), (10, 10)],
}
STEPS = 110
Steps = list[list[dict[str, int]]]


def shape(**changes: Any) -> Shape:
    """With a size of chunks that is set, prompts share no step: it is about when they start."""
    sizes: dict[str, Any] = dict(
        seed=0, ranks=RANKS, block_size=16, blocks=200, max_reqs=16, budget=64, segment=4096, degree=1, moves=False,
        caching=False, priorities=False, chunk=64, reserve=0,
    )  # fmt: skip
    return Shape(**{**sizes, **changes})


def requests(step: int) -> list[Request]:
    return [
        Request(
            f"{step}.{n}", [10 + n] * prompt, SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True), None
        )
        for n, (prompt, out) in enumerate(LOAD.get(step, ()))
    ]


def with_interval(config: Any, interval: int) -> Any:
    config = copy(config)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.prefill_schedule_interval = interval
    return config


def steps_here(config: Any, interval: int) -> tuple[Steps, dict[str, int]]:
    """Scheduled tokens by step, rank and request; and each request's rank."""
    sizes = shape()
    scheduler = sizes.scheduler(with_interval(config, interval), False)
    truths: dict[str, Truth] = {}
    device = Device(truths, RANKS, sizes.blocks + 1, sizes.block_size, sizes.max_reqs, 1, 1, False)
    ranks: dict[str, int] = {}
    steps: Steps = []
    for step in range(STEPS):
        for request in requests(step):
            truth = Truth(len(truths), list(request.prompt_token_ids or ()), request.max_tokens, salt=1, stops=False)
            truths[request.request_id] = truth
            scheduler.add_request(request)
        seen: list[dict[str, int]] = [{} for _ in range(RANKS)]
        if scheduler.has_requests():
            output = scheduler.schedule()
            ranks.update(scheduler.rank_of)
            seen = [dict(part.num_scheduled_tokens) for part in payloads(output)]
            scheduler.update_from_output(output, device.execute(output))
        steps.append(seen)
    assert not scheduler.has_requests() and rank_insides.known(scheduler.ranks[0]) == {}
    return steps, ranks


class StockRank:
    """One of vLLM's engines, as far as its scheduler sees it."""

    def __init__(self, config: Any, kv_cache_config: Any) -> None:
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=config.cache_config.block_size,
            hash_block_size=config.cache_config.block_size,
        )

    def step(self, throttle: bool) -> dict[str, int]:
        if not self.scheduler.has_requests():
            return {}
        output = self.scheduler.schedule(throttle)
        ids = list(output.num_scheduled_tokens)
        done = [self.scheduler.requests[i].num_computed_tokens >= self.scheduler.requests[i].num_tokens for i in ids]
        tokens = [[20] if all_computed else [] for all_computed in done]
        answer = ModelRunnerOutput(ids, {name: at for at, name in enumerate(ids)}, tokens)
        self.scheduler.update_from_output(output, answer)
        return dict(output.num_scheduled_tokens)


def steps_of_stock(config: Any, interval: int, ranks: dict[str, int]) -> Steps:
    """The same with vLLM's schedulers, which have the requests that each rank had, and vLLM's rule."""
    sizes = shape()
    config = sizes.config(with_interval(config, interval), False)
    kv_cache_config = sizes.scheduler(config, False).kv_cache_config
    # Where vLLM's engines do not keep the cadence together, its schedulers do from 0.33 on, each for itself.
    config.parallel_config = copy(config.parallel_config)
    config.parallel_config.data_parallel_size = RANKS
    stock = [StockRank(config, kv_cache_config) for _ in range(RANKS)]
    engine = SimpleNamespace(prefill_schedule_interval=interval, step_counter=0)
    steps: Steps = []
    for step in range(STEPS):
        for request in requests(step):
            stock[ranks[request.request_id]].scheduler.add_request(request)
        if not any(rank.scheduler.has_requests() for rank in stock):
            steps.append([{} for _ in stock])
            continue
        throttle = DPEngineCoreProc._should_throttle_prefills(engine)  # type: ignore[arg-type]
        steps.append([rank.step(throttle) for rank in stock])
        engine.step_counter += 1
        if not any(rank.scheduler.has_unfinished_requests() for rank in stock):
            engine.step_counter = 0
    return steps


@pytest.mark.parametrize("interval", [1, 2, 5, 8])
def test_prompts_start_when_they_do_in_stock(vllm_config: Any, interval: int) -> None:  # noqa: F811
    here, ranks = steps_here(vllm_config, interval)
    assert here == steps_of_stock(vllm_config, interval, ranks)
    assert len(set(ranks.values())) == RANKS
    deferred = steps_here(vllm_config, 1)[0] != here
    assert deferred == (interval > 1), "else this load does not tell one interval from another"


class IntervalWorld(World):
    """Each with an interval of its own."""

    def __init__(self, vllm_config: Any, seed: int, *args: Any) -> None:  # noqa: F811
        super().__init__(vllm_config, seed, *args)
        self.scheduler.cadence = self.cadence = PrefillCadence(2 + seed % 7)

    def check_nothing_left(self) -> None:
        super().check_nothing_left()
        assert self.cadence.steps == 0


def test_nothing_is_lost(in_mode: InMode) -> None:  # noqa: F811
    """Sharded prompts, moves, aborts and preemptions go on beside steps that start no prompts."""
    counts = in_mode.run(IntervalWorld, 6)
    assert counts["rows"], "no request was sharded"


def test_aborts_end_a_count(vllm_config: Any) -> None:  # noqa: F811
    scheduler = shape().scheduler(with_interval(vllm_config, 4), False)
    assert scheduler.cadence is not None
    scheduler.add_request(requests(0)[0])
    scheduler.schedule()
    assert scheduler.cadence.steps == 1
    scheduler.finish_requests("0.0", RequestStatus.FINISHED_ABORTED)
    scheduler.schedule()
    assert scheduler.cadence.steps == 0


def test_without_an_interval_nothing_is_counted(vllm_config: Any) -> None:  # noqa: F811
    assert shape().scheduler(vllm_config, False).cadence is None


def test_the_work_of_a_gpu_is_estimated_for_all_ranks(vllm_config: Any) -> None:  # noqa: F811
    """vLLM's figures of ``--enable-mfu-metrics`` divide the experts by the data-parallel size."""
    for rank in shape(ranks=3).scheduler(vllm_config, False).ranks:
        assert rank_insides.scheduler_of(rank).vllm_config.parallel_config.data_parallel_size == 3
    assert vllm_config.parallel_config.data_parallel_size == 1


def backlog() -> list[Request]:
    return [
        Request(
            f"r{i}",
            [10 + i] * 30,
            SamplingParams(temperature=0.0, max_tokens=10 + i * 37 % 100, ignore_eos=True),
            None,
            arrival_time=float(i),
        )
        for i in range(60)
    ]


@pytest.mark.parametrize("interval", [1, 8, 32])
def test_a_backlog_is_served_as_fast_as_in_stock(vllm_config: Any, interval: int) -> None:  # noqa: F811
    """More requests wait than may run: slots that come free are taken at once, whatever the interval."""
    sizes = shape(max_reqs=4, budget=256)
    config = sizes.config(with_interval(vllm_config, interval), False)
    scheduler = sizes.scheduler(with_interval(vllm_config, interval), False)
    truths: dict[str, Truth] = {}
    device = Device(truths, RANKS, sizes.blocks + 1, sizes.block_size, sizes.max_reqs, 1, 1, False)
    ranks: dict[str, int] = {}
    for request in backlog():
        truth = Truth(len(truths), list(request.prompt_token_ids or ()), request.max_tokens, salt=1, stops=False)
        truths[request.request_id] = truth
        scheduler.add_request(request)
    here = 0
    while scheduler.has_requests():
        output = scheduler.schedule()
        ranks.update(scheduler.rank_of)
        scheduler.update_from_output(output, device.execute(output))
        here += 1
    stock = [StockRank(config, scheduler.kv_cache_config) for _ in range(RANKS)]
    engine: Any = SimpleNamespace(prefill_schedule_interval=interval, step_counter=0)
    for request in backlog():
        stock[ranks[request.request_id]].scheduler.add_request(request)
    there = 0
    while any(rank.scheduler.has_requests() for rank in stock):
        throttle = DPEngineCoreProc._should_throttle_prefills(engine)
        for rank in stock:
            rank.step(throttle)
        engine.step_counter += 1
        there += 1
    assert here <= there + 3, (here, there)
