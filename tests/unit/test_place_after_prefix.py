# SPDX-License-Identifier: Apache-2.0
"""Placement around a cached prefix: properties."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement import Prefix, RankLoad, Run, ShardMap, place_after_prefix

BLOCK = 16
rank_loads = st.builds(RankLoad, st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.sampled_from([0, 1, 9]))


@st.composite
def prefixes(draw: st.DrawFn, ranks: int) -> Prefix:
    runs: list[Run] = []
    held: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        at, blocks = (runs[-1].end_block if runs else 0), draw(st.integers(1, 12))
        rank = draw(st.sampled_from([r for r in range(ranks) if not runs or r != runs[-1].rank]))
        runs.append(Run(rank, at, at + blocks))
        held.append(draw(st.integers(0, blocks)))
    return Prefix(tuple(runs), tuple(held), draw(st.booleans()))


@given(st.data())
def test_properties(data: st.DataObject) -> None:
    loads = data.draw(st.lists(rank_loads, min_size=2, max_size=4))
    prefix = data.draw(prefixes(len(loads)))
    tokens = prefix.num_blocks * BLOCK + data.draw(st.integers(1, 400))
    segment, degree = data.draw(st.sampled_from([64, 256, 10**6])), data.draw(st.integers(1, len(loads)))
    home = data.draw(st.none() | st.integers(0, len(loads) - 1))
    found = place_after_prefix(
        prefix,
        tokens,
        BLOCK,
        loads,
        segment_size=segment,
        max_degree=degree,
        home=home,
        kv_weight=data.draw(st.sampled_from([None, 0.8])),
        stripe_blocks=data.draw(st.sampled_from([None, 4])),
    )
    if found is None:
        return
    assert found.num_blocks == -(-tokens // BLOCK) and found.degree <= degree and home in (None, found.home)
    assert loads[found.home].slots > 0
    shared: Counter[int] = Counter()
    for run, held in zip(prefix.runs, prefix.held, strict=True):
        kept = all(found.rank_of(block) == run.rank for block in range(run.first_block, run.end_block))
        if not kept:
            assert run is not prefix.runs[0], "nothing of the prefix is used"
            break
        shared[run.rank] += held
    for rank, load in enumerate(loads):
        blocks = sum(run.num_blocks for run in found.runs if run.rank == rank)
        assert blocks + (rank == found.home) - shared[rank] <= load.free_blocks or not blocks


LOADS = [RankLoad(100, 0, 1, 9), RankLoad(100, 0, 1, 9), RankLoad(100, 0, 0, 9)]


def test_the_rest_joins_the_holders_where_there_may_be_no_more_ranks() -> None:
    """Another rank has the smallest batch, but the prefix lies on as many as may hold it."""
    prefix = Prefix((Run(0, 0, 10), Run(1, 10, 20)), (0, 0))
    found = place_after_prefix(prefix, 21 * BLOCK, BLOCK, LOADS, segment_size=10 * BLOCK, max_degree=2)
    assert found is not None and found.runs[0] == Run(0, 0, 10) and found.home in (0, 1)
    found = place_after_prefix(prefix, 21 * BLOCK, BLOCK, LOADS, segment_size=10 * BLOCK, max_degree=3)
    assert found is not None and found.home == 2


def test_a_prefix_on_too_many_ranks_is_used_in_part() -> None:
    prefix = Prefix((Run(0, 0, 10), Run(1, 10, 20), Run(2, 20, 30)), (0, 0, 0))
    found = place_after_prefix(prefix, 31 * BLOCK, BLOCK, LOADS, segment_size=10 * BLOCK, max_degree=2)
    assert found is not None and [found.rank_of(block) for block in (0, 9, 10, 19)] == [0, 0, 1, 1]
    assert found.degree == 2


@pytest.mark.parametrize("held", [0, 10])
def test_what_others_hold_takes_no_room(held: int) -> None:
    loads = [RankLoad(5, 95, 1, 9), RankLoad(5, 95, 1, 9)]
    prefix = Prefix((Run(0, 0, 10),), (held,))
    for segment, degree in ((10**6, 1), (5 * BLOCK, 2)):
        found = place_after_prefix(prefix, 12 * BLOCK, BLOCK, loads, segment_size=segment, max_degree=degree)
        assert (found is None) == (held == 0)


@pytest.mark.parametrize(("second", "runs"), [(1, 1), (6, 2)])
def test_one_segment_over_ranks_if_much_would_be_computed_again(second: int, runs: int) -> None:
    prefix = Prefix((Run(0, 0, 10), Run(1, 10, 10 + second)), (0, 0))
    found = place_after_prefix(prefix, (11 + second) * BLOCK, BLOCK, LOADS, segment_size=10**6, max_degree=2)
    assert found is not None
    assert len(found.runs) >= runs and (runs > 1 or found == ShardMap(BLOCK, (Run(0, 0, 12),)))


def test_more_follow_what_is_coming_than_what_is_cached() -> None:
    loads = [RankLoad(100, 0, 8, 9), RankLoad(100, 0, 0, 9)]
    for coming in (False, True):
        prefix = Prefix((Run(0, 0, 10),), (10,), coming)
        found = place_after_prefix(prefix, 11 * BLOCK, BLOCK, loads, segment_size=10**6, max_degree=2)
        assert (found is not None) == coming


def test_what_is_left_of_a_preempted_request_is_used_on_a_heavy_rank() -> None:
    """Others compute such a prefix again elsewhere."""
    loads = [RankLoad(9000, 9000, 1, 9), RankLoad(17_000, 1000, 1, 9), RankLoad(17_000, 1000, 1, 9)]
    prefix = Prefix((Run(0, 0, 1000),), (0,))
    rules = dict(segment_size=1000 * BLOCK, max_degree=3, kv_weight=0.8)
    assert place_after_prefix(prefix, 2000 * BLOCK, BLOCK, loads, **rules) is None  # type: ignore[arg-type]
    found = place_after_prefix(prefix, 2000 * BLOCK, BLOCK, loads, again=True, **rules)  # type: ignore[arg-type]
    assert found is not None and found.rank_of(999) == 0
