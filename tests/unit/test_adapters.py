# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters at the scheduler: no rank ever runs more than ``max_loras`` at once, whatever moves, and nobody waits
for ever."""

from __future__ import annotations

import os
from copy import copy
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_nanocp.sched.step_output import NanoCPSchedulerOutput

from . import loopback
from .scheduler_world import Device, Session, Truth, WorldError, base, payloads
from .test_sessions import SessionWorld
from .world_shapes import Shape, vllm_config  # noqa: F401
from .worlds import InMode, in_mode  # noqa: F401

WORLDS = int(os.environ.get("NANOCP_ADAPTER_WORLDS", "12"))


def adapter(number: int) -> LoRARequest:
    return LoRARequest(f"adapter-{number}", number, f"adapter-{number}")


def with_adapters(vllm_config: Any, most: int) -> Any:  # noqa: F811
    config = copy(vllm_config)
    config.lora_config = LoRAConfig(max_loras=most, max_lora_rank=8, max_cpu_loras=8)
    return config


class AdapterWorld(SessionWorld):
    """Most requests and sessions have an adapter; there are more of those than a rank may have active."""

    def __init__(self, vllm_config: Any, seed: int, *args: Any) -> None:  # noqa: F811
        self.most = 1 + seed % 3
        super().__init__(with_adapters(vllm_config, self.most), seed, *args)
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output

        def checked(*args: Any) -> NanoCPSchedulerOutput:
            output = schedule(*args)
            for rank, part in enumerate(payloads(output)):
                self.check(rank, {base(name) for name in part.num_scheduled_tokens})
            return output

        def counted(*args: Any) -> dict[int, EngineCoreOutputs]:
            outputs = update(*args)
            for answer in (answer for part in outputs.values() for answer in part.outputs):
                adapter, stats = self.asks[answer.request_id].request.lora_request, answer.prefill_stats
                self.counts["prefixes"] += adapter is not None and stats is not None and stats.num_cached_tokens > 0
            return outputs

        self.scheduler.schedule = checked  # type: ignore[method-assign]
        self.scheduler.update_from_output = counted  # type: ignore[method-assign]

    def check(self, rank: int, names: set[str]) -> None:
        requests = (self.asks[name].request for name in names)
        active = {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}
        self.counts["full ranks"] += len(active) == self.most
        if len(active) > self.most:
            raise WorldError(f"rank {rank} runs the adapters {active}, and may run {self.most}")

    def draw_adapter(self) -> LoRARequest | None:
        number = self.rng.randrange(self.most + 3)
        return adapter(number) if number else None


def test_worlds(in_mode: InMode) -> None:  # noqa: F811
    counts = in_mode.run(AdapterWorld, WORLDS)
    assert counts["moves"] + counts["spills"] > 10 and counts["full ranks"] > 100, counts
    assert counts["prefixes"] > 5, counts


def test_requests_behind_one_that_waits_for_its_adapter_go_on(vllm_config: Any) -> None:  # noqa: F811
    """As in vLLM's scheduler: there is room, and no slot for the first one's adapter."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=8, budget=512, segment=4096, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    shape = Shape(**sizes, **rest)  # type: ignore[arg-type]
    scheduler = shape.scheduler(with_adapters(vllm_config, 1), False)
    truths = {name: Truth(i, [10 + i] * 40, 20, 1 + i, stops=False) for i, name in enumerate("abcde")}
    device = Device(dict(truths), 2, 41, 16, 8, 2, 1, False)
    adapters = {"a": adapter(1), "b": adapter(2), "c": adapter(3), "d": adapter(1), "e": None}
    for name, truth in truths.items():
        params = SamplingParams(max_tokens=20)
        scheduler.add_request(Request(name, truth.tokens[:40], params, None, lora_request=adapters[name]))
    ended: list[str] = []
    for _ in range(100):
        output = scheduler.schedule()
        if scheduler.num_steps == 1:
            names = sorted(name for part in payloads(output) for name in part.num_scheduled_tokens)
            assert names == ["a", "b", "d", "e"]
        for outputs in scheduler.update_from_output(output, device.execute(output)).values():
            ended += [answer.request_id for answer in outputs.outputs if answer.finish_reason is not None]
    assert sorted(ended[:4]) == ["a", "b", "d", "e"] and ended[4:] == ["c"]


def test_who_ends_while_it_waits_for_a_slot_is_forgotten(vllm_config: Any) -> None:  # noqa: F811
    """Also that it has waited in vain for one that computed its prefix."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=8, budget=512, segment=4096, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    scheduler = Shape(**sizes, **rest).scheduler(with_adapters(vllm_config, 1), False)  # type: ignore[arg-type]
    for name, number in (("a", 1), ("b", 2), ("c", 3)):
        params = SamplingParams(max_tokens=20)
        scheduler.add_request(Request(name, [10 + number] * 40, params, None, lora_request=adapter(number)))
    scheduler.prefixes._impatient["c"] = ["one before"]
    scheduler.schedule()
    assert scheduler.admission._slot_of.keys() == {"c"}
    scheduler.finish_requests("c", RequestStatus.FINISHED_ABORTED)
    assert not scheduler.admission.leftovers() and "c" not in scheduler.prefixes.leftovers()


@pytest.mark.parametrize("away", ["coming", "leaving"])
def test_requests_between_ranks_keep_their_slot(vllm_config: Any, away: str) -> None:  # noqa: F811
    """A session that goes on would else start beside them, and its rank then run one adapter too many."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=8, budget=512, segment=4096, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    scheduler = Shape(**sizes, **rest).scheduler(with_adapters(vllm_config, 1), False)  # type: ignore[arg-type]
    turns = [Truth(0, [10] * 20, 1, 1, stops=False), Truth(0, [10] * 40, 1, 1, stops=False)]
    truths: dict[str, Any] = {"s": Session(turns), "a": Truth(1, [11] * 20, 40, 2, stops=False)}
    device = Device(truths, 2, 41, 16, 8, 2, 1, False)

    def step() -> list[str]:
        output = scheduler.schedule()
        scheduler.update_from_output(output, device.execute(output))
        return sorted(name for part in payloads(output) for name in part.num_scheduled_tokens)

    def chunk() -> Request:
        return Request("s", [10] * 20, SamplingParams(max_tokens=1), None, lora_request=adapter(1), resumable=True)

    scheduler.add_request(chunk())
    assert step() == ["s"]
    rank = scheduler.ranks[scheduler.rank_of["s"]]
    moving = Request("a", [11] * 20, SamplingParams(max_tokens=40), None, lora_request=adapter(2))
    if away == "coming":
        rank.expect("a", 2)
    else:
        scheduler.rank_of["a"] = scheduler.rank_of["s"]
        scheduler.requests["a"] = moving
        rank.enter(moving)
        assert step() == ["a"]
        rank.leave("a")
    scheduler.add_request(chunk())
    assert step() == []
    if away == "coming":
        rank.expect_no_more("a")
        assert step() == ["s"]
    else:
        rank.stay("a")
        assert step() == ["a"]


@pytest.mark.parametrize("apart", [False, True])
def test_who_waits_for_the_slot_of_one_that_does_not_come_starts(
    vllm_config: Any,  # noqa: F811
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind messages the slot is known to be free a step later: only the rank knows whether others there have it."""
    loopback.use(monkeypatch, apart)
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=8, budget=512, segment=4096, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    scheduler = Shape(**sizes, **rest).scheduler(with_adapters(vllm_config, 1), False)  # type: ignore[arg-type]
    device = Device({"a": Truth(1, [11] * 20, 4, 2, stops=False)}, 2, 41, 16, 8, 2, 1, False)

    def step() -> list[str]:
        output = scheduler.schedule()
        scheduler.update_from_output(output, device.execute(output))
        return sorted(name for part in payloads(output) for name in part.num_scheduled_tokens)

    for rank in scheduler.ranks:
        rank.expect("coming", 2)
    scheduler.add_request(Request("a", [11] * 20, SamplingParams(max_tokens=4), None, lora_request=adapter(1)))
    assert [step(), step()] == [[], []]
    scheduler.ranks[1].expect_no_more("coming")
    ran = [step(), step()]
    assert ran == ([[], ["a"]] if apart else [["a"], ["a"]])


def test_behind_messages_more_adapters_may_be_known_but_no_fewer(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fewer one would start there that finds no slot."""
    loopback.use(monkeypatch)
    world = AdapterWorld(vllm_config, 1, 1, False)
    for _, request in world.arrivals()[:8]:
        world.scheduler.add_request(request)
    world.scheduler.schedule()
    world.check_loads()
    rank = next(rank for rank in world.scheduler.ranks if rank.view.adapters)
    right = rank.view.adapters
    rank.view.adapters = right | {99}
    rank.on_change()
    world.check_loads()
    rank.view.adapters = frozenset(list(right)[1:])
    rank.on_change()
    with pytest.raises(WorldError, match="at its near end: adapters is kept as"):
        world.check_loads()
    world.scheduler.shutdown()
