# SPDX-License-Identifier: Apache-2.0
"""``decode_bench`` next to vLLM's scheduler with its DecodeBenchConnector: who is computed in a full cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_nanocp.config import DECODE_BENCH

from . import rank_insides
from .scheduler_world import payloads
from .test_speculation import with_drafts
from .world_shapes import Shape, vllm_config  # noqa: F401

RANKS, BLOCKS, BUDGET = 2, 30, 64
# Prompt and output tokens: three fill the cache, those behind wait for room, and two that grow do not fit any more.
FILL = [
    (150, 60), (130, 50), (140, 40), (100, 20), (150, 30), (120, 3), (33, 40), (1, 5), (200, 9), (210, 60), (150, 60),
    (130, 50), (140, 40), (100, 20), (120, 3), (33, 40), (1, 5), (190, 9),
]  # fmt: skip
Steps = list[dict[str, int]]


class BenchShape(Shape):
    """With prompts that are taken as computed."""

    def config(self, vllm_config: Any, asynchronous: bool) -> Any:  # noqa: F811
        config = super().config(vllm_config, asynchronous)
        config.additional_config["nanocp"]["decode_bench"] = True
        return config


def shape(**changes: Any) -> BenchShape:
    sizes: dict[str, Any] = dict(
        seed=0, ranks=RANKS, block_size=16, blocks=BLOCKS, max_reqs=8, budget=BUDGET, segment=4096, degree=1,
        moves=False, caching=False, priorities=False, chunk=0, reserve=0,
    )  # fmt: skip
    return BenchShape(**{**sizes, **changes})


def requests(compute: bool = False, fill: Sequence[tuple[int, int]] = FILL) -> list[Request]:
    extra = {"compute_prompt": 1} if compute else None
    return [
        Request(
            f"r{n}",
            [10 + n] * prompt,
            SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, extra_args=extra),
            None,
            arrival_time=float(n),
        )
        for n, (prompt, out) in enumerate(fill)
    ]


def answer(scheduler: Any, output: Any) -> ModelRunnerOutput:
    """A token of each whose tokens are all computed with this step."""
    ids = list(output.num_scheduled_tokens)
    done = [scheduler.requests[i].num_computed_tokens >= scheduler.requests[i].num_tokens for i in ids]
    return ModelRunnerOutput(ids, {name: at for at, name in enumerate(ids)}, [[20] if d else [] for d in done])


def stock_scheduler(config: Any, asynchronous: bool = False) -> Any:
    """vLLM's, with its connector."""
    sizes, kind = shape(), AsyncScheduler if asynchronous else Scheduler
    config = sizes.config(config, asynchronous)
    kv_cache_config = sizes.scheduler(config, asynchronous).kv_cache_config
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="DecodeBenchConnector", kv_role="kv_both", kv_connector_extra_config={"startup_fill": True}
    )
    return kind(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=16,
        hash_block_size=16,
    )


def steps_of_stock(config: Any, ranks: Sequence[Sequence[str]]) -> tuple[list[Steps], int]:
    """Of vLLM's schedulers, each of which has these requests."""
    found, preempted = [], 0
    for names in ranks:
        scheduler = stock_scheduler(config)
        asked = {request.request_id: request for request in requests()}
        for name in names:
            scheduler.add_request(asked[name])
        steps: Steps = []
        while scheduler.has_requests():
            output = scheduler.schedule()
            steps.append(dict(output.num_scheduled_tokens))
            scheduler.update_from_output(output, answer(scheduler, output))
        found.append([step for step in steps if step])
        preempted += sum(request.num_preemptions for request in asked.values())
    return found, preempted


def step(scheduler: Any) -> list[Any]:
    """Run one; what each rank has of it."""
    output = scheduler.schedule()
    known, parts = [rank_insides.scheduler_of(rank) for rank in scheduler.ranks], payloads(output)
    scheduler.update_from_output(output, [answer(rank, part) for rank, part in zip(known, parts, strict=True)])
    return parts


def steps_here(config: Any, compute: bool = False) -> tuple[list[Steps], list[list[str]], int]:
    """Scheduled tokens by rank, step and request; the requests of each rank as they began; and preemptions."""
    scheduler = shape().scheduler(config, False)
    for request in requests(compute):
        scheduler.add_request(request)
    steps: list[Steps] = [[] for _ in range(RANKS)]
    while scheduler.has_requests():
        for mine, part in zip(steps, step(scheduler), strict=True):
            if part.num_scheduled_tokens:
                mine.append(dict(part.num_scheduled_tokens))
    began = [list(dict.fromkeys(name for step in mine for name in step)) for mine in steps]
    return steps, began, scheduler.num_preemptions


@pytest.fixture(autouse=True)
def meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECODE_BENCH, "1")


def computed(steps: Sequence[Steps]) -> tuple[set[str], set[str]]:
    """Requests that were computed when they began, and those that were after they had begun."""
    begun: set[str] = set()
    fresh: set[str] = set()
    again: set[str] = set()
    for name, tokens in (one for mine in steps for step in mine for one in step.items()):
        if tokens > 1:
            (again if name in begun else fresh).add(name)
        begun.add(name)
    assert begun == {f"r{n}" for n in range(len(FILL))}
    return fresh, again


def test_the_same_prompts_are_computed_as_with_the_connector(vllm_config: Any) -> None:  # noqa: F811
    """Those that wait for room never are, those that were preempted are."""
    here, began, preempted = steps_here(vllm_config)
    stock, their = steps_of_stock(vllm_config, began)
    for steps in (stock, here):
        fresh, again = computed(steps)
        assert not fresh and again
    assert preempted and their and sum(len(mine[0]) for mine in here) < len(FILL) - 2, "else this load shows nothing"


def test_a_prompt_that_is_to_be_computed_is(vllm_config: Any) -> None:  # noqa: F811
    steps, _, _ = steps_here(vllm_config, compute=True)
    first: dict[str, int] = {}
    for name, tokens in (one for mine in steps for step in mine for one in step.items()):
        first.setdefault(name, tokens)
    assert all(first[f"r{n}"] > 1 for n, (prompt, _) in enumerate(FILL) if prompt > 1)


def test_what_waits_at_a_rank_is_not_counted_as_work(vllm_config: Any) -> None:  # noqa: F811
    """Else placement would keep others away from it for as long as that prompt would take."""
    scheduler = shape().scheduler(vllm_config, False)
    for request in requests():
        scheduler.add_request(request)
    scheduler.schedule()
    waiting = [rank.view.waiting for rank in scheduler.ranks]
    assert any(waiting)
    for rank in scheduler.ranks:
        assert rank.view.prompt_tokens <= rank.view.waiting and rank.view.load().backlog == 0


@pytest.mark.parametrize("priorities", [False, True])
def test_one_that_has_its_blocks_stays(vllm_config: Any, priorities: bool) -> None:  # noqa: F811
    """It waits since another one is preempted in that step, with priorities a less important one; its blocks would be
    left behind."""
    scheduler = shape(priorities=priorities).scheduler(vllm_config, False)
    *first, waits = requests(fill=[(240, 90), (250, 2), (224, 90), (110, 2), (110, 2), (10, 9)])
    waits.priority = -priorities
    for request in first:
        scheduler.add_request(request)
    step(scheduler)
    scheduler.add_request(waits)
    step(scheduler)
    assert scheduler.num_preemptions and scheduler.requests[waits.request_id].num_computed_tokens == 9
    assert len(scheduler.requests) == 3, "a rank is empty"
    while scheduler.has_requests():
        step(scheduler)
    assert scheduler.free_blocks() == [BLOCKS] * RANKS


DRAFTS = 3


def first_step(config: Any, prompts: Sequence[int], version: int, **changes: Any) -> Any:
    """What a scheduler here does first with requests of such prompts, taken as computed, and drafts."""
    return started(shape(**changes).scheduler(with_drafts(config, DRAFTS), version == 2), prompts)


def started(scheduler: Any, prompts: Sequence[int]) -> Any:
    """A scheduler's first step with such prompts."""
    for request in requests(fill=[(prompt, 9) for prompt in prompts]):
        scheduler.add_request(request)
    return scheduler.schedule()


@pytest.mark.parametrize("version", [1, 2])
def test_a_step_with_requests_that_begin_is_uniform(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    version: int,
) -> None:
    """With drafts V2's runner replays a graph of such a step only if each has as many tokens, so vLLM puts placeholders
    behind the one that is left of each; also where that is of a sharded one, at its home. V1's has no such graphs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(version - 1))
    output = first_step(vllm_config, [40, 33, 50], version)
    assert [batch.queries for batch in output.plan.batches] == [1 + DRAFTS if version == 2 else 1] * RANKS
    if version == 1:
        return
    stock = started(stock_scheduler(with_drafts(vllm_config, DRAFTS), True), [40, 33, 50])
    assert output.num_scheduled_tokens == stock.num_scheduled_tokens == dict.fromkeys(["r0", "r1", "r2"], 1 + DRAFTS)
    assert output.scheduled_spec_decode_tokens == stock.scheduled_spec_decode_tokens
    assert output.plan.batches and not output.plan.rows
    output = first_step(vllm_config, [200, 40], version, segment=128, degree=2)
    (row,) = output.plan.rows
    assert row.num_queries == 1 + DRAFTS and {batch.queries for batch in output.plan.batches} == {1 + DRAFTS}


def test_nobody_waits_for_the_blocks_of_placeholders(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One whose known tokens take all that a rank has begins without; one that leaves a block has it."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    for prompt, tokens in ((16 * BLOCKS - 1, 1), (16 * (BLOCKS - 1) - 1, 1 + DRAFTS)):
        output = first_step(vllm_config, [prompt], 2)
        assert output.num_scheduled_tokens == {"r0": tokens}


def test_placeholders_are_not_cut(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """vLLM ends where something gives one that it pads fewer tokens than that makes."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    output = first_step(vllm_config, [40, 33, 50, 45], 2, chunk=DRAFTS)
    assert output.num_scheduled_tokens == dict.fromkeys(["r0", "r1", "r2", "r3"], 1)


def test_a_grammar_judges_all_that_is_sampled(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """There is no bitmask for what is behind a placeholder."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(Request, "use_structured_output", property(lambda request: request.request_id == "r1"))
    output = first_step(vllm_config, [40, 33], 2)
    assert output.num_scheduled_tokens == {"r0": 1 + DRAFTS, "r1": 1}
