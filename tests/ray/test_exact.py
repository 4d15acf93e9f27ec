# SPDX-License-Identifier: Apache-2.0
"""Ranks that are Ray actors on two nodes: tokens and logprobs of stock vLLM on one rank, and all blocks come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import pytest

from tests.engine.harness import BLOCK, CHUNK, Ask, Engine, assert_same_logprobs, prompt

from .nodes import Nodes

pytestmark = pytest.mark.engine

# Around block, chunk and segment borders; up to three shards.
LENGTHS = [1, 17, BLOCK, BLOCK + 1, 255, CHUNK, CHUNK + 1, 700, 1023, 1025, 1300, 1537, 2049, 2500, 3073, 4000, 6001]


def asks(lengths: list[int], text: int, **params: object) -> list[Ask]:
    return [
        Ask(prompt(n, text * 1000 + i), dict(params), delay=(i * 7919) % len(lengths) / len(lengths))
        for i, n in enumerate(lengths)
    ]


def compare(stock: Engine, ours: Engine, lengths: list[int]) -> None:
    requests = asks(lengths, 1, logprobs=5, max_tokens=12)
    for length, answer, expected in zip(lengths, ours.ask(requests), stock.ask(requests), strict=True):
        assert answer.tokens == expected.tokens, length
        assert_same_logprobs(answer.logprobs[0], expected.logprobs[0], 1e-3)
    degrees = {sum(held > 0 for held in shares) for shares in ours.status()["finished"].values()}
    assert max(degrees) == ours.ranks
    ours.check_nothing_left()


@pytest.mark.every_run
@pytest.mark.timeout(600)  # a cluster and two engines start, beside other tests
def test_three_ranks(nodes: Nodes, engines: Callable[..., Engine]) -> None:
    """Two on the engine's node, one on the other."""
    stock, ours = engines("stock"), engines("three")
    assert (len(nodes.workers(nodes.cluster.head_node)), len(nodes.workers(nodes.second))) == (2, 1)
    compare(stock, ours, LENGTHS)


def test_sampling_and_aborts(engines: Callable[..., Engine]) -> None:
    """Clients that leave in the middle, of short and of sharded requests, change nothing for the others."""
    stock, ours = engines("stock"), engines("three")
    requests = asks([60, 1600, 2600], 3, temperature=0.8, seed=11, top_p=0.9, max_tokens=24)
    leaving = [Ask(prompt(n, n), dict(max_tokens=200), leave_after=3) for n in (40, 2000, 3500)]
    answers = ours.ask([*leaving, *requests])[len(leaving) :]
    assert [a.tokens for a in answers] == [a.tokens for a in stock.ask(requests)]
    ours.check_nothing_left()


def test_four_ranks(nodes: Nodes, engines: Callable[..., Engine]) -> None:
    """Two on each node."""
    stock, ours = engines("stock"), engines("four")
    assert (len(nodes.workers(nodes.cluster.head_node)), len(nodes.workers(nodes.second))) == (2, 2)
    compare(stock, ours, LENGTHS)


def test_two_ranks_of_two_workers(nodes: Nodes, engines: Callable[..., Engine]) -> None:
    """A rank on each node."""
    stock, ours = engines("stock"), engines("two-by-two")
    assert (len(nodes.workers(nodes.cluster.head_node)), len(nodes.workers(nodes.second))) == (2, 2)
    compare(stock, ours, LENGTHS[::3])


def test_actors_end_with_their_engine(nodes: Nodes, engines: Callable[..., Engine]) -> None:
    """An engine process that is killed leaves no actor behind."""
    engine = engines("two-by-two")
    workers = nodes.all_workers()
    assert len(workers) == 4
    cores = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::EngineCor")]
    (core,) = [process for process in cores if _uses_ray(process, nodes)]
    core.kill()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 4 and not alive
    with pytest.raises(Exception):  # noqa: B017
        engine.call(_generate(engine), 30)


def _uses_ray(process: psutil.Process, nodes: Nodes) -> bool:
    port = int(nodes.address.rsplit(":", 1)[1])
    return any(c.raddr and c.raddr.port == port for c in process.net_connections())


async def _generate(engine: Engine) -> None:
    await asyncio.sleep(0)
    await engine._ask(Ask([5, 6, 7]))
