# SPDX-License-Identifier: Apache-2.0
"""Placement: nothing lost, nothing twice, capacity kept, balance. References are brute force."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement import RankedLoads, RankLoad, Run, ShardMap, cdiv, place, queue_at
from vllm_nanocp.placement.place import start_degree, water_fill

_TINY_WORLDS = 20_000

# -- shard maps ------------------------------------------------------------------------------------------------


@st.composite
def shard_maps(draw: st.DrawFn) -> ShardMap:
    """Any legal map; a rank may have several runs."""
    runs: list[Run] = []
    for _ in range(draw(st.integers(1, 6))):
        at = runs[-1].end_block if runs else 0
        runs.append(Run(draw(st.integers(0, 4)), at, at + draw(st.integers(1, 5))))
    return ShardMap(draw(st.integers(1, 8)), tuple(runs))


@given(shard_maps(), st.data())
def test_every_token_is_on_the_rank_of_its_block(shard_map: ShardMap, data: st.DataObject) -> None:
    """Token by token, also for requests shorter than the map and for ones that grew past it."""
    most = (shard_map.num_blocks + 3) * shard_map.block_size
    num_tokens = data.draw(st.integers(0, most))
    held = [0] * 5
    for token in range(num_tokens):
        held[shard_map.rank_of(token // shard_map.block_size)] += 1
    assert shard_map.tokens_by_rank(5, num_tokens) == held
    assert sum(held) == num_tokens


@given(shard_maps())
def test_runs_and_ranks_agree(shard_map: ShardMap) -> None:
    for index, run in enumerate(shard_map.runs):
        assert all(shard_map.rank_of(block) == run.rank for block in range(run.first_block, run.end_block))
        assert shard_map.first_token(index) == run.first_block * shard_map.block_size
    assert shard_map.num_blocks == sum(run.num_blocks for run in shard_map.runs)
    assert shard_map.home == shard_map.rank_of(shard_map.num_blocks - 1) == shard_map.rank_of(shard_map.num_blocks + 9)
    assert shard_map.degree == len({shard_map.rank_of(block) for block in range(shard_map.num_blocks)})


def test_only_the_home_s_run_is_open() -> None:
    shard_map = ShardMap(16, (Run(2, 0, 3), Run(0, 3, 4)))
    assert (shard_map.end_token(0, 1000), shard_map.end_token(1, 1000)) == (48, 1000)
    assert (shard_map.end_token(0, 40), shard_map.end_token(1, 40)) == (40, 40)


@pytest.mark.parametrize(
    ("block_size", "runs"),
    [
        (16, ()),
        (0, (Run(0, 0, 1),)),
        (16, (Run(0, 1, 2),)),  # does not begin at 0
        (16, (Run(0, 0, 2), Run(1, 3, 4))),  # a gap
        (16, (Run(0, 0, 2), Run(1, 1, 4))),  # an overlap
        (16, (Run(0, 0, 0),)),  # empty
        (16, (Run(0, 0, 2), Run(1, 2, 2))),
        (16, (Run(-1, 0, 2),)),
    ],
)
def test_a_shard_map_that_loses_or_doubles_blocks_is_refused(block_size: int, runs: tuple[Run, ...]) -> None:
    with pytest.raises(ValueError):
        ShardMap(block_size, runs)


def test_a_negative_block_is_refused() -> None:
    with pytest.raises(ValueError):
        ShardMap(16, (Run(0, 0, 1),)).rank_of(-1)


# -- water filling ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pour:
    amount: int
    used: list[int]
    room: list[int]
    least: list[int]


@st.composite
def pours(draw: st.DrawFn, vessels: int = 6, most: int = 15) -> Pour:
    n = draw(st.integers(1, vessels))
    used = draw(st.lists(st.integers(0, most), min_size=n, max_size=n))
    room = draw(st.lists(st.integers(0, most), min_size=n, max_size=n))
    least = [draw(st.integers(0, r)) if draw(st.booleans()) else 0 for r in room]
    return Pour(draw(st.integers(sum(least), sum(room))), used, room, least)


def unit_by_unit(pour: Pour) -> list[int]:
    """Each unit after the minima goes to the lowest vessel with room: the ideal pour."""
    shares = list(pour.least)
    for _ in range(pour.amount - sum(shares)):
        open_ = [i for i, r in enumerate(pour.room) if shares[i] < r]
        shares[min(open_, key=lambda i: pour.used[i] + shares[i])] += 1
    return shares


def levels(pour: Pour, shares: Sequence[int]) -> list[int]:
    """Final levels, highest first."""
    return sorted((u + s for u, s in zip(pour.used, shares, strict=True)), reverse=True)


@given(pours())
def test_water_fill_levels_are_those_of_pouring_unit_by_unit(pour: Pour) -> None:
    """Not only the highest: all levels are equal; only which of equal vessels got the last units may differ."""
    shares = water_fill(pour.amount, pour.used, pour.room, pour.least)
    assert sum(shares) == pour.amount
    assert all(x <= s <= r for x, s, r in zip(pour.least, shares, pour.room, strict=True))
    assert levels(pour, shares) == levels(pour, unit_by_unit(pour))


@given(pours(vessels=3, most=5))
def test_no_other_pour_ends_lower(pour: Pour) -> None:
    """Against every possible pour. Vessels that got nothing do not count: nothing could be done about them."""

    def highest(shares: Sequence[int]) -> int:
        return max((u + s for u, s in zip(pour.used, shares, strict=True) if s), default=0)

    every = itertools.product(*(range(x, r + 1) for x, r in zip(pour.least, pour.room, strict=True)))
    best = min(highest(shares) for shares in every if sum(shares) == pour.amount)
    assert highest(water_fill(pour.amount, pour.used, pour.room, pour.least)) == best


@pytest.mark.parametrize(
    ("amount", "room", "least"), [(5, [2, 2], [0, 0]), (1, [2, 2], [1, 1]), (3, [2, 2], [3, 0]), (-1, [2, 2], [0, 0])]
)
def test_water_fill_refuses_what_does_not_fit(amount: int, room: list[int], least: list[int]) -> None:
    with pytest.raises(ValueError):
        water_fill(amount, [0, 0], room, least)


# -- place -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The arguments of ``place``."""

    num_tokens: int
    block_size: int
    loads: list[RankLoad]
    segment_size: int
    max_degree: int
    policy: str
    turn: int
    home: int | None
    headroom_blocks: int

    def place(self, **more: Any) -> ShardMap | None:
        options: dict[str, Any] = {name: getattr(self, name) for name in list(self.__dataclass_fields__)[3:]}
        return place(self.num_tokens, self.block_size, self.loads, **options, **more)

    @property
    def need(self) -> int:
        return cdiv(self.num_tokens, self.block_size)

    @property
    def room(self) -> list[int]:
        return [load.free_blocks if load.slots > 0 else 0 for load in self.loads]

    @property
    def limit(self) -> int:
        return min(self.max_degree, len(self.loads))

    @property
    def order(self) -> list[int]:
        """Ranks as the policy takes them."""
        ranks = range(len(self.loads))
        if self.policy == "round_robin":
            return [(self.turn + i) % len(self.loads) for i in ranks]
        return sorted(ranks, key=lambda r: (self.room[r] == 0, self.loads[r].batch, -self.room[r], r))

    def degrees(self) -> range:
        """Degrees that the rules allow: the start degree, and more when one rank could never do, or a shard exists."""
        start = max(1, min(self.limit, cdiv(self.num_tokens, self.segment_size)))
        never = self.need + self.headroom_blocks > max(load.total_blocks for load in self.loads)
        return range(start, (self.limit if start > 1 or never or self.home is not None else start) + 1)

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether some rank of these can be the home, with its headroom, and all of them together hold the request."""
        homes = [r for r in chosen if self.home in (None, r) and self.room[r] > self.headroom_blocks]
        return bool(homes) and sum(self.room[r] for r in chosen) >= self.need + self.headroom_blocks

    def first_choice(self, degree: int) -> list[int]:
        """The participants before any swap."""
        chosen = self.order[:degree]
        if self.home is not None and self.home not in chosen:
            chosen[-1] = self.home
        return chosen

    def least_degree(self) -> int | None:
        """The smallest allowed degree at which the request fits; None: it does not. By trying every set of ranks."""

        def candidates(degree: int) -> Iterator[Sequence[int]]:
            if self.policy == "round_robin":  # takes who is next, whatever their room
                return iter([self.first_choice(degree)])
            return itertools.combinations(range(len(self.loads)), degree)

        return next((d for d in self.degrees() if any(self.fits(chosen) for chosen in candidates(d))), None)


def rank_loads(most: int) -> st.SearchStrategy[RankLoad]:
    return st.builds(
        RankLoad,
        free_blocks=st.integers(0, most),
        used_blocks=st.integers(0, most),
        batch=st.integers(0, 3),
        slots=st.sampled_from([0, 1, 1, 2, 9]),
    )


@st.composite
def cases(draw: st.DrawFn, policy: str | None = None, may_pin: bool = True) -> Case:
    # Tiny caches too: corner cases are dense there.
    most = draw(st.sampled_from([2, 4, 12]))
    loads = draw(st.lists(rank_loads(most), min_size=1, max_size=5))
    block_size = draw(st.sampled_from([1, 4, 16]))
    return Case(
        num_tokens=draw(st.integers(1, 2 * most * block_size)),
        block_size=block_size,
        loads=loads,
        segment_size=draw(st.integers(1, most * block_size)),
        max_degree=draw(st.integers(1, 6)),
        policy=policy or draw(st.sampled_from(["balanced", "round_robin"])),
        turn=draw(st.integers(0, 20)),
        home=draw(st.sampled_from([None, *range(len(loads))])) if may_pin else None,
        headroom_blocks=draw(st.integers(0, 2)),
    )


@given(cases(policy="balanced"), st.data())
def test_loads_that_are_kept_place_as_those_taken_anew(case: Case, data: st.DataObject) -> None:
    """Whatever has been put before, with and without KV that is weighed, and ties."""
    kept = RankedLoads(data.draw(rank_loads(4)) for _ in case.loads)
    changed: set[int] = set()
    kept.followers.append(changed)
    for rank in data.draw(st.permutations(range(len(kept)))):
        kept.put(rank, data.draw(rank_loads(4)))
        kept.put(rank, case.loads[rank])
    assert kept == case.loads and changed == set(range(len(kept)))
    for kv_weight in (None, 0.5):
        rules = dict(segment_size=case.segment_size, max_degree=case.max_degree, kv_weight=kv_weight)
        for tokens in (1, case.num_tokens):
            assert place(tokens, case.block_size, kept, **rules) == place(tokens, case.block_size, case.loads, **rules)  # type: ignore[arg-type]


def check_capacity(case: Case) -> None:
    """Nothing lost, nothing twice, no rank gets more than it has room for."""
    shard_map = case.place()
    if shard_map is None:
        return
    assert shard_map.block_size == case.block_size
    assert shard_map.num_blocks == case.need  # ShardMap itself refuses gaps and overlaps
    assert sum(shard_map.tokens_by_rank(len(case.loads), case.num_tokens)) == case.num_tokens
    ranks = [run.rank for run in shard_map.runs]
    assert len(set(ranks)) == len(ranks)  # one run a rank
    for run in shard_map.runs:
        assert case.loads[run.rank].slots > 0
        spare = case.headroom_blocks if run.rank == shard_map.home else 0
        assert run.num_blocks + spare <= case.loads[run.rank].free_blocks
    assert 1 <= shard_map.degree <= case.max_degree
    if case.home is not None:
        assert shard_map.home == case.home


def check_gives_up_rightly(case: Case) -> None:
    """None only if no allowed set of ranks has the room; and no more ranks than room asks for."""
    least = case.least_degree()
    shard_map = case.place()
    assert (shard_map is None) == (least is None)
    if shard_map is not None and least is not None:
        assert shard_map.degree <= least


def check_balance(case: Case) -> None:
    """No rank ends more than one block above another with a shard that had room for one more."""
    shard_map = case.place()
    if shard_map is None:
        return
    share = {run.rank: run.num_blocks for run in shard_map.runs}
    level = {rank: case.loads[rank].used_blocks + n for rank, n in share.items()}
    for a, b in itertools.permutations(share, 2):
        spare = case.headroom_blocks if b == shard_map.home else 0
        if (a != shard_map.home or share[a] > 1) and share[b] + spare < case.room[b]:
            assert level[a] <= level[b] + 1


def check_smallest_batches(case: Case) -> None:
    """If the ranks with room and the smallest batches suffice, they are taken; the smallest of them is the home."""
    first = case.first_choice(case.degrees()[0])
    if not case.fits(first):
        return
    shard_map = case.place()
    assert shard_map is not None
    assert {run.rank for run in shard_map.runs} <= set(first)
    if case.home is None:
        able = [r for r in first if case.room[r] > case.headroom_blocks]
        assert shard_map.home == min(able, key=case.order.index)


@given(cases())
def test_place_loses_nothing_and_keeps_to_capacity(case: Case) -> None:
    check_capacity(case)


@given(cases())
def test_place_gives_up_only_when_it_cannot_fit(case: Case) -> None:
    check_gives_up_rightly(case)


@given(cases(), st.integers(1, 6))
def test_stripes_are_the_same_shares_in_turns(case: Case, stripe: int) -> None:
    """The home's last; and none gets ahead of another that has blocks to come by more than a stripe."""
    whole, striped = case.place(), case.place(stripe_blocks=stripe)
    assert (whole is None) == (striped is None)
    if whole is None or striped is None:
        return
    tokens = case.num_tokens
    share = [cdiv(n, case.block_size) for n in striped.tokens_by_rank(len(case.loads), tokens)]
    assert share == [cdiv(n, case.block_size) for n in whole.tokens_by_rank(len(case.loads), tokens)]
    assert striped.home == whole.home and striped.num_blocks == whole.num_blocks
    left = list(share)
    left[striped.home] -= striped.runs[-1].num_blocks
    done = [0] * len(share)
    for run in striped.runs[:-1]:
        done[run.rank] += run.num_blocks
        left[run.rank] -= run.num_blocks
        assert all(done[run.rank] - done[q] <= stripe for q in range(len(share)) if q != run.rank and left[q])
    order = [run.rank for run in striped.runs[: striped.degree]]
    if striped.degree == len(striped.runs):  # one run each: ascending, round to the home
        assert order == sorted(order, key=lambda r: (r <= striped.home, r))


@given(cases(policy="balanced"))
def test_place_balances(case: Case) -> None:
    check_balance(case)


@given(cases(policy="balanced"))
def test_place_takes_the_smallest_batches_when_they_have_room(case: Case) -> None:
    check_smallest_batches(case)


def test_place_in_tiny_worlds() -> None:
    """The same in many more worlds with caches of a few blocks, where the corner cases are dense."""
    dice = random.Random(0)
    placed = 0
    for _ in range(_TINY_WORLDS):
        loads = [
            RankLoad(dice.randint(0, 4), dice.randint(0, 4), dice.randint(0, 3), dice.choice([0, 1, 1, 1]))
            for _ in range(dice.randint(1, 4))
        ]
        case = Case(
            num_tokens=dice.randint(1, 20),
            block_size=2,
            loads=loads,
            segment_size=dice.randint(1, 10),
            max_degree=dice.randint(1, 5),
            policy=dice.choice(["balanced", "balanced", "round_robin"]),
            turn=dice.randint(0, 5),
            home=dice.choice([None, None, dice.randrange(len(loads))]),
            headroom_blocks=dice.randint(0, 2),
        )
        placed += case.place() is not None
        check_capacity(case)
        check_gives_up_rightly(case)
        if case.policy == "balanced":
            check_balance(case)
            check_smallest_batches(case)
    assert _TINY_WORLDS // 10 < placed < _TINY_WORLDS * 9 // 10


@given(cases(policy="balanced", may_pin=False), st.integers(0, 2))
def test_place_starts_at_the_start_degree_when_all_ranks_are_alike(case: Case, batch: int) -> None:
    """With equal loads and room for all, each of ceil(tokens / segment) ranks gets a share, equal but for a block."""
    loads = [RankLoad(free_blocks=40, used_blocks=7, batch=batch, slots=1)] * len(case.loads)
    case = replace(case, loads=loads)
    degree = max(1, min(case.limit, cdiv(case.num_tokens, case.segment_size), case.need))
    shard_map = case.place()
    assert shard_map is not None
    assert shard_map.degree == degree
    sizes = [run.num_blocks for run in shard_map.runs]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_tokens", "degree"), [(1, 1), (100, 1), (101, 2), (200, 2), (201, 3), (301, 4), (401, 4), (10**9, 4)]
)
def test_start_degree_is_length_over_segment(num_tokens: int, degree: int) -> None:
    assert start_degree(num_tokens, segment_size=100, max_degree=4) == degree


def test_a_short_request_waits_for_room_on_one_rank() -> None:
    """Splitting it would tax it; so it waits while a rank could hold it, and is split only if none ever could."""
    options: dict[str, Any] = {"segment_size": 1000, "max_degree": 2, "headroom_blocks": 0}
    busy = [RankLoad(free_blocks=4, used_blocks=6, batch=1, slots=1)] * 2
    assert place(8 * 16, 16, busy, **options) is None
    small = [RankLoad(free_blocks=4, used_blocks=3, batch=1, slots=1)] * 2
    shard_map = place(8 * 16, 16, small, **options)
    assert shard_map is not None and shard_map.tokens_by_rank(2, 128) == [64, 64]


def test_poor_ranks_are_swapped_for_rich_ones_before_the_degree_grows() -> None:
    free = (4, 2, 20)
    loads = [RankLoad(free_blocks=n, used_blocks=20 - n, batch=i, slots=1) for i, n in enumerate(free)]
    shard_map = place(16 * 16, 16, loads, segment_size=128, max_degree=3)
    assert shard_map is not None
    assert sorted(run.rank for run in shard_map.runs) == [0, 2]
    assert shard_map.home == 0  # the smaller batch


def test_a_home_can_be_found_by_a_swap() -> None:
    """Together the ranks first chosen hold the request, but neither has room for the home's next block."""
    loads = [RankLoad(1, 9, 0, 1), RankLoad(1, 9, 0, 1), RankLoad(10, 0, 5, 1)]
    shard_map = place(16, 16, loads, segment_size=8, max_degree=2)
    assert shard_map is not None and shard_map.home == 2


@given(cases(policy="round_robin", may_pin=False))
def test_round_robin_takes_ranks_in_turn(case: Case) -> None:
    """The same request, one turn later, on ranks that are all alike: one rank further, and equal shares."""
    loads = [RankLoad(free_blocks=60, used_blocks=3 * i, batch=i, slots=1) for i in range(len(case.loads))]
    case = replace(case, loads=loads)
    now, later = case.place(), replace(case, turn=case.turn + 1).place()
    assert now is not None and later is not None
    n = len(loads)
    assert now.home == case.turn % n
    assert {run.rank for run in later.runs} == {(run.rank + 1) % n for run in now.runs}
    assert later.home == (now.home + 1) % n
    sizes = [run.num_blocks for run in now.runs]
    assert max(sizes) - min(sizes) <= 1
    assert now.degree == min(case.degrees()[0], case.need)


# -- queue_at --------------------------------------------------------------------------------------------------


@given(cases(), st.data())
def test_queue_at_finds_a_rank_that_could_hold_the_request(case: Case, data: st.DataObject) -> None:
    idle = data.draw(st.lists(st.booleans(), min_size=len(case.loads), max_size=len(case.loads)))
    able = [
        r
        for r, load in enumerate(case.loads)
        if idle[r] and load.slots > 0 and load.free_blocks + load.used_blocks >= case.need and case.home in (None, r)
    ]
    shard_map = queue_at(case.num_tokens, case.block_size, case.loads, idle, case.home)
    assert (shard_map is None) == (not able)
    if shard_map is None:
        return
    assert shard_map.runs == (Run(shard_map.home, 0, case.need),)
    assert shard_map.home in able
    assert case.loads[shard_map.home].free_blocks == max(case.loads[r].free_blocks for r in able)


# -- purity ----------------------------------------------------------------------------------------------------


def test_placement_needs_neither_torch_nor_vllm() -> None:
    """In a process of its own, where nothing else can have imported them."""
    code = "import sys, vllm_nanocp.placement; print(*({m.split('.')[0] for m in sys.modules} & {'torch', 'vllm'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_a_full_rank_is_no_participant() -> None:
    """A rank with the smallest batch and no room does not stand in the way of one with room."""
    full = RankLoad(free_blocks=0, used_blocks=40, batch=0, slots=1)
    roomy = RankLoad(free_blocks=40, used_blocks=0, batch=2, slots=1)
    shard_map = place(640, 32, [full, roomy, roomy], segment_size=320, max_degree=3)
    assert shard_map is not None and {run.rank for run in shard_map.runs} == {1, 2}
