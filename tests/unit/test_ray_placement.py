# SPDX-License-Identifier: Apache-2.0
"""Where ranks go on Ray's nodes, and which domain a request goes to."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.executor.ray.placement import bundles_of_workers, nodes_of_ranks, same_node

ROOM = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 9), min_size=1)
SHAPE = st.tuples(st.integers(1, 8), st.integers(1, 4))


@given(ROOM, SHAPE)
def test_ranks_fit_and_stay_together(room: dict[str, int], shape: tuple[int, int]) -> None:
    ranks, workers = shape
    nodes = nodes_of_ranks(room, ranks, workers, "a")
    if nodes is None:
        assert sum(free // workers for free in room.values()) < ranks
        return
    assert len(nodes) == ranks
    assert all(count * workers <= room[node] for node, count in Counter(nodes).items())
    starts = [node for i, node in enumerate(nodes) if i == 0 or nodes[i - 1] != node]
    assert len(starts) == len(set(starts)), "ranks of one node follow each other"
    if room.get("a", 0) >= workers:
        assert nodes[0] == "a"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=16), SHAPE)
def test_bundles_of_one_rank_are_on_one_node(placed: list[str], shape: tuple[int, int]) -> None:
    ranks, workers = shape
    bundles = bundles_of_workers(placed, ranks, workers, "b")
    if bundles is not None:
        assert len(bundles) == len(set(bundles)) == ranks * workers
        assert same_node([placed[bundle] for bundle in bundles], workers)
    else:
        assert sum(count // workers for count in Counter(placed).values()) < ranks


def test_ranks_that_do_not_fit() -> None:
    assert nodes_of_ranks({"a": 3, "b": 3}, 3, 2, "a") is None
    assert nodes_of_ranks({"a": 3, "b": 3}, 2, 2, "b") == ["b", "a"]
    assert bundles_of_workers(["a", "b", "a", "b"], 2, 2, "b") == [1, 3, 0, 2]
    assert not same_node(["a", "b"], 2)


def test_prefixes() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "ray"))
    from prefixes import CHARACTERS, Prefixes, keys_of

    def body(text: str) -> bytes:
        return f'{{"prompt": "{text}"}}'.encode()

    stem = "s" * (3 * CHARACTERS)
    keys, other = keys_of(body(stem + "x" * CHARACTERS)), keys_of(body(stem + "y" * CHARACTERS))
    assert len(keys) == 4 and keys[:3] == other[:3] and keys[3] != other[3]
    assert keys_of(b"no JSON") == keys_of(b"{}") == keys_of(b"[1]") == []
    prefixes = Prefixes(capacity=8)
    prefixes.record(keys, "b")
    assert prefixes.rank(other, {"a": 0, "b": 2}, slack=2) == ["b", "a"]
    assert prefixes.rank(other, {"a": 0, "b": 3}, slack=2) == ["a", "b"]
    assert prefixes.rank([], {"a": 1, "b": 0}, slack=2) == ["b", "a"]
    prefixes.forget({"b"})
    assert prefixes.rank(other, {"a": 1, "b": 1}, slack=2) == ["a", "b"]
    for n in range(9):
        prefixes.record([str(n)], "a")
    assert prefixes.rank(["0"], {"a": 1, "b": 0}, slack=2) == ["b", "a"]
