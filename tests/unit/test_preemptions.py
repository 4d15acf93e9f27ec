# SPDX-License-Identifier: Apache-2.0
"""With moves nobody is preempted while a rank has room: blocks that are promised to those who come, or who compute a
prompt, go to nobody else, and what one rank's preemption frees is room for the others in the same step."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from tests.engine.harness import BLOCK, CHUNK, RESTLESS
from tests.engine.test_moves import traced

from . import loopback
from .scheduler_world import Truth
from .test_no_endless_wait import Ranks
from .test_speculation import DraftedWorld
from .world_shapes import MOVES, Ask, Shape, vllm_config  # noqa: F401
from .worlds import World, run_worlds

# Ways in which the trace's requests come; more of them look further.
PATTERNS = int(os.environ.get("NANOCP_PATTERNS", "1"))


def request(name: str, length: int, outputs: int = 50) -> Request:
    tokens = [10 + ord(name)] * length
    return Request(name, tokens, SamplingParams(max_tokens=outputs, ignore_eos=True), None)


class OneRank:
    """One of the ranks of 20 blocks of 16 tokens, by its doors."""

    def __init__(self, vllm_config: Any, **sizes: Any) -> None:  # noqa: F811
        base = dict(seed=0, ranks=2, block_size=16, blocks=20, max_reqs=8, budget=512, segment=4096, degree=2)
        base |= dict(moves=MOVES[0], caching=False, priorities=False, chunk=0, reserve=0)
        self.rank: Any = Shape(**{**base, **sizes}).scheduler(vllm_config, False).ranks[0]  # type: ignore[arg-type]
        self.preempted: list[str] = []
        self.rank.on_preempt = self.preempted.append
        self.rank.on_free = lambda _: None

    def step(self) -> dict[str, int]:
        """The tokens of each request."""
        output = self.rank.schedule()
        ids = list(output.num_scheduled_tokens)
        done = [self.rank.requests[name].num_computed_tokens >= self.rank.requests[name].num_tokens for name in ids]
        tokens = [[7] if all_known else [] for all_known in done]
        self.rank.update_from_output(output, ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens))
        return dict(output.num_scheduled_tokens)


def test_the_block_of_a_request_on_its_way_is_kept(vllm_config: Any) -> None:  # noqa: F811
    """Also where nothing runs, so that vLLM keeps nothing free."""
    one = OneRank(vllm_config)
    one.rank.expect("coming", None)
    assert one.rank.view.load().free_blocks == 19
    one.rank.enter(request("a", 20 * 16 - 1))
    assert not one.step() and one.rank.num_free_blocks == 19
    one.rank.expect_no_more("coming")
    assert one.rank.num_free_blocks == 20 and one.step() == {"a": 319}


def test_what_a_prompt_has_yet_to_take_is_kept(vllm_config: Any) -> None:  # noqa: F811
    """Thirteen blocks, in chunks, beside one of eight that comes later, and one of two."""
    one = OneRank(vllm_config, chunk=40)
    for name, length in (("a", 200), ("b", 120), ("c", 30)):
        one.rank.enter(request(name, length, outputs=4))
    tokens = Counter(one.step())
    assert tokens == {"a": 40}, "the first one takes three blocks, and ten later: seven of twenty are left"
    for _ in range(20):
        tokens.update(one.step())
    assert not one.preempted and tokens == {"a": 203, "b": 123, "c": 33}


def test_who_is_more_important_starts_beside_a_prompt(vllm_config: Any) -> None:  # noqa: F811
    """As in vLLM: the prompt may be preempted for it."""
    one = OneRank(vllm_config, chunk=40, priorities=True)
    a, b, c = request("a", 200, outputs=4), request("b", 120, outputs=4), request("c", 30, outputs=4)
    a.priority = c.priority = 1
    for first in (a, c):
        one.rank.enter(first)
    assert one.step()["a"] < 200
    one.rank.enter(b)
    assert "b" in one.step()


def test_what_a_preempted_request_did_not_compute_is_not_cached(vllm_config: Any) -> None:  # noqa: F811
    """The less important one has its tokens of the step, and full blocks with them, when the other needs a block."""
    one, hasher = OneRank(vllm_config, budget=272, priorities=True, caching=True), get_request_block_hasher(16, sha256)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    low = Request("low", list(range(10, 290)), params, None, priority=1, block_hasher=hasher)
    one.rank.enter(Request("high", list(range(300, 332)), params, None, block_hasher=hasher))
    one.rank.enter(low)
    assert one.step() == {"high": 32, "low": 240}
    one.rank.running.reverse()  # as if the other had begun later
    assert one.step() == {"high": 1} and one.preempted == ["low"]
    _, found, *_ = one.rank.kv_cache_manager.get_computed_blocks(low)
    assert found == 240


@pytest.mark.parametrize("apart", [False, True])
def test_one_preemption_is_room_for_all(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """Two full ranks, of which all requests need their next block in the same step."""
    loopback.use(monkeypatch, apart)
    ranks = Ranks(vllm_config, blocks=20, moves=MOVES[0])
    for name in "abcd":
        ranks.add(name, 152, 30)
    ranks.run()
    scheduler = ranks.scheduler
    assert scheduler.num_avoidable_preemptions == 0
    assert (scheduler.num_preemptions, scheduler.mover.num_spills > 0) == (1, True)
    assert ranks.tokens == dict.fromkeys("abcd", 30)


class TraceWorld(World):
    """The trace of ``tests/engine/test_moves.py``, whose requests come at random steps: an engine's take their time."""

    def draw(self) -> list[Ask]:
        # The first had avoidable preemptions, with and without async scheduling.
        rng, hasher = random.Random(self.shape.seed + 25), get_request_block_hasher(BLOCK, sha256)
        step_s = rng.choice([0.005, 0.01, 0.02, 0.03, 0.05])
        fitting = [ask for ask in traced(220, seed=2) if len(ask.prompt) + ask.params["max_tokens"] <= 1400]
        asks: list[Ask] = []
        now, step = 0.0, 1
        for number, ask in enumerate(fitting[:90]):
            while now < ask.delay:
                now += step_s * rng.lognormvariate(0, 0.5)
                step += 1
            truth = Truth(number, ask.prompt, ask.params["max_tokens"], 0, stops=False)
            truth.seeded = number % 5 == 2
            params = SamplingParams(
                temperature=0.9 if truth.seeded else 0.0,
                seed=number if truth.seeded else None,
                max_tokens=ask.params["max_tokens"],
                ignore_eos=True,
            )
            name = f"r{number}"
            made = Request(name, ask.prompt, params, None, arrival_time=float(number), block_hasher=hasher)
            asks.append(Ask(made, truth, step, None))
        return asks

    def reset(self) -> None:
        """All are preempted."""

    def pause(self, until: int) -> int:
        return 0

    def run(self) -> Counter[str]:
        counts = super().run()
        counts["avoidable"] = self.scheduler.num_avoidable_preemptions
        return counts


class DraftedTrace(TraceWorld, DraftedWorld):
    """The same with drafts, by which requests leave, and grow, in the middle of a block."""


@pytest.fixture
def full_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(rng: random.Random, seed: int) -> Shape:
        sizes = dict(seed=seed, ranks=3, block_size=BLOCK, blocks=48, max_reqs=32, budget=CHUNK, segment=1024, degree=3)
        rest = dict(moves=RESTLESS, caching=True, priorities=False, chunk=0, reserve=4, parallel=True)
        return Shape(**sizes, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Shape, "draw", draw)


@pytest.mark.usefixtures("full_ranks")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_trace_that_comes_in_many_ways(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    counts = run_worlds(TraceWorld, vllm_config, 1, asynchronous, PATTERNS, monkeypatch, apart=True)
    assert counts["spills"] and not counts["avoidable"], counts


@pytest.mark.usefixtures("full_ranks")
@pytest.mark.parametrize(("version", "asynchronous"), [(1, False), (2, True)], ids=["v1", "v2-async"])
def test_a_trace_with_drafts(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    asynchronous: bool,
) -> None:
    """Whoever leaves for a block leaves one in the same step: also where a generator's state is awaited, or tokens in
    flight. And drafts in flight leave room for the token behind them."""
    counts = run_worlds(DraftedTrace, vllm_config, version, asynchronous, PATTERNS, monkeypatch, apart=True)
    assert counts["spills"] and counts["sharded_accepted"] and not counts["avoidable"], counts
