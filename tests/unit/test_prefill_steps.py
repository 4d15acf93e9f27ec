# SPDX-License-Identifier: Apache-2.0
"""``prefill_gap``: the policy by properties, and schedulers in random worlds."""

from __future__ import annotations

import math
import os
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_nanocp.config import parse
from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.placement.prefill_steps import LEAST, Allowance, PrefillGap, PrefillSteps, pairs_of
from vllm_nanocp.sched.pacing import Pacing

from .scheduler_world import Truth, payloads
from .test_queue import Queue
from .test_speculation import WRONG, with_drafts
from .world_shapes import MOVES, vllm_config  # noqa: F401
from .worlds import InMode, World, in_mode  # noqa: F401

WORLDS = int(os.environ.get("NANOCP_GAP_WORLDS", "2"))
GAPS = st.builds(
    PrefillGap,
    ms=st.floats(20.0, 2000.0),
    decode_steps=st.integers(0, 6),
    fill=st.floats(0.0, 1.0),
    late_ms=st.floats(0.0, 500.0),
)
SECONDS = st.floats(1e-5, 10.0)


class Ranks:
    """Ranks that compute prompts as they are allowed to, on a machine with other coefficients than the policy's."""

    def __init__(self, gap: PrefillGap, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.count = dice.randint(1, 6)
        self.steps = PrefillSteps(gap, self.count, dice.choice([512, 8192]))
        self.token, self.pair, self.decode = 8e-6 * dice.uniform(0.3, 3), 1.3e-9 * dice.uniform(0.3, 3), 0.01
        # Of each prompt: tokens computed, and in all.
        self.prompts: list[list[list[int]]] = [[] for _ in range(self.count)]
        self.clock = 0.0

    def add(self, rank: int, tokens: int) -> None:
        self.prompts[rank].append([0, tokens])

    def step(self, decodes: bool) -> tuple[int, float, float]:
        """Tokens and the largest rank's pairs, and the seconds predicted of it."""
        backlog = [sum(end - at for at, end in prompts) for prompts in self.prompts]
        allowed = self.steps.begin(backlog, decodes, self.clock)
        tokens, pairs = 0, [0.0] * self.count
        for rank, prompts in enumerate(self.prompts):
            if allowed is None:
                assert not prompts
                break
            mine = Allowance(allowed.tokens, allowed.pairs, allowed.tokens > 0)
            for prompt in prompts:
                chunk = mine.take(prompt[0], prompt[1] - prompt[0])
                pairs[rank] += pairs_of(prompt[0], chunk)
                prompt[0] += chunk
                tokens += chunk
            self.prompts[rank] = [prompt for prompt in prompts if prompt[0] < prompt[1]]
        predicted = self.steps.decode + self.steps.token * tokens + self.steps.pair * max(pairs)
        seconds = self.decode + self.token * tokens + self.pair * max(pairs)
        self.clock += seconds
        if tokens or decodes:
            self.steps.observe(tokens, max(pairs), seconds)
        return tokens, max(pairs), predicted


@given(st.integers(0, 300_000), st.integers(1, 20_000), st.integers(0, 9000), st.floats(0, 1e9), st.booleans())
def test_the_largest_chunk_that_is_allowed(at: int, most: int, tokens: int, pairs: float, first: bool) -> None:
    allowed = Allowance(tokens, pairs, first)
    chunk = allowed.take(at, most)
    assert 0 <= chunk <= min(most, tokens) and allowed.tokens == tokens - chunk
    assert chunk <= (LEAST if first else 0) or pairs_of(at, chunk) <= pairs * (1 + 1e-9)
    if chunk < min(most, tokens):
        assert pairs_of(at, chunk + 2) > pairs, "more would have fitted"
    assert chunk or not (first and tokens), "a rank's first prompt always gets on"


@settings(max_examples=60, deadline=None)
@given(GAPS, st.integers(0, 10**6))
def test_a_step_is_predicted_to_end_within_the_gap(gap: PrefillGap, seed: int) -> None:
    """Whatever the ranks have to compute, shallow on some, deep on others; but for the least that a rank computes."""
    ranks = Ranks(gap, seed)
    for _ in range(80):
        if ranks.dice.random() < 0.4:
            ranks.add(ranks.dice.randrange(ranks.count), int(10 ** ranks.dice.uniform(0, 5.2)))
        deepest = max((at for prompts in ranks.prompts for at, _ in prompts), default=0)
        decode, least = ranks.steps.decode, ranks.steps.token * LEAST * ranks.count
        least += ranks.steps.pair * pairs_of(deepest, LEAST)
        tokens, _, predicted = ranks.step(ranks.dice.random() < 0.8)
        # Predicted with what was known when it began.
        assert not tokens or predicted <= max(gap.ms / 1e3, decode) + least + 1e-6


@settings(max_examples=60, deadline=None)
@given(GAPS, st.integers(0, 10**6))
def test_decode_steps_lie_between_and_nobody_waits_for_ever(gap: PrefillGap, seed: int) -> None:
    """With decodes all the time: so many steps between two with prompts, at most as many as are late; all prompts end,
    and a rank's prompts get on in each prefill step."""
    ranks = Ranks(gap, seed)
    for rank in range(ranks.count):
        for _ in range(2):
            ranks.add(rank, ranks.dice.randint(1, 20_000))
    since, late = gap.decode_steps, math.ceil(gap.late_ms / 1e3 / ranks.decode)
    for _ in range(100_000):
        waiting = [sum(end - at for at, end in prompts) for prompts in ranks.prompts]
        if not any(waiting):
            break
        tokens, _, _ = ranks.step(True)
        after = [sum(end - at for at, end in prompts) for prompts in ranks.prompts]
        if tokens:
            assert since >= gap.decode_steps
            assert all(b < a for a, b in zip(waiting, after, strict=True) if a), "on all ranks"
            since = 0
        else:
            since += 1
            assert since <= max(gap.decode_steps, late + 1)
    assert not any(map(bool, ranks.prompts))


@given(GAPS, st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.floats(0, 1e6))
def test_prompts_do_not_wait_where_nobody_decodes(gap: PrefillGap, backlog: list[int], now: float) -> None:
    steps = PrefillSteps(gap, len(backlog), 8192)
    for _ in range(3):
        allowed = steps.begin(backlog, False, now)
        assert (allowed is None) == (not any(backlog))
        assert allowed is None or LEAST <= allowed.tokens <= 8192


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 20), st.floats(0.05, 20), st.integers(0, 10**6))
def test_coefficients_are_learnt(token: float, pair: float, seed: int) -> None:
    """Of steps with many tokens and with many pairs, in any units."""
    dice, steps = random.Random(seed), PrefillSteps(PrefillGap(), 4, 8192)
    for _ in range(300):
        steps.observe(0, 0.0, 0.01)
        tokens, pairs = dice.randint(100, 30_000), dice.uniform(1e6, 3e8)
        steps.observe(tokens, pairs, 0.01 + token * 8e-6 * tokens + pair * 1.3e-9 * pairs)
    for _ in range(20):
        tokens, pairs = dice.randint(100, 30_000), dice.uniform(1e6, 3e8)
        seconds = token * 8e-6 * tokens + pair * 1.3e-9 * pairs
        assert steps.token * tokens + steps.pair * pairs == pytest.approx(seconds, rel=0.2, abs=1e-3)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e12), st.floats(allow_nan=True)), max_size=30))
def test_no_measurement_breaks_it(measured: list[tuple[int, float, float]]) -> None:
    steps = PrefillSteps(PrefillGap(decode_share=1.0), 3, 4096)
    for tokens, pairs, seconds in measured:
        steps.observe(tokens, pairs, seconds)
        assert math.isfinite(steps.token) and steps.token > 0 and math.isfinite(steps.pair) and steps.pair > 0
        allowed = steps.allowance()
        assert allowed is not None and math.isfinite(steps._owed)
        assert LEAST <= allowed.tokens <= 4096 and math.isfinite(allowed.pairs)


@pytest.mark.parametrize(("tokens", "share"), [(16_000, 0.05), (16_000, 0.3), (500, 0.05)])
def test_decodes_get_their_share(tokens: int, share: float) -> None:
    """Of the time that prompts take: several steps behind a long one, one behind many short ones. Whole steps else."""
    steps = PrefillSteps(PrefillGap(ms=None, decode_steps=0, decode_share=share), 2, 8192)
    spent = {True: 0.0, False: 0.0}
    for _ in range(3000):
        allowed = steps.begin([10**6, 10**6], True, 0.0)
        prompts = allowed is None
        assert prompts or allowed.tokens == 0
        taken = 8e-6 * tokens * prompts
        spent[prompts] += taken if prompts else 0.01
        steps.observe(tokens * prompts, 0.0, 0.01 + taken)
    assert spent[False] == pytest.approx(share * spent[True], rel=0.05)


def test_no_share_is_owed_to_nobody() -> None:
    """Where nothing has decoded, or no prompt waits any more."""
    steps = PrefillSteps(PrefillGap(ms=None, decode_steps=0, decode_share=0.5), 2, 8192)
    for backlog, decodes in (([9000, 0], False), ([0, 0], True)):
        steps.observe(16_000, 0.0, 0.2)
        assert steps.begin([9000, 0], True, 0.0) is not None, "it is owed"
        assert steps.begin(backlog, decodes, 0.0) is None
        assert steps.begin([9000, 0], True, 0.0) is None


# -- the setting ------------------------------------------------------------------------------------------------------


def test_the_setting() -> None:
    assert parse({}, 2).gap is None and parse({"prefill_gap": False}, 2).gap is None
    assert parse({"prefill_gap": True}, 2).gap == PrefillGap()
    config = parse({"prefill_gap": {"ms": 150, "decode_steps": 3}}, 2)
    assert config.gap == PrefillGap(ms=150, decode_steps=3) and parse(config.to_dict(), 1) == config
    assert parse({"prefill_gap": {"ms": None}}, 2).gap == PrefillGap(ms=None)
    nothing = {"ms": None, "decode_steps": 0}
    for unused in ({"fill": 0.9}, {"late_ms": 5}, {"fill": 0.5, "late_ms": 50.0}):
        assert parse({"prefill_gap": unused | {"ms": 100}}, 2).gap
        with pytest.raises(NanoCPConfigError, match=f"with ms null {' and '.join(unused)} has no effect.*leave it out"):
            parse({"prefill_gap": unused | {"ms": None}}, 2)
    for wrong in (1, "yes", {"gap": 3}, {"ms": 0}, {"ms": "x"}, {"decode_steps": 1.5}, {"fill": 2}, nothing):
        with pytest.raises(NanoCPConfigError, match=r"^nanocp: prefill_gap.*leave it out"):
            parse({"prefill_gap": wrong}, 2)
    keys = {"ms": 3_600_000, "decode_steps": 10**9, "fill": 1, "late_ms": 1e300, "decode_share": 1}
    for key, most in keys.items():
        with pytest.raises(NanoCPConfigError, match=f"^nanocp: prefill_gap: {key} must be .*leave it out"):
            parse({"prefill_gap": {key: -1}}, 2)
        for wrong in (True, "1", [1], math.nan, math.inf, 10**400 if key != "decode_steps" else 1.0):
            with pytest.raises(NanoCPConfigError, match=f"^nanocp: prefill_gap: {key} must be .*leave it out"):
                parse({"prefill_gap": {key: wrong}}, 2)
        gap = parse({"prefill_gap": {key: most}}, 2).gap
        assert gap is not None
        steps = PrefillSteps(gap, 2, 4096)
        allowed = steps.begin([9000, 0], True, 0.0)
        assert allowed is not None and 0 <= allowed.take(0, 4096) <= 4096


# -- the scheduler ----------------------------------------------------------------------------------------------------


class Gaps(World):
    """Gaps so narrow that nearly all prompts take several steps, and decode steps between."""

    def __init__(self, vllm_config: Any, seed: int, *args: Any) -> None:  # noqa: F811
        super().__init__(vllm_config, seed, *args)
        ms = (11.0, 12.0, 20.0)[seed % 3] if seed % 4 != 3 else None
        gap = PrefillGap(ms, decode_steps=seed % 4, fill=(seed % 2) / 2, late_ms=seed % 5, decode_share=seed % 2 / 5)
        self.scheduler.pacing = Pacing(gap, self.scheduler.ranks)


def test_nothing_is_lost(in_mode: InMode) -> None:  # noqa: F811
    """Sharded prompts, moves, aborts and preemptions go on; the tokens are right."""
    counts = in_mode.run(Gaps, WORLDS)
    assert counts["rows"], "no request was sharded"


def paced(config: Any, gap: PrefillGap, **sizes: Any) -> Queue:
    queue = Queue(config, **dict(blocks=800, budget=512, segment=16384) | sizes)
    pacing = queue.scheduler.pacing = Pacing(gap, queue.scheduler.ranks)
    pacing.steps.token, pacing.steps.pair, pacing.steps.decode = 50e-6, 1e-9, 0.01
    pacing.steps.observe = lambda *_: None  # type: ignore[method-assign]  # whatever the steps took
    return queue


def prompts_of(output: Any) -> list[int]:
    """Prompt tokens that each rank computes in a step."""
    return [sum(n for n in part.num_scheduled_tokens.values() if n > 1) for part in payloads(output)]


def test_steps_compute_prompts_on_all_ranks_or_on_none(vllm_config: Any) -> None:  # noqa: F811
    """Beside decodes: those go on in every step, chunks are bounded on both ranks, and two decode steps lie between."""
    gap = PrefillGap(ms=30.0, decode_steps=2, fill=0.0, late_ms=0.0)
    queue = paced(vllm_config, gap)
    for number in range(4):
        queue.add(f"short {number}", 20, 150)
    queue.step(8)
    for number in range(2):
        queue.add(f"long {number}", 3000, 3)
    steps: list[tuple[list[int], int]] = []
    execute = queue.device.execute

    def seen(output: Any) -> Any:
        decodes = sum(n == 1 for part in payloads(output) for n in part.num_scheduled_tokens.values())
        steps.append((prompts_of(output), decodes))
        return execute(output)

    queue.device.execute = seen  # type: ignore[method-assign]
    while "long 0" not in queue.first or "long 1" not in queue.first:
        queue.step()
    busy = [i for i, (tokens, _) in enumerate(steps) if any(tokens)]
    assert len(busy) > 10 and all(b - a >= 3 for a, b in pairwise(busy))
    assert all(all(steps[i][0]) for i in busy[:-2]), "on both ranks"
    assert max(n for i in busy for n in steps[i][0]) <= 0.020 * 0.9 / (2 * 50e-6) + 1
    assert all(decodes >= 4 for _, decodes in steps), "decodes wait for nobody"
    queue.end()


def test_whole_steps_and_a_share_of_the_time_for_decodes(vllm_config: Any) -> None:  # noqa: F811
    """Steps with prompts are those of schedulers without a gap: a short one has its part beside a long one. A tenth of
    their time is for decodes alone: half a step of 10 ms behind 1,000 tokens."""
    queue = paced(vllm_config, PrefillGap(ms=None, decode_steps=0, decode_share=0.1))
    policy = queue.scheduler.pacing.steps
    policy.observe = lambda tokens, *_: setattr(policy, "_owed", policy._owed + 5e-6 * tokens)  # type: ignore
    queue.add("decodes", 20, 150)
    queue.step(3)
    steps: list[int] = []

    def seen(output: Any, execute: Any = queue.device.execute) -> Any:
        steps.append(sum(prompts_of(output)))
        return execute(output)

    queue.device.execute = seen  # type: ignore[method-assign]
    for number in range(2):
        queue.add(f"long {number}", 3900, 3)
    queue.step(2)
    queue.add("short", 100, 3)
    queue.step(3)
    assert "short" in queue.first and "long 0" not in queue.first
    while not {"long 0", "long 1"} <= set(queue.first):
        queue.step()
    assert queue.num_tokens["decodes"] == queue.steps, "it decodes in each"
    busy = [tokens for tokens in steps if tokens]
    assert max(busy) > 900, "as much as fits"
    assert len(steps) - len(busy) == pytest.approx(5e-6 * sum(busy) / 0.01, abs=2)
    queue.end()


def test_short_prompts_have_a_part_of_a_bounded_step(vllm_config: Any) -> None:  # noqa: F811
    """They do not wait until the long one before them has been computed."""
    queue = paced(vllm_config, PrefillGap(ms=30.0, decode_steps=0, fill=0.0, late_ms=0.0))
    for number in range(2):
        queue.add(f"long {number}", 3800, 3)
    queue.step(2)
    for number in range(4):
        queue.add(f"short {number}", 30, 3)
    queue.step(12)
    assert {f"short {number}" for number in range(4)} <= set(queue.first) and "long 0" not in queue.first
    queue.end()


def test_idle_sessions_keep_their_kv_in_steps_without_prompts(vllm_config: Any) -> None:  # noqa: F811
    """That nothing runs at a rank in such a step does not mean that it is stuck."""
    queue = paced(vllm_config, PrefillGap(ms=30.0, decode_steps=50, fill=1.0, late_ms=10_000.0))
    queue.add("first", 20, 100)
    queue.step(3)
    queue.add("second", 40, 3)
    gave_way = []
    for rank in queue.scheduler.ranks:
        rank.give_way = lambda: gave_way.append(1)  # type: ignore[method-assign]
    queue.step(10)
    assert "second" not in queue.first and not gave_way
    queue.step(100)
    assert "second" in queue.first
    queue.end()


def test_one_that_moves_with_drafts_is_no_prompt(vllm_config: Any) -> None:  # noqa: F811
    """It computes a part of a block again at its new home, and does not wait for a step with prompts."""
    gap = PrefillGap(ms=30.0, decode_steps=50, fill=1.0, late_ms=10_000.0)
    queue = paced(with_drafts(vllm_config, 3), gap, moves=MOVES[0] | {"max_moves": 0})
    for name in ("moves", "stays"):
        queue.add(name, 20, 100)
    queue.step(5)
    queue.add("prompt", 400, 3)
    scheduler, made = queue.scheduler, queue.num_tokens["moves"]
    home = scheduler.rank_of["moves"]
    scheduler.mover._leave("moves", home, 1 - home)
    queue.step(10)
    assert scheduler.rank_of["moves"] == 1 - home and "prompt" not in queue.first
    assert queue.num_tokens["moves"] == made + 10
    queue.end()


def test_drafts_are_not_learnt_as_prompts(vllm_config: Any) -> None:  # noqa: F811
    queue = paced(with_drafts(vllm_config, 3), PrefillGap())
    learnt: list[int] = []
    queue.scheduler.pacing.steps.observe = lambda tokens, *_: learnt.append(tokens)  # type: ignore
    for number in range(4):
        queue.add(f"r{number}", 20, 60)
    for _ in range(10):
        output = queue.scheduler.schedule()
        queue.scheduler.update_from_output(output, queue.device.execute(output))
        queue.scheduler.update_draft_token_ids(queue.device.propose(output, lambda *_: [WRONG] * 3))
    assert sum(learnt) == learnt[0] == 80 and queue.device.drafts["verified"]
    queue.end()


def test_a_prefix_is_followed_no_less_in_bounded_steps(vllm_config: Any) -> None:  # noqa: F811
    """Who computes it for others waits behind a long prompt. That steps compute little of prompts is no sign of want of
    room, and takes none of the patience: little more is computed than where steps are full, in which the leader has a
    part sooner, as one of the shortest: half of the prefix for one of two followers. All of it for both were 3,200."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256)

    def computed(paces: bool) -> int:
        gap = PrefillGap(ms=30.0, decode_steps=0, fill=0.0, late_ms=0.0)
        queue = paced(vllm_config, gap, caching=True, segment=1000)
        queue.scheduler.pacing = queue.scheduler.pacing if paces else None

        def add(name: str, prompt: list[int]) -> None:
            truth = queue.truths[name] = Truth(len(queue.truths), prompt, 3, salt=0, stops=False)
            params, came = SamplingParams(max_tokens=3, ignore_eos=True), float(len(queue.truths))
            request = Request(name, list(prompt), params, None, arrival_time=came, block_hasher=hasher)
            assert truth.num_prompt == len(prompt)
            queue.scheduler.add_request(request)

        for number in range(2):
            add(f"long {number}", [100 + number] * 3200)
        queue.step()
        for number in range(3):
            add(f"twin {number}", [7] * 1600 + [20 + number] * 16)
        queue.end()
        assert queue.scheduler.prefixes.num_set_aside
        return queue.scheduler.num_tokens

    assert computed(True) <= computed(False) + 800
