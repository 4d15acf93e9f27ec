# SPDX-License-Identifier: Apache-2.0
"""An actor or a whole node dies: clients get an end, the server ends with a line that says why, nothing is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.server.clients import check_clients_ended, left_of, running_clients, shared_memory
from tests.server.serving import FLAGS, Server, wait_for

from .nodes import Nodes

pytestmark = pytest.mark.engine

LIMIT_S = 60.0
# Two ranks on the first node, one on the second.
ON_RAY = [*FLAGS, "--data-parallel-size", "3", "--distributed-executor-backend", "ray"]


@pytest.fixture
def doomed(tiny_model: str, nodes: Nodes, tmp_path: Path) -> Iterator[Server]:
    """A server with three ranks on two nodes."""
    server = Server(tiny_model, tmp_path / "serve.log", ON_RAY)
    try:
        yield server
    finally:
        server.close()


def check_clean_end(server: Server, nodes: Nodes, kill: object) -> None:
    workers = nodes.all_workers()
    assert len(workers) == 3
    clients = running_clients(server)
    shared = shared_memory([*server.members(), *workers])
    assert left_of(shared), "otherwise there is nothing to find"
    assert callable(kill)
    kill()
    killed = time.monotonic()
    check_clients_ended(clients, LIMIT_S)
    assert all(client.told for client in clients), [(client.error, client.events[-1]) for client in clients]
    code = server.process.wait(max(1.0, LIMIT_S - (time.monotonic() - killed)))
    assert code > 0, "by itself, and not as if all were well"
    # Which of the two is noticed first depends: that the actor is gone, or that another one lost the connection to it.
    said = server.log.read_text(errors="replace")
    assert "died unexpectedly, shutting down executor" in said or "Worker failed with error" in said
    assert "error: nanocp: the engine has failed; the log above says why" in said
    wait_for("no process of the server is left", lambda: not server.members(), 20)
    gone, alive = psutil.wait_procs(workers, timeout=max(1.0, LIMIT_S - (time.monotonic() - killed)))
    assert not alive and len(gone) == len(workers)
    wait_for("no shared memory is left", lambda: not left_of(shared), 20)
    print(f"ended {time.monotonic() - killed:.1f} s after")


def test_an_actor_is_killed(doomed: Server, nodes: Nodes) -> None:
    """The other two wait for it in a collective, and end too."""
    check_clean_end(doomed, nodes, nodes.workers(nodes.second)[0].kill)


def test_a_raylet_is_killed(doomed: Server, nodes: Nodes) -> None:
    """Its actors go with it, and the engine's answer is awaited from there."""
    try:
        check_clean_end(doomed, nodes, nodes.kill_second)
    finally:
        nodes.add_second()
