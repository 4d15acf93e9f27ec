# SPDX-License-Identifier: Apache-2.0
"""When workers fail, or the server is told to stop: clients get an end, and nothing is left on the machine.

``NANOCP_FAULT_REPEATS=N`` runs each test N times; ``NANOCP_FAULT_ALL=1`` adds the cases in which another rank fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from .clients import Client, check_clients_ended, left_of, queues_of, running_clients, shared_memory
from .serving import FLAGS, RANKS, START_LIMIT_S, Server, is_resource_tracker, serving, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HOOK = Path(__file__).parent / "hook"
HOOK_FAILURE = "a failure that a test has asked for"
FIRST, LAST = 0, RANKS - 1
STEP_LIMIT_S = 5
# One API server, in the server's own process: it starts sooner.
ONE = [*FLAGS, "--api-server-count=1"]
# And the ranks' schedulers in processes of their own.
APART = ['{"segment_size": 512, "scheduler_processes": true}' if flag.startswith("{") else flag for flag in ONE]
# After these the server has given up on its workers, which it kills when they do not end by themselves.
END_LIMIT_S = 60.0
ALL_CASES = os.environ.get("NANOCP_FAULT_ALL", "0") == "1"


def failing(**what: Any) -> dict[str, str]:
    """The environment in which a worker raises."""
    return {"PYTHONPATH": str(HOOK), "NANOCP_TEST_HOOK": json.dumps(what)}


def ends_with_a_line(server: Server, clients: list[Client], since: float, limit: float = END_LIMIT_S) -> None:
    """The clients are told, the server ends by itself with exit code 1 and says so, and nothing is left of it."""
    check_clients_ended(clients, limit)
    assert all(client.told for client in clients), [(client.error, client.events[-1]) for client in clients]
    assert server.process.wait(max(1.0, limit - (time.monotonic() - since))) == 1
    # Not after a newline: others write to the same file, and some end without one.
    assert "error: nanocp: the engine has failed; the log above says why\n" in server.text()
    nothing_left(server)


def clients_of(server: Server) -> list[Client]:
    """Clients of which all are decoding. The server's shared memory has no names then, which could be left of it."""
    clients = running_clients(server)
    shared = shared_memory(server.members())
    assert len(queues_of(shared)) >= 1 + RANKS, "one to the workers, one from each: otherwise there is nothing to find"
    assert not left_of(shared)
    return clients


def nothing_left(server: Server) -> None:
    """No process; shared memory without a name goes with them."""
    wait_for("no process is left", lambda: not server.members(), 20)


@pytest.fixture(params=[FLAGS], ids=["default"])
def doomed(request: pytest.FixtureRequest, tiny_model: str, tmp_path: Path) -> Iterator[Server]:
    """A server of one test's own, with the flags that the test asks for."""
    with serving(tiny_model, tmp_path / "serve.log", request.param, spawn=request.param != FLAGS) as server:
        yield server


def api_servers(server: Server) -> list[psutil.Process]:
    """Those that are processes of their own."""
    return [process for process in server.members() if "APIServer" in process.name()]


@pytest.mark.parametrize(
    ("doomed", "rank", "count"),
    [(ONE, FIRST, 0), (FLAGS, LAST, RANKS)] if ALL_CASES else [(FLAGS, LAST, RANKS)],
    indirect=["doomed"],
    ids=["one", "default"] if ALL_CASES else ["default"],
)
def test_a_worker_is_killed(doomed: Server, rank: int, count: int) -> None:
    """Clients are told, whichever API server they are connected to; the server ends, as stock vLLM's does, and takes
    the other rank with it."""
    workers = doomed.workers()
    assert len(workers) == RANKS and len(api_servers(doomed)) == count
    [victim] = [worker for worker in workers if f"DP{rank}" in worker.name()]
    clients = clients_of(doomed)
    victim.kill()
    ends_with_a_line(doomed, clients, time.monotonic())


@pytest.mark.parametrize("doomed", [APART], indirect=True, ids=["processes"])
def test_a_scheduler_process_is_killed(doomed: Server) -> None:
    """It is as much a part of the engine as a worker."""
    victims = [process for process in doomed.members() if "RankScheduler" in process.name()]
    assert len(victims) == RANKS
    clients = clients_of(doomed)
    victims[-1].kill()
    ends_with_a_line(doomed, clients, time.monotonic())


@pytest.mark.parametrize("doomed", [ONE], indirect=True, ids=["one"])
def test_all_are_killed(doomed: Server) -> None:
    """Nobody removes the names of their shared memory then: there must be none."""
    clients = running_clients(doomed)
    members = doomed.members()
    shared = shared_memory(members)
    assert len(queues_of(shared)) >= 1 + RANKS, "otherwise there is nothing to find"
    [tracker] = filter(is_resource_tracker, members)
    tracker.suspend()  # as good as killed, but it can tidy up after the test
    try:
        for process in members:
            if process != tracker:
                process.kill()
        wait_for("nobody else is left", lambda: doomed.members() == [tracker], 20)
        check_clients_ended(clients, 20)
        assert not left_of(shared)
    finally:
        tracker.resume()
    nothing_left(doomed)


@pytest.mark.parametrize("rank", [FIRST, LAST] if ALL_CASES else [LAST])
def test_a_worker_is_stopped(tiny_model: str, tmp_path: Path, rank: int) -> None:
    """It does not die, it does not answer: the engine waits as long as vLLM is told to, and ends."""
    env = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_LIMIT_S)}
    with serving(tiny_model, tmp_path / "serve.log", ONE, env) as server:
        [victim] = [worker for worker in server.workers() if f"DP{rank}" in worker.name()]
        clients = clients_of(server)
        victim.suspend()
        ends_with_a_line(server, clients, time.monotonic())


@pytest.mark.parametrize("rank", [FIRST, LAST] if ALL_CASES else [LAST])
def test_a_worker_raises_in_a_step(tiny_model: str, tmp_path: Path, rank: int) -> None:
    """The other rank waits for it in a collective, and the engine for neither. The log has the reason."""
    armed = tmp_path / "armed"
    env = failing(where="step", worker=rank, armed=str(armed))
    with serving(tiny_model, tmp_path / "serve.log", ONE, env) as server:
        clients = clients_of(server)
        armed.touch()
        ends_with_a_line(server, clients, time.monotonic())
        assert f"Worker failed with error '{HOOK_FAILURE}" in server.text()


@pytest.mark.parametrize(
    ("where", "rank"),
    [("init", LAST), ("load", FIRST), ("init", FIRST), ("load", LAST)][: None if ALL_CASES else 1],
)
def test_a_worker_fails_to_start(tiny_model: str, tmp_path: Path, where: str, rank: int) -> None:
    """The others wait for it to join, or to load: the start ends with exit code 1, and the log has the reason."""
    armed = tmp_path / "armed"
    env = failing(where=where, worker=rank, armed=str(armed))
    with serving(tiny_model, tmp_path / "serve.log", ONE, env, False) as server:
        named: set[str] = set()
        end = time.monotonic() + START_LIMIT_S
        while server.process.poll() is None and time.monotonic() < end:
            named |= left_of(shared_memory(server.members()))
            if queues_of(named):
                armed.touch()
            time.sleep(0.5)
        try:
            assert server.process.wait(1) == 1
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still starts:\n{server.tail()}") from None
        assert f"RuntimeError: {HOOK_FAILURE}" in server.text()
        assert "Engine core initialization failed" in server.text()
        nothing_left(server)
        assert queues_of(named), "names are there until all workers are connected, otherwise there is nothing to find"
        assert not left_of(named)


def test_the_server_is_told_to_stop_while_it_starts(tiny_model: str, tmp_path: Path) -> None:
    """Its engine loads the model, and nobody serves yet."""
    with serving(tiny_model, tmp_path / "serve.log", APART, wait=False) as server:
        wait_for(
            "the workers start", lambda: "RankScheduler" in " ".join(p.name() for p in server.members()), START_LIMIT_S
        )
        assert not server.healthy()
        assert server.terminate() != 0
        nothing_left(server)


def test_the_server_is_told_to_stop(doomed: Server) -> None:
    """SIGTERM in the middle of requests: the engine ends at once, the server when its clients are gone.

    vLLM 0.32 kills the engine right after telling it to abort its requests. Where a step takes longer than that, no
    client hears of it, and the server waits for them to close their connections: stock vLLM with 24 layers, too.
    """
    clients = clients_of(doomed)
    assert len(api_servers(doomed)) == RANKS
    engine = {p.pid for p in doomed.members() if p.name().startswith("VLLM")} - {p.pid for p in api_servers(doomed)}
    assert len(engine) >= 1 + RANKS  # and schedulers, in the other form
    doomed.process.terminate()
    wait_for("the engine has ended", lambda: not {p.pid for p in doomed.members()} & engine, 20)
    for client in clients:
        client.leave()
    assert doomed.process.wait(20) == 0
    check_clients_ended(clients, 20)
    nothing_left(doomed)
