# SPDX-License-Identifier: Apache-2.0
"""Requests that are preempted, aborted, too large for a rank, paused or reset; and steps that must stay stock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import SMALL_BLOCKS
from .harness import BLOCK, Ask, Engine, prompt

pytestmark = pytest.mark.engine


def tokens(engine: Engine, requests: list[Ask]) -> list[list[list[int]]]:
    return [answer.tokens for answer in engine.ask(requests)]


def test_larger_than_a_rank(stock: Engine, small: Engine) -> None:
    """Longer than one rank's cache by far; two of them, so that one waits for the other."""
    assert (SMALL_BLOCKS - 1) * BLOCK < 3800
    requests = [Ask(prompt(3800, 21)), Ask(prompt(3000, 22)), Ask(prompt(100, 23))]
    assert tokens(small, requests) == tokens(stock, requests)


def test_as_long_as_the_model_allows(stock: Engine, small: Engine) -> None:
    requests = [Ask(prompt(4095, 24), dict(max_tokens=1)), Ask(prompt(4000, 25), dict(max_tokens=96))]
    assert tokens(small, requests) == tokens(stock, requests)


def test_preemption(engines: Callable[..., Engine], stock: Engine, small: Engine) -> None:
    """So many that stock, with as small a cache, preempts: same tokens as without preemption."""
    requests = [Ask(prompt(200 + 37 * i, 100 + i), dict(max_tokens=150), delay=0.02 * i) for i in range(16)]
    expected = tokens(stock, requests)
    small_stock = engines("small-stock")
    assert tokens(small_stock, requests) == expected
    before = small.status()["preemptions"]
    assert tokens(small, requests) == expected
    heavier = [
        *requests,
        *(Ask(prompt(1400 + 100 * i, 200 + i), dict(max_tokens=120), delay=0.05 * i) for i in range(5)),
    ]
    assert tokens(small, heavier) == tokens(stock, heavier)
    assert small.status()["preemptions"] > before


def test_seeded_sampling_survives_preemption(stock: Engine, small: Engine) -> None:
    params = dict(temperature=0.9, seed=3, max_tokens=140, repetition_penalty=1.2)
    requests = [Ask(prompt(300 + 61 * i, 300 + i), params) for i in range(12)]
    before = small.status()["preemptions"]
    assert tokens(small, requests) == tokens(stock, requests)
    assert small.status()["preemptions"] > before


@pytest.mark.parametrize("leave_after", [1, 5])
def test_clients_that_leave(stock: Engine, nanocp: Engine, leave_after: int) -> None:
    """Half of the clients leave in mid-answer; the others get what they would have got."""
    requests = [
        Ask(prompt(n, 400 + i), dict(max_tokens=40), leave_after=leave_after if i % 2 else None)
        for i, n in enumerate([30, 1200, 1500, 2500, 3300, 60, 4100, 2200])
    ]
    ours, theirs = nanocp.ask(requests), stock.ask(requests)
    for ask, mine, other in zip(requests, ours, theirs, strict=True):
        if ask.leave_after is None:
            assert mine.tokens == other.tokens


def test_aborts_at_any_stage(nanocp: Engine) -> None:
    """Aborted before placement, in each run of the prefill, and while decoding."""

    async def abort_all(engine: Engine) -> None:
        first = engine._serial
        for wait in (0.0, 0.05, 0.15, 0.3, 0.6):
            await asyncio.sleep(wait)
            await engine.llm.abort([f"ask-{first + i}" for i in range(1, 20)])

    requests = [
        Ask(prompt(n, 500 + n), dict(max_tokens=2000), delay=0.12 * i)
        for i, n in enumerate([3000, 5000, 7000, 800, 6000])
    ]
    nanocp.ask(requests, abort_all)

    async def abort_rest(engine: Engine) -> None:
        await asyncio.sleep(1.0)
        await engine.llm.abort([f"ask-{i}" for i in range(engine._serial - 8, engine._serial + 1)])

    nanocp.ask(requests, abort_rest)


def test_pause_and_resume(stock: Engine, nanocp: Engine) -> None:
    requests = [
        Ask(prompt(n, 600 + n), dict(max_tokens=60), delay=0.1 * i) for i, n in enumerate([50, 2600, 1800, 4000])
    ]

    async def pause(engine: Engine) -> None:
        await asyncio.sleep(0.15)
        for mode in ("keep", "wait"):
            await asyncio.wait_for(engine.llm.pause_generation(mode=mode, clear_cache=False), 120)
            await asyncio.sleep(0.1)
            await engine.llm.resume_generation()

    ours = [answer.tokens for answer in nanocp.ask(requests, pause)]
    assert ours == tokens(stock, requests)


def test_reset_prefix_cache_with_running_requests(stock: Engine, nanocp: Engine) -> None:
    requests = [
        Ask(prompt(n, 700 + n), dict(max_tokens=80), delay=0.1 * i) for i, n in enumerate([50, 2600, 1800, 4000])
    ]

    async def reset(engine: Engine) -> None:
        for _ in range(3):
            await asyncio.sleep(0.3)
            assert await engine.llm.reset_prefix_cache(reset_running_requests=True)

    ours = [answer.tokens for answer in nanocp.ask(requests, reset)]
    assert ours == tokens(stock, requests)
    assert nanocp.call(nanocp.llm.reset_prefix_cache())


def test_priorities(small: Engine, stock: Engine) -> None:
    """A full cache; the urgent ones come last. All are served, and right."""
    requests = [
        Ask(prompt(900 + 50 * i, 800 + i), dict(max_tokens=60), delay=0.02 * i, priority=10 - i) for i in range(10)
    ]
    assert tokens(small, requests) == tokens(stock, requests)


def _count_collectives(worker: Any, start: bool) -> dict[str, int]:
    """In the worker: count the experts' gathers and scatters, agreements on sizes, and calls of the exchange."""
    import torch.distributed as dist
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    from vllm_nanocp.attention.context import context

    assert context.exchange is not None
    places = [(CpuCommunicator, "all_gatherv"), (CpuCommunicator, "reduce_scatterv"), (dist, "all_reduce")]
    if start:
        counts = {"exchange": -context.exchange.calls}  # type: ignore[attr-defined]
        for owner, name in places:
            original = getattr(owner, name)
            counts[name] = 0

            def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                counts[_name] += 1
                return _original(*args, **kwargs)

            counted.original = original  # type: ignore[attr-defined]
            setattr(owner, name, counted)
        worker._test_counts = counts
        return {}
    for owner, name in places:
        setattr(owner, name, getattr(owner, name).original)
    worker._test_counts["exchange"] += context.exchange.calls  # type: ignore[attr-defined]
    counted_here: dict[str, int] = worker._test_counts
    return counted_here


def test_short_requests_cost_what_stock_costs(two: Engine) -> None:
    """Per layer: the experts' one gather and one scatter. No exchange; no agreement on sizes, which the plan has.

    Stock vLLM's data parallelism does as much (``AgRsAll2AllManager``), and asks once a step
    (``coordinate_batch_across_dp``).
    """
    layers = 4

    def count(requests: list[Ask]) -> tuple[list[dict[str, int]], int]:
        """What each worker counted, and how often the scheduler was called."""
        before = two.status()["steps"]
        two.call(two.llm.collective_rpc(_count_collectives, args=(True,)))
        two.ask(requests)
        two.check_nothing_left()
        counts: list[dict[str, int]] = two.call(two.llm.collective_rpc(_count_collectives, args=(False,)))
        return counts, two.status()["steps"] - before

    short, most = count([Ask(prompt(n, 900 + n)) for n in (10, 100, 500, 900)])
    for counts in short:
        steps, rest = divmod(counts["all_gatherv"], layers)
        assert not rest and 16 < steps <= most
        assert counts["reduce_scatterv"] == layers * steps
        assert counts["all_reduce"] == counts["exchange"] == 0
    long, most = count([Ask(prompt(1500, 950))])
    for counts in long:
        steps, rest = divmod(counts["all_gatherv"], layers)
        assert not rest and 16 < steps <= most
        assert counts["reduce_scatterv"] == layers * steps and counts["all_reduce"] == 0
        assert 0 < counts["exchange"] <= 2 * layers * steps and counts["exchange"] % (2 * layers) == 0
