# SPDX-License-Identifier: Apache-2.0
"""Full caches: whoever is cheapest to compute again is preempted, and restarts from what other ranks still hold."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_nanocp.placement.victims import Victim, victims
from vllm_nanocp.sched.rank.victims import VictimDoors

from . import loopback
from .scheduler_world import Truth
from .test_no_endless_wait import Ranks
from .world_shapes import MOVES, vllm_config  # noqa: F401

RUNNING = st.lists(st.builds(Victim, st.integers(1, 10**6), st.integers(0, 50), st.integers(0, 3)), max_size=8)


@given(RUNNING, st.integers(1, 100))
def test_at_most_twice_the_least_cost(running: list[Victim], short: int) -> None:
    chosen = victims(running, short)
    assert len(set(chosen)) == len(chosen)
    sets = [s for n in range(len(running) + 1) for s in combinations(range(len(running)), n)]
    costs = [sum(running[i].cost for i in s) for s in sets if sum(running[i].frees for i in s) >= short]
    if costs:
        assert sum(running[i].frees for i in chosen) >= short
        assert sum(running[i].cost for i in chosen) <= 2 * min(costs) * (1 + 1e-9)
    else:
        assert sorted(chosen) == [i for i, victim in enumerate(running) if victim.frees]


def test_a_long_one_stays() -> None:
    assert victims([Victim(400_000, 25_000), Victim(500, 32)], 1) == [1]
    assert victims([Victim(400_000, 25_000), Victim(500, 32)], 1000) == [0]
    assert victims([Victim(400_000, 6_000), *[Victim(500, 32)] * 9], 100) == [9, 8, 7, 6]
    assert victims([Victim(900, 32, preemptions=1), Victim(1000, 32)], 1) == [1], "another one's turn"


def test_of_many_each_is_looked_at_a_few_times() -> None:
    looks: Counter[str] = Counter()

    class Looked:
        def __init__(self, cost: float) -> None:
            self._cost = cost

        @property
        def cost(self) -> float:
            looks["cost"] += 1
            return self._cost

        @property
        def frees(self) -> int:
            looks["frees"] += 1
            return 100

    running: Any = [Looked(1000.0 + i) for i in range(1024)]
    assert len(victims(running, 30_000)) == 300
    assert looks.total() < 16 * len(running), looks


LENGTHS = {"a": 40, "b": 40, "c": 50, "d": 50, "e": 40, "f": 40, "g": 280, "h": 280}
OUTPUTS = 70


def stock(vllm_config: Any, config: Any) -> Counter[str]:  # noqa: F811
    """What vLLM's own schedulers make of it, each with half of the requests."""
    import torch

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    counts: Counter[str] = Counter()
    for number in (0, 1):
        config.additional_config = {}
        cache = KVCacheConfig(num_blocks=31, kv_cache_tensors=[], kv_cache_groups=groups)
        scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=16,
            hash_block_size=16,
            log_stats=False,
        )
        for name in list(LENGTHS)[number::2]:
            params = SamplingParams(max_tokens=OUTPUTS, ignore_eos=True)
            scheduler.add_request(Request(name, [10 + ord(name)] * LENGTHS[name], params, None))
        while scheduler.has_requests():
            output = scheduler.schedule()
            counts["preemptions"] += len(output.preempted_req_ids or ())
            counts["computed"] += output.total_num_scheduled_tokens
            ids = list(output.num_scheduled_tokens)
            full = [scheduler.requests[i].num_computed_tokens >= scheduler.requests[i].num_tokens for i in ids]
            answers = ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, [[7] if f else [] for f in full])
            scheduler.update_from_output(output, answers)
    return counts


def served(vllm_config: Any) -> Counter[str]:  # noqa: F811
    ranks = Ranks(vllm_config, degree=1)
    for name, length in LENGTHS.items():
        ranks.add(name, length, OUTPUTS)
    ranks.run()
    assert ranks.tokens == dict.fromkeys(LENGTHS, OUTPUTS)
    scheduler = ranks.scheduler
    return Counter(computed=scheduler.num_tokens, preemptions=scheduler.num_preemptions)


@pytest.mark.parametrize("apart", [False, True])
def test_full_caches_compute_less_again(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """Two ranks of 30 blocks, on each of which three short requests and then a long one begin, and grow. More are
    preempted, of which all together are less to compute than the long one."""
    loopback.use(monkeypatch, apart)
    found = served(vllm_config)
    stocks = stock(vllm_config, Ranks(vllm_config, degree=1).shape.config(vllm_config, False))
    with monkeypatch.context() as context:
        context.setattr(VictimDoors, "choose_victims", lambda _: None)
        youngest = served(vllm_config)
    needed = sum(LENGTHS.values()) + len(LENGTHS) * (OUTPUTS - 1)
    again, without = found["computed"] - needed, youngest["computed"] - needed
    assert 0 < again < 0.7 * without, (found, youngest, stocks)
    assert again < 0.7 * (stocks["computed"] - needed), (found, youngest, stocks)


@pytest.mark.parametrize("running", [["young", "old"], ["second", "young", "old"], ["old", "young"]])
def test_the_oldest_stays_wherever_it_is(running: list[str]) -> None:
    """One that was preempted runs behind others when it has come back: it would be the first to go again."""
    blocks = {name: [SimpleNamespace(ref_cnt=1, is_null=False)] * 4 for name in running}
    arrival = {"old": 0.0, "second": 1.0, "young": 2.0}
    scheduler: Any = SimpleNamespace(
        running=[
            SimpleNamespace(request_id=name, arrival_time=arrival[name], num_computed_tokens=60, num_preemptions=0)
            for name in running
        ],
        policy=SchedulingPolicy.FCFS,
        num_free_blocks=0,
        max_num_scheduled_tokens=64,
        block_size=16,
        spare_blocks=-1,
        held_blocks=blocks,
    )
    scheduler._victim = lambda request: VictimDoors._victim(scheduler, request)
    VictimDoors.choose_victims(scheduler)
    assert sorted(one.request_id for one in scheduler.running) == sorted(running)
    assert scheduler.running[0].request_id == "old"


@pytest.mark.parametrize("apart", [False, True])
def test_a_long_one_restarts_from_its_other_shards(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """Its shard at the other rank is not computed again."""
    loopback.use(monkeypatch, apart)
    init_none_hash(sha256)
    ranks = Ranks(vllm_config, caching=True, segment=160, moves=MOVES[0] | {"max_moves": 0}, blocks=60)
    hasher = get_request_block_hasher(16, sha256)

    def add(name: str, length: int, outputs: int) -> Request:
        number = len(ranks.truths)
        truth = Truth(number, [10 + number] * length, outputs, salt=0, stops=False)
        ranks.truths[name] = truth
        params = SamplingParams(max_tokens=outputs)
        request = Request(name, list(truth.tokens[:length]), params, None, block_hasher=hasher)
        ranks.scheduler.add_request(request)
        return request

    request = add("long", 320, 40)
    while request.num_output_tokens < 20:
        ranks.step()
    scheduler = ranks.scheduler
    sharded = scheduler.sharded["long"]
    held = sharded.shard_map.tokens_by_rank(2, request.num_tokens)
    home = sharded.shard_map.home
    scheduler.ranks[home].preempt_running()
    scheduler._settle()
    before = scheduler.num_tokens
    while request.num_output_tokens < 22:
        ranks.step()
    again = scheduler.num_tokens - before
    assert again <= held[home] + 8, (again, held)
    ranks.run()
    assert ranks.tokens["long"] == 40
