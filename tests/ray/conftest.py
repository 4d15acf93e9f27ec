# SPDX-License-Identifier: Apache-2.0
"""One cluster for all tests here; engines are slow to start and shared, too.

Of those that start raylets, only what is marked ``every_run`` runs without ``NANOCP_RAY_TESTS=1``: two cores need ten
minutes for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.engine.harness import Engine
from vllm_nanocp.environment import variable

from .nodes import GIVE_UP, Nodes, two_nodes

CLUSTERS = {"nodes", "own_nodes"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    starts = CLUSTERS & set(getattr(item, "fixturenames", ()))
    if starts and os.environ.get("NANOCP_RAY_TESTS") != "1" and item.get_closest_marker("every_run") is None:
        pytest.skip("starts a Ray cluster: NANOCP_RAY_TESTS=1")


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as found:
        yield found


@pytest.fixture
def own_nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """A cluster whose head a test may kill. The parameter: seconds after which Ray's processes give up on that."""
    with variable(GIVE_UP, str(request.param)), two_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def engines(tiny_model: str, nodes: Nodes) -> Iterator[Callable[..., Engine]]:
    """Starts engines by name, once; stock vLLM with one rank, and ranks on both nodes."""
    running: dict[str, Engine] = {}
    on_ray = dict(distributed_executor_backend="ray")
    recipes: dict[str, dict[str, Any]] = {
        "stock": dict(ranks=1, max_num_batched_tokens=1 << 17, num_gpu_blocks_override=4096),
        # Fills the first node, and half of the second one.
        "three": dict(ranks=3, nanocp={"segment_size": 512}, enable_prefix_caching=True, **on_ray),
        # All of both nodes.
        "four": dict(ranks=4, nanocp={"segment_size": 512}, **on_ray),
        # A rank of two workers on each node.
        "two-by-two": dict(ranks=2, nanocp={"segment_size": 512}, tensor_parallel_size=2, **on_ray),
    }

    def get(name: str) -> Engine:
        for other in [key for key in running if key not in ("stock", name)]:
            running.pop(other).close()
        if name not in running:
            running[name] = Engine(tiny_model, **recipes[name])
        return running[name]

    yield get
    for engine in running.values():
        engine.close()
