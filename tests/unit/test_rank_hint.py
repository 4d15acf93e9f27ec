# SPDX-License-Identifier: Apache-2.0
"""A client's wish for a rank: followed where the request fits so, and never in the way of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request

from vllm_nanocp import rank_hint
from vllm_nanocp.placement import RankLoad, cdiv, place
from vllm_nanocp.rank_hint import prefer_rank, preferred_rank

from .world_shapes import Shape, vllm_config  # noqa: F401  (a fixture)

BLOCK = 16


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[RankLoad], dict[str, Any]]:
    """Ranks' loads, and what is asked of ``place``."""
    ranks = draw(st.integers(1, 5))
    small = st.integers(0, 12)
    loads = [RankLoad(draw(small), draw(small), draw(st.integers(0, 5)), draw(st.integers(0, 3))) for _ in range(ranks)]
    asked = dict(
        num_tokens=draw(st.integers(1, 40 * BLOCK)),
        block_size=BLOCK,
        loads=loads,
        segment_size=draw(st.sampled_from([BLOCK, 3 * BLOCK, 8 * BLOCK, 99 * BLOCK])),
        max_degree=draw(st.integers(1, ranks)),
        policy=draw(st.sampled_from(["balanced", "balanced", "round_robin"])),
        headroom_blocks=draw(st.integers(0, 1)),
        kv_weight=draw(st.sampled_from([None, 0.8])),
        stripe_blocks=draw(st.sampled_from([None, 2])),
    )
    return loads, asked


@given(worlds(), st.data())
def test_a_wish_is_followed_or_changes_nothing(
    world: tuple[list[RankLoad], dict[str, Any]], data: st.DataObject
) -> None:
    loads, asked = world
    wished = data.draw(st.integers(0, len(loads) - 1))
    placed, plain = place(**asked, preferred=wished), place(**asked)
    assert (placed is None) == (plain is None), "a wish never makes a request wait that could run, nor the reverse"
    if placed is None:
        return
    if placed.home != wished:
        assert placed == plain
    load, need = loads[wished], cdiv(asked["num_tokens"], BLOCK)
    if load.slots and load.free_blocks >= need + asked["headroom_blocks"]:
        assert placed.home == wished, "the whole request fits there"
    if asked["num_tokens"] <= asked["segment_size"] and placed.home == wished and plain is not None:
        assert placed.degree == 1 or plain.degree > 1, "a short one is not spread to be there"
    held = [0] * len(loads)
    for run in placed.runs:
        held[run.rank] += run.num_blocks
    assert all(blocks <= load.free_blocks for blocks, load in zip(held, loads, strict=True)) and sum(held) == need
    assert placed.degree <= asked["max_degree"]


@given(worlds(), st.data())
def test_a_pinned_home_counts_more(world: tuple[list[RankLoad], dict[str, Any]], data: st.DataObject) -> None:
    loads, asked = world
    home, wished = (data.draw(st.integers(0, len(loads) - 1)) for _ in range(2))
    assert place(**asked, home=home, preferred=wished) == place(**asked, home=home)


def shape(**sizes: Any) -> Shape:
    usual: dict[str, Any] = dict(
        seed=0, ranks=3, block_size=BLOCK, blocks=60, max_reqs=4, budget=512, segment=320, degree=3, moves=False,
        caching=True, priorities=False, chunk=0, reserve=0,
    )  # fmt: skip
    return Shape(**{**usual, **sizes})


def wishing(name: str, length: int, rank: int | None, token: int = 10) -> Request:
    hasher = get_request_block_hasher(BLOCK, sha256)
    request = Request(name, [token] * length, SamplingParams(max_tokens=50), None, block_hasher=hasher)
    prefer_rank(request, rank)
    return request


def test_the_scheduler_follows(vllm_config: Any) -> None:  # noqa: F811
    """Short ones go whole, away from a prefix that is cached elsewhere; of a long one the last part, and its tokens."""
    scheduler = shape().scheduler(vllm_config, False)
    for name, length, rank in (("a", 200, 2), ("b", 200, 2), ("c", 200, 1), ("long", 640, 2)):
        scheduler.add_request(wishing(name, length, rank))
        scheduler.schedule()
    assert scheduler.rank_of["a"] == scheduler.rank_of["b"] == 2 and scheduler.rank_of["c"] == 1
    assert scheduler.sharded["long"].shard_map.home == 2


def test_the_scheduler_places_elsewhere_what_does_not_fit(vllm_config: Any) -> None:  # noqa: F811
    scheduler = shape(max_reqs=2).scheduler(vllm_config, False)
    for number in range(4):
        scheduler.add_request(wishing(f"r{number}", 100, 1, token=10 + number))
    scheduler.add_request(wishing("none", 100, None, token=20))
    scheduler.schedule()
    assert [scheduler.rank_of[f"r{number}"] for number in (0, 1)] == [1, 1]
    assert 1 not in [scheduler.rank_of[name] for name in ("r2", "r3", "none")]


def test_a_rank_that_there_is_not_is_no_wish(vllm_config: Any) -> None:  # noqa: F811
    """Front-ends refuse it; one that does not must not end the engine."""
    scheduler = shape().scheduler(vllm_config, False)
    for number, rank in enumerate((3, -1, 10**9)):
        scheduler.add_request(wishing(f"r{number}", 100, rank, token=10 + number))
    scheduler.schedule()
    assert sorted(scheduler.rank_of.values()) == [0, 1, 2]


def test_the_wish_travels_with_the_request(vllm_config: Any) -> None:  # noqa: F811
    rank_hint.install_engine()
    core = EngineCoreRequest("r", [1, 2, 3], None, SamplingParams(), None, 0.0, None, None, 1)
    assert preferred_rank(Request.from_engine_core_request(core, None)) == 1


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Something whose ``process_inputs`` is vLLM's check and no more."""

    def process(self: Any, *args: Any, data_parallel_rank: int | None = None, **kwargs: Any) -> Any:
        assert data_parallel_rank is None, "vLLM knows of one rank"
        return SimpleNamespace(data_parallel_rank=None)

    monkeypatch.setattr(InputProcessor, "process_inputs", process)
    rank_hint.install_front_end()
    return SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"nanocp": {"ranks": 2}}))


@pytest.mark.parametrize("rank", [0, 1, None])
def test_front_ends_take_all_ranks(front_end: Any, rank: int | None) -> None:
    request = InputProcessor.process_inputs(front_end, "r", data_parallel_rank=rank)  # type: ignore[call-arg]
    assert request.data_parallel_rank == rank


@pytest.mark.parametrize("rank", [2, -1, 10**20])
def test_front_ends_refuse_others_as_vllm_does(front_end: Any, rank: int) -> None:
    with pytest.raises(VLLMValidationError, match=rf"^data_parallel_rank {rank} is out of range \[0, 2\)\.$"):
        InputProcessor.process_inputs(front_end, "r", data_parallel_rank=rank)  # type: ignore[call-arg]
