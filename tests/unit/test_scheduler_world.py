# SPDX-License-Identifier: Apache-2.0
"""The scheduler over ranks that exist only for it: random loads, aborts, resets and pauses, in every mode.

vLLM schedules asynchronously on GPUs only, and its V2 model runner runs there only. Here both are exercised without
any: ``scheduler_world`` keeps what the workers would, and finds every KV entry that is stale, missing or another's.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.sched.rank.rank_view import RankView
from vllm_nanocp.sched.scheduler import NanoCPScheduler

from . import loopback, rank_insides
from .world_runners import WorldError
from .world_shapes import MODES, Shape, vllm_config
from .worlds import InMode, World, in_mode, run_worlds  # noqa: F401

__all__ = ["MODES", "Shape", "World", "vllm_config"]

# Worlds of each mode; more of them look further, as does another seed of the first one (``NANOCP_FIRST_WORLD``). With
# ``NANOCP_WORLD_PROCESSES=1`` each rank's scheduler is in a process of its own, in all tests of worlds: about a second
# for each on two cores, so pytest's ``--timeout`` must allow for many.
WORLDS = int(os.environ.get("NANOCP_WORLDS", "20"))


def test_worlds(in_mode: InMode) -> None:  # noqa: F811
    counts = in_mode.run(World, WORLDS)
    assert counts["moves"] > WORLDS and counts["spills"] > WORLDS and counts["preemptions"] > 0, counts
    assert min(counts["together"], counts["withheld"], 2 * counts["set_aside"]) > WORLDS, counts
    assert counts["aborts"] and counts["resets"] and counts["pauses"], counts
    assert (counts["generators"] > 0) == (in_mode.version == 1), counts


def test_worlds_in_processes(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes answer when they can, each at its own time: no order between ranks is right by chance."""
    counts: Counter[str] = Counter()
    for version in (1, 2):
        counts += run_worlds(World, vllm_config, version, True, 2, monkeypatch, processes=True)
    assert counts["moves"] and counts["spills"] and counts["preemptions"] and counts["together"], counts


@pytest.mark.parametrize("apart", [False, True])
def test_worlds_find_each_number_that_is_kept_wrong(
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """Also where both ends of a rank behind messages agree on it."""
    loopback.use(monkeypatch, apart)
    world = World(vllm_config, 1, 1, False)
    for _, request in world.arrivals()[:8]:
        world.scheduler.add_request(request)
    world.scheduler.schedule()
    world.check_loads()
    rank = world.scheduler.ranks[-1]
    scheduler = rank_insides.scheduler_of(rank)
    right = scheduler.view
    for name in (field.name for field in fields(RankView)):
        value = getattr(right, name)
        wrong = frozenset([99]) if name == "adapters" else 7 if value is None else type(value)(not value)
        scheduler._view = replace(right, **{name: wrong})
        if apart:
            rank.refresh()
            scheduler._view = replace(right, **{name: wrong})
        with pytest.raises(WorldError, match=rf": {name} is kept as {re.escape(repr(wrong))}, it is"):
            world.check_loads()
    scheduler._view = right
    world.scheduler.shutdown()


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
            assert sum(len(rank_insides.running(rank)) for rank in scheduler.ranks) == 1
    scheduler.schedule()
    assert [len(rank_insides.known(rank)) for rank in scheduler.ranks] == [8, 8]


@pytest.mark.parametrize(("parallel", "steps"), [(False, 14), (True, 14), ({"chunk_tokens": 1000}, 8)])
def test_ranks_compute_a_prompt_together(vllm_config: Any, parallel: Any, steps: int) -> None:
    """1,792 tokens with budgets of 128: 14 chunks; 28 of half a step, two a step; or 16 that leave 16 tokens of one."""
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


def test_short_prompts_beside_one_that_ranks_compute_together(vllm_config: Any) -> None:
    """They have half of each step, though the long one needs whole chunks, and this one loses nothing."""
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=1200, max_reqs=16, budget=512, segment=4096, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0, parallel=True)
    scheduler = Shape(**sizes, **rest).scheduler(vllm_config, False)  # type: ignore[arg-type]
    long = Request("long", [10] * 16_000, SamplingParams(max_tokens=50), None, arrival_time=0.0)
    scheduler.add_request(long)
    scheduler.schedule()
    short = [Request(f"{i}", [11 + i] * 60, SamplingParams(max_tokens=50), None, arrival_time=1.0) for i in range(16)]
    for request in short:
        scheduler.add_request(request)
    for _ in range(2):
        output = scheduler.schedule()
        chunks = [part.payload.num_scheduled_tokens for part in output.parts]
        assert all(256 in chunk.values() for chunk in chunks) and min(sum(chunk.values()) for chunk in chunks) >= 480
    assert all(request.num_computed_tokens == request.num_tokens for request in short)


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
