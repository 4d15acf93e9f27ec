# SPDX-License-Identifier: Apache-2.0
"""``segment_size`` "auto": near the best explicit setting, within its bounds whatever the cost model says, and never
more visits than graphs have room for."""

from __future__ import annotations

import math
import random
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_nanocp.placement import RankLoad, place
from vllm_nanocp.placement.auto import AUTO, PRIOR, Bounds, Segments, choose, fixed
from vllm_nanocp.placement.cost import Coefficients, CostModel, StepLoad
from vllm_nanocp.placement.moves import Candidate, MoveConfig, plan_moves, spill_target
from vllm_nanocp.placement.visits import Visits
from vllm_nanocp.sim import nanocp as simulated
from vllm_nanocp.sim.figures import Run, make_world, simulate
from vllm_nanocp.sim.machine import PRESETS
from vllm_nanocp.sim.nanocp import Settings
from vllm_nanocp.sim.trace import Requests

BLOCK = 16
RUN = Run(PRESETS["h200-qwen3-30b-a3b-few-experts"], 4, decode_only=True, noise=0.05)
SECONDS = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1e-300, 1e300, math.inf, math.nan]))


def coefficients() -> st.SearchStrategy[Coefficients]:
    return st.builds(Coefficients, *[SECONDS] * 5, st.just(1.0))


def wrong() -> list[Coefficients]:
    """Each coefficient that is looked at ten times too large, ten times too small, and zero."""
    return [
        replace(PRIOR, **{name: getattr(PRIOR, name) * factor})
        for name in ("kv_token", "guest", "exchange")
        for factor in (10.0, 0.1, 0.0)
    ]


def load(rate: float, seconds: float = 12.0, seed: int = 0, part: float = 0.15) -> Requests:
    """Short requests, and a part of long ones: up to half a million tokens."""
    dice = np.random.default_rng(seed)
    at = np.cumsum(dice.exponential(1 / rate, int(2 * rate * seconds)))
    at = at[at < seconds]
    long = dice.random(len(at)) < part
    prompt = np.where(
        long, dice.lognormal(11.6, 0.7, len(at)).clip(20_000, 500_000), dice.lognormal(9, 1, len(at)).clip(16, 60_000)
    )
    return Requests(at, prompt.astype(np.int64), dice.integers(100, 500, len(at)))


def p99(segment: int | str, requests: Requests, **settings: Any) -> float:
    found: float = simulate(replace(RUN, settings=Settings(segment, **settings)), "nanocp", requests)["tpot_p99"]
    return found


# -- the choice ----------------------------------------------------------------------------------------------------


@given(coefficients(), st.integers(1, 10**8), st.floats(0, 1e9), st.booleans())
def test_no_model_leaves_the_bounds(model: Coefficients, capacity: int, kv_tokens: float, sharded: bool) -> None:
    bounds = Bounds.of(capacity)
    assert 1 <= bounds.least <= max(1, capacity // 16) and 2 * bounds.least <= bounds.most <= max(2, capacity // 8)
    found = choose(model, bounds, kv_tokens, sharded)
    assert bounds.least <= found.size <= bounds.most and found.size <= found.whole <= 2 * bounds.most
    assert found.least == bounds.least
    for tokens in (1, found.whole, found.whole + 1, 2 * bounds.most + 1, capacity):
        segment = found.of(tokens)
        cut = -(-tokens // segment)
        assert tokens / cut >= bounds.least or cut == 1, "a shard would be tiny"
        assert cut > 1 or tokens <= 2 * bounds.most, "too much for one rank"


def test_the_choice_follows_the_model() -> None:
    """Dearer guests make longer shards, dearer KV shorter ones; the first exchange must win more than a further one."""
    bounds = Bounds.of(1_063_000)
    usual = choose(PRIOR, bounds, 300_000, True)
    assert 10_000 < usual.size < 40_000
    assert choose(replace(PRIOR, guest=2 * PRIOR.guest), bounds, 300_000, True).size > usual.size
    assert choose(replace(PRIOR, kv_token=2 * PRIOR.kv_token), bounds, 300_000, True).size < usual.size
    slow = replace(PRIOR, exchange=1.8e-3)
    assert choose(slow, bounds, 300_000, True).whole > usual.whole
    assert choose(slow, bounds, 300_000, False).whole > choose(slow, bounds, 300_000, True).whole
    assert [-(-tokens // fixed(100).of(tokens)) for tokens in (5, 100, 101, 1000)] == [1, 1, 2, 10]


class Ranks:
    """Ranks with requests that come and go, placed by a model."""

    def __init__(self, ranks: int, blocks: int, model: Coefficients) -> None:
        self.blocks, self.model = blocks, model
        self.held: dict[int, list[int]] = {}
        self.homes: dict[int, int] = {}
        self.ranks = ranks
        self.bounds = Bounds.of(blocks * BLOCK)

    def loads(self) -> list[RankLoad]:
        used = [sum(held[rank] for held in self.held.values()) for rank in range(self.ranks)]
        homes = [list(self.homes.values()).count(rank) for rank in range(self.ranks)]
        return [RankLoad(self.blocks - u, u, n, 256 - n) for u, n in zip(used, homes, strict=True)]

    def segments(self) -> Segments:
        mean = sum(load.used_blocks for load in self.loads()) * BLOCK / self.ranks
        return choose(self.model, self.bounds, mean, any(sum(map(bool, held)) > 1 for held in self.held.values()))

    def come(self, number: int, tokens: int) -> bool:
        loads, segments = self.loads(), self.segments()
        found = place(
            tokens,
            BLOCK,
            loads,
            segment_size=segments.of(tokens),
            max_degree=self.ranks,
            kv_weight=0.8,
            least_shard=segments.least,
        )
        if found is None:
            assert sum(load.free_blocks for load in loads) < tokens // BLOCK + self.ranks or tokens < 2 * segments.least
            return False
        held = [0] * self.ranks
        for run in found.runs:
            held[run.rank] += run.num_blocks
        assert sum(held) == -(-tokens // BLOCK), "nothing is lost, nothing is there twice"
        assert all(more <= load.free_blocks for more, load in zip(held, loads, strict=True))
        assert found.degree == 1 or tokens / found.degree >= self.bounds.least, "a shard is tiny"
        self.held[number], self.homes[number] = held, found.home
        return True


@hypothesis_settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 8), coefficients())
def test_random_worlds(seed: int, ranks: int, model: Coefficients) -> None:
    """Capacity is kept, nothing is lost, and no shard is tiny."""
    dice = random.Random(seed)
    world = Ranks(ranks, 4000, model)
    for number in range(40):
        world.come(number, int(min(dice.lognormvariate(8, 1.5), 60_000)) + 1)
        if dice.random() < 0.3 and world.held:
            gone = dice.choice(list(world.held))
            del world.held[gone], world.homes[gone]


@hypothesis_settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 8), coefficients())
def test_ranks_that_fill_are_even(seed: int, ranks: int, model: Coefficients) -> None:
    """Whatever the model says: a rank is above the mean by no more than what stays whole, and a little for batches."""
    dice = random.Random(seed)
    world = Ranks(ranks, 40_000, model)
    for number in range(30):
        assert world.come(number, int(min(dice.lognormvariate(9.5, 1), 20_000 * ranks)) + 1)
    used = [load.used_blocks * BLOCK for load in world.loads()]
    assert max(used) - sum(used) / ranks <= 3 * world.bounds.most


# -- steps, simulated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "part"), [(6, 0.15), (8, 0.3), (40, 0.0)])
def test_near_the_best_explicit_setting(rate: float, part: float) -> None:
    requests = load(rate, 12 if part else 4, part=part)
    best = min(p99(segment, requests) for segment in (8192, 16384, 32768, 65536))
    assert p99(AUTO, requests) <= 1.1 * best


def test_a_wrong_model_is_no_cliff() -> None:
    requests = load(8, part=0.3)
    best = min(p99(segment, requests) for segment in (16384, 32768, 65536))
    found = {astuple(model): p99(AUTO, requests, believed=model) for model in wrong()}
    assert max(found.values()) <= 1.25 * best, found
    assert p99(10**9, requests) > 1.25 * best, "or nothing is shown"


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("segment", [AUTO, 8192])
def test_no_step_leaves_its_graph(segment: int | str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that go on at other ranks, and many that are cut: with room for three visits between two ranks."""
    machine = replace(RUN.machine, outside=0.08)
    few = replace(RUN, machine=machine, visits=3, settings=Settings(segment, moves=moves))
    requests = load(8, part=0.3)
    bounded = simulate(few, "nanocp", requests)
    assert not bounded["outside"] and bounded["requests"] == len(requests) and bounded["sharded"] > 0
    with monkeypatch.context() as context:
        context.setattr(simulated.Plugin, "_has_room", lambda *_: True)
        context.setattr(simulated.Plugin, "_visits", lambda _: None)
        free = simulate(few, "nanocp", requests)
    assert free["outside"] and free["tpot_p99"] > bounded["tpot_p99"]


def test_full_ranks_spill() -> None:
    """As many tokens as the ranks hold, and outputs beyond: nobody is preempted while another rank has room."""
    small = replace(RUN, capacity=200_000, settings=Settings(AUTO))
    requests = load(20, 4)
    requests = replace(requests, prompt=np.minimum(requests.prompt, 100_000))
    world = make_world(small, "nanocp", requests)
    preempt = world._preempt

    def checked(home: int) -> None:
        assert world.used.min() >= world.setup.blocks - 1 or (world.homes >= world.setup.slots).any()
        preempt(home)

    world._preempt = checked  # type: ignore[method-assign]
    world.run()
    assert world.counts.fullest > 0.99 and not np.isnan(world.last).any()


# -- moves -----------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6))
def test_moves_and_spills_have_room(seed: int, ranks: int, room: int) -> None:
    """However much they would win."""
    dice = random.Random(seed)
    visits = Visits(ranks, room)
    candidates = []
    batches = [dice.randint(1, 40) for _ in range(ranks)]
    loads = [RankLoad(5000, 100 * n, n, 200) for n in batches]
    for number in range(30):
        home = batches.index(max(batches)) if dice.random() < 0.7 else dice.randrange(ranks)
        holders = tuple(rank for rank in range(ranks) if dice.random() < 0.3)
        if holders and not visits.fits(home, holders):
            continue
        if holders:
            visits.add(home, holders)
        candidates.append(Candidate(f"r{number:02}", home, holders, dice.randint(100, 10_000), 500))
    by_id = {candidate.request_id: candidate for candidate in candidates}
    before = [list(pairs) for pairs in visits.pairs]
    work = [StepLoad(load.used_blocks * BLOCK, load.batch) for load in loads]
    config = MoveConfig(weigh_exchange=False, max_moves=20)
    model = CostModel()
    moves = plan_moves(loads, work, candidates, step=1000, block_size=BLOCK, model=model, config=config, visits=visits)
    for move in moves:
        for rank in by_id[move.request_id].ranks:
            before[move.target][rank] += 1
    assert all(count <= room for pairs in before for count in pairs)
    for candidate in candidates:
        target = spill_target(loads, candidate, block_size=BLOCK, visits=visits)
        assert target is None or visits.fits(target, candidate.ranks)


def test_room_on_several_ranks_is_used() -> None:
    """By a request of one segment that no rank has room for now; but not in tiny pieces."""
    loads = [RankLoad(60, 90, 1, 9)] * 3
    rules: dict[str, Any] = dict(segment_size=10**6, max_degree=3)
    assert place(100 * BLOCK, BLOCK, loads, **rules) is None
    found = place(100 * BLOCK, BLOCK, loads, least_shard=50 * BLOCK, **rules)
    assert found is not None and found.degree == 2
    assert place(100 * BLOCK, BLOCK, loads, least_shard=51 * BLOCK, **rules) is None
