# SPDX-License-Identifier: Apache-2.0
"""Placement where KV is weighed against batch, and where reads count instead of blocks held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement import Prefix, RankLoad, Run, ShardMap, place, place_after_prefix
from vllm_nanocp.placement.prefix import KV_SLACK

BLOCK = 16
rank_loads = st.builds(RankLoad, st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.sampled_from([0, 1, 9]))


def put(loads: Sequence[RankLoad], blocks: int = 4, weight: float | None = None, segment: int = 10**6) -> ShardMap:
    found = place(blocks * BLOCK, BLOCK, loads, segment_size=segment, max_degree=len(loads), kv_weight=weight)
    assert found is not None
    return found


@given(st.lists(rank_loads, min_size=1, max_size=5), st.integers(1, 60), st.integers(1, 20), st.floats(0, 1))
def test_the_weight_changes_neither_room_nor_degree(
    loads: list[RankLoad], blocks: int, segment: int, weight: float
) -> None:
    """Whether a request fits, and that each rank's share fits, does not depend on the order of the ranks."""
    options: dict[str, Any] = dict(segment_size=segment * BLOCK, max_degree=4)
    plain = place(blocks * BLOCK, BLOCK, loads, **options)
    weighed = place(blocks * BLOCK, BLOCK, loads, kv_weight=weight, **options)
    assert (plain is None) == (weighed is None)
    if weighed is None:
        return
    assert weighed.num_blocks == blocks
    for run in weighed.runs:
        spare = 1 if run.rank == weighed.home else 0
        assert loads[run.rank].slots > 0 and run.num_blocks + spare <= loads[run.rank].free_blocks


@pytest.mark.parametrize(("weight", "home"), [(None, 0), (0.0, 0), (0.5, 2), (1.0, 1)])
def test_the_weight_chooses_between_batch_and_kv(weight: float | None, home: int) -> None:
    loads = [RankLoad(100, 90, 1, 9), RankLoad(160, 30, 9, 9), RankLoad(140, 50, 3, 9)]
    assert put(loads, weight=weight).home == home


def test_reads_count_instead_of_blocks_held() -> None:
    """A rank with little held, but that by many requests; and water is filled up to what is read."""
    loads = [RankLoad(100, 10, 1, 9, read_blocks=90), RankLoad(100, 40, 1, 9, read_blocks=40)]
    assert put(loads, weight=1.0).home == 1
    shares = {run.rank: run.num_blocks for run in put(loads, blocks=60, weight=1.0, segment=30 * BLOCK).runs}
    assert shares == {0: 5, 1: 55}


def after(prefix_rank: int, blocks: int, loads: Sequence[RankLoad], weight: float | None) -> ShardMap | None:
    return place_after_prefix(
        Prefix((Run(prefix_rank, 0, blocks // 2),), (0,)),
        blocks * BLOCK,
        BLOCK,
        loads,
        segment_size=10**6,
        max_degree=4,
        kv_weight=weight,
    )


@pytest.mark.parametrize("weight", [None, 0.8])
def test_a_prefix_draws_no_request_to_a_rank_with_too_much_kv(weight: float | None) -> None:
    """With home moves its batch stays small, whatever is read there."""
    loads = [RankLoad(5000, 1000, 2, 99), RankLoad(5000, 1000, 2, 99), RankLoad(5000, 1000, 2, 99)]
    assert after(0, 10, loads, weight) == ShardMap(BLOCK, (Run(0, 0, 10),))
    heavy = [RankLoad(5000, 1000, 2, 99, read_blocks=5000), *loads[1:]]
    assert (after(0, 10, heavy, weight) is None) == (weight is not None)
    assert after(1, 10, heavy, weight) is not None
    within = [RankLoad(5000, int(1000 * (1 + KV_SLACK)), 2, 99), *loads[1:]]
    assert after(0, 10, within, weight) is not None
    # Reading a prefix some times more is less work than computing it: four of 1,000 blocks where the mean is 1,333.
    long = [RankLoad(9000, 4000, 2, 99), RankLoad(9000, 0, 2, 99), RankLoad(9000, 0, 2, 99)]
    assert after(0, 2000, long, weight) is not None


def test_an_empty_system_follows_prefixes() -> None:
    """The first requests: the mean is small, and one request more than it is no reason to compute a prefix again."""
    loads = [RankLoad(5000, 10, 1, 99), RankLoad(5000, 0, 0, 99), RankLoad(5000, 0, 0, 99)]
    assert after(0, 20, loads, 0.8) is not None
