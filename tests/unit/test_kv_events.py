# SPDX-License-Identifier: Apache-2.0
"""What a rank announces of its prefix cache, from what vLLM says of it. Random schedulers: ``test_scheduler_world``."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from vllm_nanocp.sched.rank.kv_events import UsablePrefixes

from .event_index import EventError, Index

SIZE = 2


def stored(hashes: str, parent: str | None = None, **more: Any) -> BlockStored:
    """Blocks named by letters, one after another; block ``x`` has the tokens of its letter."""
    tokens = [ord(letter) for letter in hashes for _ in range(SIZE)]
    return BlockStored(
        block_hashes=list(hashes),
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=SIZE,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[(letter,) for letter in hashes],
        group_idx=0,
        **more,
    )


def removed(hashes: str) -> list[BlockRemoved]:
    return [BlockRemoved(block_hashes=[letter], medium="GPU", group_idx=0) for letter in hashes]


def test_what_vllm_says_of_one_rank_is_passed_on() -> None:
    prefixes = UsablePrefixes()
    said = [stored("abc"), stored("d", "c"), stored("xy", "a")]
    assert prefixes.follow(said) == said
    gone = prefixes.follow(removed("dyx"))
    assert sorted(gone, key=str) == sorted(removed("dyx"), key=str) and gone.index(*removed("y")) < gone.index(
        *removed("x")
    )
    assert prefixes.follow([AllBlocksCleared()]) == [AllBlocksCleared()]
    assert prefixes.follow([stored("abc")]) == [stored("abc")]


def test_blocks_wait_for_those_before_them() -> None:
    prefixes = UsablePrefixes()
    assert prefixes.follow([stored("cde", "b"), stored("f", "e")]) == []
    assert prefixes.follow([stored("a")]) == [stored("a")]
    assert prefixes.follow([stored("b", "a")]) == [stored("b", "a"), stored("cde", "b"), stored("f", "e")]


def test_blocks_go_with_those_before_them_and_come_back() -> None:
    prefixes = UsablePrefixes()
    prefixes.follow([stored("abcd")])
    assert prefixes.follow(removed("b")) == removed("dcb")
    assert prefixes.follow(removed("d")) == [], "it was withdrawn before"
    assert prefixes.follow([stored("b", "a")]) == [stored("b", "a"), stored("c", "b")]


def test_copies_count_once() -> None:
    prefixes = UsablePrefixes()
    assert prefixes.follow([stored("ab"), stored("ab")]) == [stored("ab")]
    assert prefixes.follow(removed("ba")) == []
    assert prefixes.follow(removed("ba")) == removed("ba")


def test_reports_of_use_are_passed_on() -> None:
    """vLLM makes them for requests that ask for them; they are no new blocks."""
    prefixes = UsablePrefixes()
    prefixes.follow([stored("abc")])
    report = stored("ab", session_id="s")
    assert prefixes.follow([report], [report]) == [report]
    assert prefixes.follow([report, *removed("cb")], [report]) == removed("cb"), "what it tells of is gone"
    assert prefixes.follow(removed("a")) == removed("a")


@pytest.mark.parametrize("seed", range(40))
def test_an_index_can_follow(seed: int) -> None:
    """Blocks of a random tree are cached and evicted in any order; the index knows those with all before them."""
    rng = random.Random(seed)
    parents: dict[int, int | None] = {0: None}
    for block in range(1, 60):
        parents[block] = rng.choice([block - 1, block - 1, rng.randrange(block), None])
    prefixes, index, copies = UsablePrefixes(), Index(0, SIZE), Counter[int]()
    for _ in range(60):
        events: list[Any] = []
        for _ in range(rng.randrange(6)):
            if rng.random() < 0.02:
                copies.clear()
                events.append(AllBlocksCleared())
            elif rng.random() < 0.55:
                run = [rng.randrange(60)]
                while parents.get(run[-1] + 1) == run[-1] and rng.random() < 0.7:
                    run.append(run[-1] + 1)
                parent = parents[run[0]]
                event = stored(
                    "".join(chr(100 + block) for block in run), None if parent is None else chr(100 + parent)
                )
                events.append(event)
                copies.update(run)
            elif +copies:
                block = rng.choice(list(+copies))
                copies[block] -= 1
                events += removed(chr(100 + block))
        index.follow(prefixes.follow(events))
        usable = set()
        for block in parents:  # ascending: parents come first
            if copies[block] and (parents[block] is None or parents[block] in usable):
                usable.add(block)
        assert {ord(block_hash) - 100 for block_hash in index.nodes} == usable


def test_the_index_is_strict() -> None:
    index = Index(0, SIZE)
    index.follow([stored("ab")])
    for wrong in (stored("d", "c"), stored("a"), *removed("c"), *removed("a")):
        with pytest.raises(EventError):
            index.follow([wrong])
