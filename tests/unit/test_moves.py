# SPDX-License-Identifier: Apache-2.0
"""Home moves and spills: bounds kept, nothing worse than before, no request that bounces."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement import RankLoad
from vllm_nanocp.placement.cost import Coefficients, CostModel, StepLoad
from vllm_nanocp.placement.moves import (
    Candidate,
    Move,
    MoveConfig,
    drifted,
    plan_moves,
    spill_target,
    with_reserve,
)

BLOCK = 16
NOW = 1000


@dataclass(frozen=True)
class World:
    """The arguments of ``plan_moves``."""

    loads: list[RankLoad]
    work: list[StepLoad]
    candidates: list[Candidate]
    config: MoveConfig
    model: CostModel

    def plan(self) -> list[Move]:
        return plan_moves(
            self.loads,
            self.work,
            self.candidates,
            step=NOW,
            block_size=BLOCK,
            model=self.model,
            config=self.config,
        )


def candidates_on(ranks: int) -> st.SearchStrategy[Candidate]:
    """Most of them on the first rank, so that there is something to move."""
    rank = st.integers(0, ranks - 1)
    return st.builds(
        Candidate,
        request_id=st.just(""),
        home=st.one_of(st.just(0), st.just(0), rank),
        holders=st.sets(rank, max_size=3).map(lambda s: tuple(sorted(s))),
        kv_tokens=st.integers(1, 5000),
        remaining_tokens=st.one_of(st.integers(1, 2000), st.just(1000)),
        last_move=st.one_of(st.none(), st.none(), st.integers(NOW - 100, NOW)),
    )


configs = st.builds(
    MoveConfig,
    batch_margin=st.sampled_from([0.0, 0.1, 0.5]),
    kv_margin=st.sampled_from([0.0, 0.1, 0.5]),
    min_gap=st.integers(2, 4),
    min_steps_between=st.integers(0, 80),
    max_moves=st.integers(0, 4),
    spare_blocks=st.integers(0, 20),
    growth_blocks=st.integers(1, 130),
    min_remaining_tokens=st.integers(0, 100),
    weigh_exchange=st.booleans(),
    max_degree=st.one_of(st.none(), st.integers(1, 4)),
)
models = st.builds(
    Coefficients,
    kv_token=st.sampled_from([1e-12, 1e-9, 2e-8]),
    query=st.sampled_from([1e-6, 1e-3]),
    guest=st.sampled_from([1e-7, 1e-5]),
).map(CostModel)
# About what a request may need, so that room is now enough and now not.
frees = st.one_of(st.integers(0, 20), st.integers(50, 150), st.integers(150, 900))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    ranks = draw(st.integers(2, 5))
    found = draw(st.lists(candidates_on(ranks), min_size=draw(st.sampled_from([0, 6])), max_size=25))
    # A request holds blocks where it is, as after any step at its home.
    candidates = [
        replace(c, request_id=str(i), holders=tuple(sorted({*c.holders, c.home}))) for i, c in enumerate(found)
    ]
    loads, work = [], []
    for rank in range(ranks):
        batch = sum(c.home == rank for c in candidates) + draw(st.integers(0, 3))
        load = RankLoad(draw(frees), draw(st.integers(0, 300)), batch, draw(st.sampled_from([0, 1, 2, 9, 9, 9])))
        guests = sum(rank in c.holders and c.home != rank for c in candidates)
        loads.append(load)
        work.append(StepLoad(load.used_blocks * BLOCK, batch, guests))
    exchange = any(load.guests for load in work)
    work = [replace(load, exchange=exchange) for load in work]
    return World(loads, work, candidates, draw(configs), draw(models))


def after(world: World, moves: list[Move]) -> tuple[list[int], list[StepLoad]]:
    """Batches and work when the moves were made, counted anew."""
    batch = [load.batch for load in world.loads]
    work = list(world.work)
    by_id = {c.request_id: c for c in world.candidates}
    for move in moves:
        holders = by_id[move.request_id].holders
        batch[move.source] -= 1
        batch[move.target] += 1
        s, t = work[move.source], work[move.target]
        work[move.source] = replace(s, batch=s.batch - 1, guests=s.guests + 1)
        work[move.target] = replace(t, batch=t.batch + 1, guests=t.guests - (move.target in holders))
    return batch, work


@given(worlds())
def test_moves_keep_to_every_bound(world: World) -> None:
    moves = world.plan()
    assert len(moves) <= world.config.max_moves
    assert len({m.request_id for m in moves}) == len(moves)
    by_id = {c.request_id: c for c in world.candidates}
    arrivals = Counter(m.target for m in moves)
    departures = Counter(m.source for m in moves)
    needed: Counter[int] = Counter()
    for move in moves:
        candidate = by_id[move.request_id]
        assert move.source == candidate.home != move.target
        assert candidate.last_move is None or NOW - candidate.last_move >= world.config.min_steps_between
        assert candidate.remaining_tokens >= world.config.min_remaining_tokens
        limit = world.config.max_degree
        assert limit is None or move.target in candidate.holders or len(candidate.holders) < limit
        needed[move.target] += world.config.growth(candidate.remaining_tokens, BLOCK)
    for rank, blocks in needed.items():
        assert world.loads[rank].free_blocks >= blocks + world.config.spare_blocks
        assert world.loads[rank].slots + departures[rank] >= arrivals[rank]


@given(worlds(), st.integers(1, 3))
def test_no_rank_gets_more_adapters_than_it_has_slots(world: World, most: int) -> None:
    """Moves of one step count for each other; spills look at the same loads."""
    kinds = [None, *range(1, most + 3)]
    candidates = [replace(c, adapter=kinds[int(c.request_id) % len(kinds)]) for c in world.candidates]
    there: list[set[int]] = [set() for _ in world.loads]
    for c in candidates:
        if c.adapter is not None and len(there[c.home] | {c.adapter}) <= most:
            there[c.home].add(c.adapter)
    loads = [
        replace(load, adapters=frozenset(adapters), max_adapters=most)
        for load, adapters in zip(world.loads, there, strict=True)
    ]
    by_id = {c.request_id: c for c in candidates}
    for move in replace(world, loads=loads, candidates=candidates).plan():
        adapter = by_id[move.request_id].adapter
        if adapter is not None:
            there[move.target].add(adapter)
            assert len(there[move.target]) <= most
    for c in candidates:
        target = spill_target(loads, c, block_size=BLOCK, config=world.config)
        assert target is None or loads[target].takes(c.adapter)
        free = spill_target(
            [replace(load, max_adapters=None) for load in loads], c, block_size=BLOCK, config=world.config
        )
        assert target is not None or free is None or not loads[free].takes(c.adapter)


@pytest.mark.parametrize(("adapters", "moved"), [((None, None), 2), ((1, 1), 2), ((1, 2), 1)])
def test_moves_of_one_step_share_the_slots_for_adapters(adapters: tuple[int | None, int | None], moved: int) -> None:
    loads = [RankLoad(100, 100, 8, 9), RankLoad(200, 0, 0, 9, max_adapters=1)]
    work = [StepLoad(1600, 8, exchange=True), StepLoad(0, 0, exchange=True)]
    candidates = [Candidate(str(i), 0, (0,), 100, 1000, adapter=adapter) for i, adapter in enumerate(adapters)]
    config = MoveConfig(batch_margin=0.0, growth_blocks=1)
    moves = plan_moves(loads, work, candidates, step=NOW, block_size=BLOCK, model=CostModel(), config=config)
    assert len(moves) == moved


@given(worlds())
def test_moves_make_nothing_worse(world: World) -> None:
    """Neither the spread of the batches, nor the largest batch, nor the predicted step."""
    moves = world.plan()
    batch = [load.batch for load in world.loads]
    then, work = after(world, moves)
    assert max(then) <= max(batch) and min(then) >= min(batch)
    assert world.model.predict_step(work) <= world.model.predict_step(world.work)
    if moves:  # every move brings two batches closer
        assert sum(b * b for b in then) < sum(b * b for b in batch)
    if len(moves) == 1:
        assert batch[moves[0].source] - batch[moves[0].target] >= world.config.min_gap


@given(worlds())
def test_moves_are_the_same_every_time_and_in_any_order(world: World) -> None:
    moves = world.plan()
    assert moves == world.plan()
    assert moves == replace(world, candidates=world.candidates[::-1]).plan()


@given(worlds())
def test_only_drifted_ranks_lose_requests(world: World) -> None:
    sources = drifted(world.loads, world.config)
    assert {m.source for m in world.plan()} <= set(sources)
    there = [c for c in world.candidates if c.home in sources]
    assert replace(world, candidates=there).plan() == world.plan()


def even(batch: int, used: int = 100, free: int = 1000) -> RankLoad:
    return RankLoad(free, used, batch, 100)


def plan(
    loads: list[RankLoad],
    candidates: list[Candidate],
    model: CostModel | None = None,
    exchange: bool = True,
    **options: object,
) -> list[Move]:
    work = [StepLoad(load.used_blocks * BLOCK, load.batch, exchange=exchange) for load in loads]
    config = replace(MoveConfig(), **options)  # type: ignore[arg-type]
    return plan_moves(loads, work, candidates, step=NOW, block_size=BLOCK, model=model or CostModel(), config=config)


def test_even_ranks_move_nothing() -> None:
    candidates = [Candidate(str(i), i % 3, (i % 3,), 100, 500) for i in range(9)]
    assert plan([even(10), even(11), even(10)], candidates) == []
    assert plan([], []) == []


def test_the_cheapest_request_moves() -> None:
    """First one that the target holds a part of; else the one with least KV for what it may still make."""
    loads = [even(20), even(10)]
    long = Candidate("long", 0, (0,), 9000, 500)
    short = Candidate("short", 0, (0,), 300, 500)
    ending = Candidate("ending", 0, (0,), 290, 64)
    known = Candidate("known", 0, (0, 1), 90_000, 500)
    assert plan(loads, [long, short, ending, known], max_moves=1) == [Move("known", 0, 1)]
    assert plan(loads, [long, short, ending], max_moves=1) == [Move("short", 0, 1)]
    assert plan(loads, [long, ending], max_moves=1) == [Move("ending", 0, 1)]


def test_a_heavy_rank_loses_requests_to_a_light_one() -> None:
    """Its batch is within the margin, but where its new tokens go there is less KV."""
    loads = [even(11, used=900), even(9, used=100), even(10, used=850)]
    assert plan(loads, [Candidate("a", 0, (0,), 100, 500)]) == [Move("a", 0, 1)]


def test_no_request_goes_where_the_step_would_become_longer() -> None:
    """A rank with few requests and so much KV that it is the slowest."""
    loads = [even(20, used=10), even(2, used=90_000, free=9000)]
    assert plan(loads, [Candidate("a", 0, (0,), 100, 500)]) == []
    assert plan(loads, [Candidate("a", 0, (0,), 100, 500)], model=CostModel(Coefficients(kv_token=1e-12)))


@pytest.mark.parametrize(("guest", "moves"), [(1e-6, True), (1e-3, False)])
def test_a_guest_dearer_than_a_query_keeps_requests_at_home(guest: float, moves: bool) -> None:
    model = CostModel(Coefficients(query=1e-4, guest=guest))
    assert bool(plan([even(20), even(10)], [Candidate("a", 0, (0,), 100, 500)], model=model)) == moves


@pytest.mark.parametrize(
    ("batches", "exchange", "moves"), [((20, 10), True, True), ((20, 10), False, False), ((400, 10), False, True)]
)
def test_the_first_exchange_must_pay(batches: tuple[int, int], exchange: bool, moves: bool) -> None:
    """5 queries less a step at 20 us each win 0.1 ms; the exchange takes 1.8 ms, and 195 queries win 3.9 ms."""
    loads, candidates = [even(batch) for batch in batches], [Candidate("a", 0, (0,), 100, 500)]
    assert bool(plan(loads, candidates, exchange=exchange)) == moves
    assert plan(loads, candidates, exchange=exchange, weigh_exchange=False)


@pytest.mark.parametrize(
    ("holders", "degree", "moves"), [((0,), 1, False), ((0,), 2, True), ((0, 2), 2, False), ((0, 1), 2, True)]
)
def test_a_move_keeps_to_the_degree(holders: tuple[int, ...], degree: int, moves: bool) -> None:
    """Only rank 1 has room for it."""
    loads = [even(20), even(10), even(10, free=0)]
    assert bool(plan(loads, [Candidate("a", 0, holders, 100, 500)], max_degree=degree)) == moves


def test_no_request_bounces() -> None:
    """Repeated calls in a world whose batches jitter: rests are kept, few requests move often, and it stays even."""
    dice = random.Random(0)
    config = MoveConfig(min_steps_between=20, max_moves=2)
    ranks = 6
    homes = {i: dice.randrange(2) for i in range(120)}
    holders = {i: {home} for i, home in homes.items()}
    history: dict[int, list[int]] = {i: [] for i in homes}
    moved = []
    for step in range(600):
        if dice.random() < 0.1:  # one ends, another begins
            i = dice.randrange(120)
            homes[i] = dice.randrange(ranks)
            holders[i], history[i] = {homes[i]}, []
        batch = Counter(homes.values())
        loads = [RankLoad(5000, 1000, batch[r], 200) for r in range(ranks)]
        work = [StepLoad(1000 * BLOCK, batch[r], exchange=True) for r in range(ranks)]
        ready = [
            Candidate(str(i), homes[i], tuple(sorted(holders[i])), 1000, 800, history[i][-1] if history[i] else None)
            for i in homes
            if (i + step) % BLOCK == 0
        ]
        moves = plan_moves(loads, work, ready, step=step, block_size=BLOCK, model=CostModel(), config=config)
        for move in moves:
            i = int(move.request_id)
            assert not history[i] or step - history[i][-1] >= config.min_steps_between
            history[i].append(step)
            homes[i] = move.target
            holders[i].add(move.target)
        moved.append(len(moves))
        if step > 100:
            assert max(Counter(homes.values()).values()) <= 120 / ranks * 1.4
    assert sum(moved[:100]) > 60
    assert sum(moved[100:]) < 100
    assert max(map(len, history.values())) <= 4


@pytest.mark.parametrize("target", [RankLoad(5, 10, 0, 9), RankLoad(900, 10, 0, 0)])
def test_a_target_without_room_or_slot_is_none(target: RankLoad) -> None:
    assert plan([even(20), target], [Candidate("a", 0, (0,), 100, 500)]) == []


@given(worlds(), st.data())
def test_a_spill_finds_a_rank_exactly_if_there_is_one(world: World, data: st.DataObject) -> None:
    if not world.candidates:
        return
    candidate = data.draw(st.sampled_from(world.candidates))
    limit = world.config.max_degree
    able = {
        r
        for r, load in enumerate(world.loads)
        if r != candidate.home
        and load.slots > 0
        and load.free_blocks > 0
        and (limit is None or r in candidate.holders or len(candidate.holders) < limit)
    }
    target = spill_target(world.loads, candidate, block_size=BLOCK, config=world.config)
    assert (target is None) == (not able)
    assert target is None or target in able
    assert target == spill_target(world.loads, candidate, block_size=BLOCK, config=world.config)
    need = world.config.growth(candidate.remaining_tokens, BLOCK) + world.config.spare_blocks
    roomy = {r for r in able if world.loads[r].free_blocks >= need}
    assert not roomy or target in roomy
    known = (roomy or able) & set(candidate.holders)
    assert not known or target in known


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9), st.integers(0, 9))
def test_a_reserve_takes_free_blocks_and_no_more(free: int, used: int, batch: int, blocks: int) -> None:
    load = RankLoad(free, used, batch, 3)
    kept = with_reserve(load, blocks)
    assert kept.free_blocks == max(0, free - blocks * batch)
    assert (kept.total_blocks, kept.batch, kept.slots) == (load.total_blocks, batch, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_margin", -0.1),
        ("kv_margin", float("nan")),
        ("min_gap", 1),
        ("max_moves", -1),
        ("growth_blocks", 0),
        ("min_steps_between", -1),
        ("spare_blocks", -1),
        ("reserve_blocks", -1),
        ("max_degree", 0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        MoveConfig(**{name: value})  # type: ignore[arg-type]
