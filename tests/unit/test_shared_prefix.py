# SPDX-License-Identifier: Apache-2.0
"""Prefixes that several requests share while the first of them is still computed.

Tokens computed, blocks held and steps to the first token, next to vLLM's own scheduler of one rank with as large a
cache; and that nobody waits for ever.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
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

from vllm_nanocp.placement.queue import STARTING_S, STARTS

from . import rank_insides
from .scheduler_world import Device, Truth
from .world_shapes import Shape
from .world_shapes import vllm_config as vllm_config  # the fixture

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
    """32 requests, each of which shares so much with one that came not long before."""
    rng = random.Random(seed)
    prompts = [words(rng, rng.randint(300, 2000))]
    comes = [1]
    while len(prompts) < 32:
        stem = rng.choice(prompts[-4:])
        length = rng.randint(20, 2000)
        prompts.append((stem[: rng.randint(0, len(stem))] + words(rng, length))[:length])
        comes.append(comes[-1] + rng.choice([0, 0, 0, 1, 2]))
    return Load(prompts, comes)


LOADS: dict[str, Callable[[], Load]] = {"siblings": siblings, "burst": burst, "stream": stream}


def requests_of(load: Load) -> tuple[list[Request], dict[str, Truth]]:
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(temperature=0.0, max_tokens=load.outputs, ignore_eos=True)
    requests = [
        Request(f"r{i}", list(prompt), params, None, arrival_time=float(i), block_hasher=hasher)
        for i, prompt in enumerate(load.prompts)
    ]
    truths = {
        request.request_id: Truth(i, load.prompts[i], load.outputs, salt=0, stops=False)
        for i, request in enumerate(requests)
    }
    return requests, truths


def other(name: str, length: int, outputs: int = 5) -> Request:
    """A request that shares nothing."""
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, words(random.Random(name), length), params, None, arrival_time=99.0, block_hasher=hasher)


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
    while coming or scheduler.has_requests() or scheduler.pause_state != PauseState.UNPAUSED:
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


def stock(engine_config: Any, sizes: Shape, load: Load) -> Result:
    """vLLM's scheduler of one rank that has all ranks' blocks."""
    config = sizes.config(engine_config, False)
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
    engine_config: Any, sizes: Shape, load: Load, during: Callable[[Any, int, list[Request]], None] | None = None
) -> Result:
    scheduler = sizes.scheduler(engine_config, False)
    devices: list[Device] = []

    def execute(output: Any, truths: dict[str, Truth]) -> Any:
        if not devices:
            devices.append(Device(truths, sizes.ranks, sizes.blocks + 1, BLOCK, sizes.max_reqs, sizes.degree, 1, False))
        return devices[0].execute(output)

    each = None if during is None else lambda step, requests: during(scheduler, step, requests)
    result = drive(scheduler, load, execute, lambda: sizes.blocks * sizes.ranks - sum(scheduler.free_blocks()), each)
    assert scheduler.free_blocks() == [sizes.blocks] * sizes.ranks
    assert not scheduler.unplaced and not scheduler.rank_of
    assert not scheduler.members.leftovers() and not scheduler.prefixes.leftovers()
    return result


@pytest.fixture
def config(vllm_config: Any) -> Any:
    return vllm_config


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": dict(),
    "one after another": dict(parallel=False),
    "whole chunks": dict(parallel={"chunk_tokens": CHUNK}),
    "moves": dict(moves=True),
    "short": dict(segment=4096),
    "short, moves": dict(segment=4096, moves=True),
    "two of four": dict(ranks=4, blocks=200, moves=True),
    "full": dict(blocks=70),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", LOADS)
def test_shared_prefixes_are_computed_once(config: Any, name: str, settings: str) -> None:
    load, sizes = LOADS[name](), shape(**SETTINGS[settings])
    mine, theirs = ours(config, sizes, load), stock(config, sizes, load)
    assert mine.computed <= 1.1 * theirs.computed
    assert mine.answers == theirs.answers
    if load.comes[-1] == 1:
        assert mine.peak <= 1.1 * theirs.peak
        # A prompt's ranks take turns without ``parallel_prefill``, each of which is a step. With chunks of half a step
        # one of six that wait for the same prompt may be a step later.
        halves = name == "siblings" and settings in ("sharded", "moves", "two of four", "full")
        late = 1.5 if settings == "one after another" else 1 / 6 + 0.01 if halves else 0.1
        assert mean(mine.first) <= mean(theirs.first) + late
    else:
        assert mean(mine.first) <= mean(theirs.first)


@pytest.mark.parametrize("settings", ["sharded", "moves"])
def test_the_end_of_a_prompt_leaves_the_cache_before_its_beginning(config: Any, settings: str) -> None:
    """A prompt's KV stays cached but for what another one took, and is found again from its first token on."""
    first = words(random.Random(5), 1500)
    load = Load([first, words(random.Random(6), 2800), first], [1, 40, 80], outputs=2)
    sizes = shape(**SETTINGS[settings], blocks=60)
    mine, theirs = ours(config, sizes, load), stock(config, sizes, load)
    every = sum(len(prompt) + load.outputs - 1 for prompt in load.prompts)
    assert theirs.computed < every - 900
    assert mine.computed <= theirs.computed + 2 * sizes.ranks * BLOCK


def test_who_has_waited_in_vain_may_wait_for_another(config: Any) -> None:
    """Of five that wait for one which has no turn for long, each begins as one of the others does."""
    load, sizes = stream(41), shape(moves=True)
    mine, theirs = ours(config, sizes, load), stock(config, sizes, load)
    assert mine.computed <= 1.1 * theirs.computed and mine.answers == theirs.answers


def fan_out(scheduler: Any) -> None:
    """Six requests that share 1,400 tokens, the first placed and computing, the others set aside for it."""
    requests, _ = requests_of(burst())
    for request in requests:
        scheduler.add_request(request)
    scheduler.schedule()
    assert list(scheduler.sharded) == ["r0"] and len(scheduler.unplaced) == 5 and not scheduler.waiting


def test_others_overtake_those_set_aside(config: Any) -> None:
    scheduler = shape().scheduler(config, False)
    fan_out(scheduler)
    scheduler.add_request(other("other", 300))
    scheduler.schedule()
    assert "other" in scheduler.sharded and "other" not in scheduler.unplaced


def test_those_set_aside_do_not_count_as_started(config: Any) -> None:
    """More of them than may start in a step, and as many behind them as may."""
    scheduler = shape(blocks=4 * BLOCKS, segment=1024, max_reqs=2 * STARTS).scheduler(config, False)
    scheduler.admission.clock = itertools.count(step=STARTING_S).__next__
    rng = random.Random(2)
    stem = words(rng, 1400)
    requests, _ = requests_of(Load([stem + words(rng, 40) for _ in range(STARTS + 6)], [1] * (STARTS + 6)))
    for request in [*requests, *(other(f"other {i}", 40) for i in range(STARTS))]:
        scheduler.add_request(request)
    scheduler.schedule()
    # The leader, and all others but one.
    assert len(scheduler.rank_of) + len(scheduler.sharded) == STARTS
    assert len(scheduler.prefixes._followed) == STARTS + 5
    assert [request.request_id for request in scheduler.waiting] == [f"other {STARTS - 1}"]


def test_nobody_takes_the_room_of_those_set_aside(config: Any) -> None:
    """One that comes later and would fit now waits, since the five that came before it would not fit then."""
    scheduler = shape(blocks=40).scheduler(config, False)
    fan_out(scheduler)
    late = other("late", 500)
    assert sum(scheduler.free_blocks()) > late.num_tokens // BLOCK + 2
    scheduler.add_request(late)
    while scheduler.unplaced.keys() != {"late"}:
        assert "late" in scheduler.unplaced
        scheduler.schedule()
    assert {f"r{i}" for i in range(6)} <= scheduler.sharded.keys()


@pytest.mark.parametrize("what", ["abort", "reset"])
def test_followers_of_one_that_goes_begin_anew(config: Any, what: str) -> None:
    """The next one leads, and finds what the first has computed, if that is still there."""
    scheduler = shape().scheduler(config, False)
    fan_out(scheduler)
    kept = scheduler.sharded["r0"].num_computed_tokens
    assert 0 < kept < 1400
    if what == "abort":
        scheduler.finish_requests("r0", RequestStatus.FINISHED_ABORTED)
    else:
        assert scheduler.reset_prefix_cache(reset_running_requests=True)
        kept = 0
    left = ["r1", "r2", "r3", "r4", "r5"] if what == "abort" else ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert [request.request_id for request in scheduler.waiting] == left
    output = scheduler.schedule()
    assert list(scheduler.sharded) == left[:1] and list(scheduler.unplaced) == left[1:]
    assert scheduler.sharded[left[0]].num_computed_tokens == kept + output.total_num_scheduled_tokens


def test_a_follower_that_is_aborted_is_forgotten(config: Any) -> None:
    scheduler = shape().scheduler(config, False)
    fan_out(scheduler)
    for number in range(1, 6):
        (ended,) = scheduler.finish_requests(f"r{number}", RequestStatus.FINISHED_ABORTED)
        assert ended.request_id == f"r{number}"
    assert not scheduler.unplaced and not scheduler.prefixes._followed
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not scheduler.prefixes.leftovers()
    assert scheduler.free_blocks() == [BLOCKS, BLOCKS]


def test_nobody_waits_for_one_that_waits_for_room(config: Any) -> None:
    """Two short requests of one prompt wait each at a full rank, so that they begin wherever there is room first: there
    the other one, and the third, which waits in the queue, go, too."""
    scheduler = shape(segment=4096, blocks=60).scheduler(config, False)
    for name in ("x", "y"):
        scheduler.add_request(other(name, 1500, 200))
    for _ in range(4):
        scheduler.schedule()
    assert [len(rank_insides.running(rank)) for rank in scheduler.ranks] == [1, 1]
    requests, _ = requests_of(Load([words(random.Random(5), 800)] * 3, [1] * 3))
    for request in requests:
        scheduler.add_request(request)
    scheduler.schedule()
    assert scheduler.rank_of["r0"] != scheduler.rank_of["r1"] and list(scheduler.unplaced) == ["r2"]
    scheduler.finish_requests("y", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        scheduler.schedule()
    there = scheduler.ranks[scheduler.rank_of["r2"]]
    assert {"r0", "r1", "r2"} == set(rank_insides.running(there)) and "x" not in rank_insides.known(there)


def test_patience_ends(config: Any) -> None:
    """A leader that gets nothing, while a rank has tokens to give, is waited for as long as computing would take."""
    scheduler = shape(parallel=False).scheduler(config, False)
    fan_out(scheduler)
    idle = [SimpleNamespace(tokens=0)] * 2
    busy = [SimpleNamespace(tokens=CHUNK)] * 2
    scheduler.prefixes.observe(busy, True)  # it has come on since it was placed
    for _ in range(-(-1400 // CHUNK)):
        scheduler.prefixes.observe(busy, True)
        scheduler.prefixes.observe(idle, True)
        assert not scheduler.waiting
    scheduler.prefixes.observe(idle, True)
    assert [r.request_id for r in scheduler.waiting] == ["r1", "r2", "r3", "r4", "r5"]
    scheduler.schedule()
    # The next one computes the prefix anew, and the others wait for that one: not each of them computes it.
    assert list(scheduler.sharded) == ["r0", "r1"] and list(scheduler.unplaced) == ["r2", "r3", "r4", "r5"]
    prefixes = scheduler.prefixes
    assert {leader.request.request_id for leader in prefixes._followed.values()} == {"r1"}
    # Whoever of the two goes, what the other computes is known still.
    scheduler.finish_requests("r1", RequestStatus.FINISHED_ABORTED)
    scheduler.schedule()
    assert list(scheduler.sharded) == ["r0", "r2"]
    scheduler.finish_requests("r0", RequestStatus.FINISHED_ABORTED)
    assert {leader.request.request_id for leader in prefixes._followed.values()} == {"r2"}
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not prefixes.leftovers()


@pytest.mark.parametrize("seed", range(12))
def test_nobody_waits_for_ever(config: Any, seed: int) -> None:
    """Bursts on shared prefixes while leaders are aborted, preempted, reset and paused, on caches that are full."""
    rng = random.Random(seed)
    sizes = shape(
        ranks=rng.choice([2, 3]),
        blocks=rng.choice([70, 120]),
        segment=rng.choice([256, 1024]),
        moves=rng.choice([False, True]),
        parallel=rng.random() < 0.7,
        priorities=rng.random() < 0.3,
        chunk=rng.choice([0, 200]),
        degree=rng.choice([2, 3]) if seed % 2 else 2,
    )
    sizes = replace(sizes, degree=min(sizes.degree, sizes.ranks))
    load = stream(seed)
    load.comes = [1 + step // 3 for step in load.comes]
    gone: set[str] = set()

    def disturb(scheduler: Any, step: int, requests: list[Request]) -> None:
        if rng.random() < 0.08:
            leaders = list(scheduler.prefixes._leaders)
            names = [*leaders, *scheduler.unplaced]
            if names:
                name = rng.choice(names)
                gone.add(name)
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.04:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if rng.random() < 0.05:
            scheduler.set_pause_state(rng.choice([PauseState.PAUSED_NEW, PauseState.PAUSED_ALL]))
        elif scheduler.pause_state != PauseState.UNPAUSED:
            scheduler.set_pause_state(PauseState.UNPAUSED)

    result = ours(config, sizes, load, disturb)
    for name, answer in result.answers.items():
        assert name in gone or len(answer) == load.outputs, name
