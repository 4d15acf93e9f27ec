# SPDX-License-Identifier: Apache-2.0
"""A rank's step that prompts share, beside requests that cannot have their part: nothing of it is lost, and what vLLM's
scheduler takes for granted of those that run stays true."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_nanocp.placement import RankLoad
from vllm_nanocp.plan import keeper_id
from vllm_nanocp.sched.rank.rank_scheduler import RankScheduler

from .test_adapters import adapter, with_adapters
from .world_shapes import Shape, vllm_config  # noqa: F401

BUDGET = 512


class Turns:
    """One rank's scheduler, to which requests come at once; nothing is computed."""

    def __init__(self, config: Any, **sizes: Any) -> None:
        base = dict(seed=0, ranks=2, block_size=16, blocks=800, max_reqs=8, budget=BUDGET, segment=16384, degree=2)
        base |= dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
        scheduler = Shape(**{**base, **sizes}).scheduler(config, False)  # type: ignore[arg-type]
        rank = scheduler.ranks[0]
        assert isinstance(rank, RankScheduler)
        self.rank = rank
        self.count = 0

    def add(self, name: str, length: int, computed: int = 0, lora: int = 0, blocks: int = 0, **more: Any) -> Request:
        """A request comes after all others; with ``computed`` tokens in ``blocks`` of its own, if it has begun."""
        self.count += 1
        request = Request(
            name,
            [10 + self.count] * length,
            SamplingParams(max_tokens=5),
            None,
            arrival_time=more.pop("at", float(self.count)),
            lora_request=adapter(lora) if lora else None,
            **more,
        )
        if computed:
            request.num_computed_tokens = computed
            self.rank.adopt_cached(name, [])
            self.rank.allocate(name, blocks or -(-length // 16))
        self.rank.enter(request)
        return request

    def step(self, throttle_prefills: bool = False) -> dict[str, int]:
        output: SchedulerOutput = self.rank.schedule(throttle_prefills)
        return dict(output.num_scheduled_tokens)


def test_one_that_waits_for_a_slot_takes_nothing(vllm_config: Any) -> None:  # noqa: F811
    """It has begun elsewhere, and came first; those that run have all slots, and would wait for it as it for them."""
    turns = Turns(vllm_config, max_reqs=2)
    for name in ("one", "two"):
        turns.add(keeper_id(name, 0, 0), 3000)
    turns.step()
    while len(turns.rank.running) < 2:
        turns.step()
    turns.add("first", 900, computed=64, at=0.0)
    for _ in range(3):
        chunks = turns.step()
        assert sum(chunks.values()) == BUDGET and "first" not in chunks


def test_one_that_waits_for_blocks_takes_nothing(vllm_config: Any) -> None:  # noqa: F811
    """A session's next chunk, for which there is no room."""
    turns = Turns(vllm_config, blocks=150)
    for name in ("one", "two"):
        turns.add(keeper_id(name, 0, 0), 1800)
    turns.step()
    turns.add("first", 2400, computed=64, blocks=4, at=0.0)
    for _ in range(2):
        assert turns.step() == {keeper_id("one", 0, 0): BUDGET}


def test_what_is_lost_for_whatever_reason_is_lost_once(vllm_config: Any) -> None:  # noqa: F811
    """One that vLLM's scheduler passes over, of which nothing is known here."""
    turns = Turns(vllm_config)
    for name in ("one", "two"):
        turns.add(keeper_id(name, 0, 0), 3000)
    while len(turns.rank.running) < 2:
        turns.step()
    turns.add("first", 900, computed=64, at=0.0).num_stale_output_tokens = 1
    assert [sum(turns.step().values()) for _ in range(4)] == [0, BUDGET, 0, BUDGET]


def test_steps_without_prompts_lose_nothing(vllm_config: Any) -> None:  # noqa: F811
    """With ``--prefill-schedule-interval``: the next step is shared as any other."""
    turns = Turns(vllm_config)
    turns.add("decodes", 1)
    turns.add("long", 3000)
    turns.step()
    turns.rank.prefill_capacity_bound = False
    turns.rank.requests["decodes"].append_output_token_ids(5)
    turns.add("short", 60)
    assert turns.step(True) == {"decodes": 1} and turns.step()["short"] == 60


def test_prompts_that_get_nothing_keep_the_slot_of_their_adapter(vllm_config: Any) -> None:  # noqa: F811
    """vLLM's scheduler counts those that it has scheduled; a session would start beside them with another one."""
    turns = Turns(with_adapters(vllm_config, 1))
    rank = turns.rank
    turns.add("long", 3000)
    turns.step()
    turns.add("adapted", 1000, lora=1)
    assert "adapted" in turns.step()
    for number in range(4):
        turns.add(f"short {number}", 128)
        if number == 1:
            turns.add("session", 70, computed=64, lora=2, at=0.0)
        chunks = turns.step()
        assert "adapted" not in chunks and "long" in chunks, "it gets nothing in these steps"
        assert {request.lora_request.lora_int_id for request in rank.running if request.lora_request} == {1}
    turns.step()


def test_ids_with_the_sign_of_members_are_no_members(vllm_config: Any) -> None:  # noqa: F811
    """Clients choose ids."""
    turns = Turns(vllm_config)
    turns.add("long", 3000)
    turns.step()
    turns.add("a#0.1-0f3b", 60)
    assert turns.step() == {"long": BUDGET - 60, "a#0.1-0f3b": 60}


def test_members_that_get_no_whole_chunk_leave_their_part(vllm_config: Any) -> None:  # noqa: F811
    """The step is that of one which came first; what a member would need of it is not kept from short ones."""
    turns = Turns(vllm_config, parallel=True)
    turns.add("long", 3000)
    turns.step()
    turns.add(keeper_id("later", 0, 1), 900, computed=64)
    turns.add("short", 60)
    assert turns.step() == {"long": BUDGET - 60, "short": 60}


def test_prompts_stay_whole_where_they_are_not_to_be_cut(vllm_config: Any) -> None:  # noqa: F811
    """Without chunked prefill a session's chunk waits until all of it fits into a step, as in vLLM."""
    config = copy(vllm_config)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.enable_chunked_prefill = False
    turns = Turns(config)
    turns.add("one", 464, computed=64)
    turns.add("two", 364, computed=64)
    assert [turns.step(), turns.step()] == [{"one": 400}, {"two": 300}]


def test_chunks_with_inputs_of_an_encoder_are_not_cut(vllm_config: Any) -> None:  # noqa: F811
    """These were chosen for them; but one may get nothing."""
    turns = Turns(vllm_config)
    image = MultiModalFeatureSpec(None, "image", "an image", PlaceholderRange(offset=0, length=200))
    request = turns.add("one", 400, mm_features=[image])
    turns.rank.shares = {"one": 100}
    assert turns.rank.cut_chunk(request, 0, 300) == 300
    turns.rank.shares = {"one": 0}
    assert turns.rank.cut_chunk(request, 0, 300) == 0


def test_the_first_has_its_turn_where_decodes_leave_little(vllm_config: Any) -> None:  # noqa: F811
    """No more than a part of a step: else all of it would be for short ones, as long as any come."""
    turns = Turns(vllm_config, budget=16, max_reqs=16)
    for number in range(12):
        turns.add(f"decodes {number}", 1)
    turns.step()
    turns.add("long", 3000)
    turns.step()
    for number in range(2):
        turns.add(f"short {number}", 4)
        assert turns.step()["long"] >= 2


@pytest.mark.parametrize("bounded", [False, True])
def test_a_prompt_keeps_none_behind_it_from_their_tokens(vllm_config: Any, bounded: bool) -> None:  # noqa: F811
    """What has had its first token beside a long prompt runs behind it, and goes on; also where prompts are bounded by
    more than a step."""
    turns = Turns(vllm_config)

    def step() -> dict[str, int]:
        turns.rank.allow((BUDGET, 1e12) if bounded else None)
        return turns.step()

    turns.add("long", 6000)
    step()
    turns.add("short", 60)
    assert step()["short"] == 60
    for _ in range(3):
        turns.rank.requests["short"].append_output_token_ids(5)
        assert step() == {"long": BUDGET - 1, "short": 1}
    turns.add("another", 6000)
    for _ in range(3):
        turns.rank.requests["short"].append_output_token_ids(5)
        assert step()["short"] == 1


def test_adapters_that_wait_have_no_slot_yet() -> None:
    """A session's next chunk waits for its own: others with it must not come from other ranks to run there."""
    load = RankLoad(9, 0, 0, 9, adapters=frozenset({1, 2, 3}), max_adapters=2)
    assert not any(load.takes(adapter) for adapter in (1, 2, 3, 4)) and load.takes(None)
    full = RankLoad(9, 0, 0, 9, adapters=frozenset({1, 2}), max_adapters=2)
    assert full.takes(1) and full.takes(2) and not full.takes(3)
