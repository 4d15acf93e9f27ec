# SPDX-License-Identifier: Apache-2.0
"""An actor, a node or Ray's head dies: clients get an end, the server ends with a line that says why, nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.server.clients import check_clients_ended, left_of, queues_of, running_clients, shared_memory
from tests.server.serving import FLAGS, START_LIMIT_S, Server, serving, wait_for

from .nodes import Nodes

pytestmark = pytest.mark.engine

LIMIT_S = 60.0
# Two ranks on the first node, one on the second.
ON_RAY = [*FLAGS, "--data-parallel-size=3", "--api-server-count=1", "--distributed-executor-backend=ray"]
# Which of the two is noticed first depends: that the actor is gone, or that another one lost the connection to it.
ACTOR_GONE = ("died unexpectedly, shutting down executor", "Worker failed with error")
# Seconds after which Ray gives up on its head: soon, where a test waits for that, or later than the engine has to.
SOON, LATE = 10, 30


@pytest.fixture
def doomed(tiny_model: str, nodes: Nodes, tmp_path: Path) -> Iterator[Server]:
    """A server with three ranks on two nodes."""
    with serving(tiny_model, tmp_path / "serve.log", ON_RAY) as server:
        yield server


@pytest.fixture
def headless(tiny_model: str, own_nodes: Nodes, tmp_path: Path) -> Iterator[Server]:
    """The same in a cluster of one test's own."""
    with serving(tiny_model, tmp_path / "serve.log", ON_RAY) as server:
        yield server


def check_clean_end(
    server: Server,
    nodes: Nodes,
    kill: Callable[[], object],
    reasons: tuple[str, ...] = ACTOR_GONE,
    idle: bool = False,
    limit: float = LIMIT_S,
) -> None:
    """``limit``: seconds for the server to end in; its actors have ``LIMIT_S``."""
    workers = nodes.all_workers()
    assert len(workers) == 3
    clients = [] if idle else running_clients(server)
    shared = shared_memory([*server.members(), *workers])
    assert len(queues_of(shared)) >= 3, "one to the actors, two from those of the first node"
    assert not left_of(shared), "what has no name any more cannot be left"
    kill()
    killed = time.monotonic()
    check_clients_ended(clients, limit)
    assert all(client.told for client in clients), [(client.error, client.events[-1]) for client in clients]
    code = server.process.wait(max(1.0, limit - (time.monotonic() - killed)))
    ended = time.monotonic()
    assert code > 0, "by itself, and not as if all were well"
    said = server.text()
    assert any(reason in said for reason in reasons), server.tail()
    assert "error: nanocp: the engine has failed; the log above says why" in said
    wait_for("no process of the server is left", lambda: not server.members(), 20)
    gone, alive = psutil.wait_procs(workers, timeout=max(1.0, LIMIT_S - (time.monotonic() - killed)))
    assert not alive and len(gone) == len(workers)
    print(f"server ended {ended - killed:.1f} s after, all workers {time.monotonic() - killed:.1f} s")


def test_an_actor_is_killed(doomed: Server, nodes: Nodes) -> None:
    """The other two wait for it in a collective, and end too."""
    check_clean_end(doomed, nodes, nodes.workers(nodes.second)[0].kill)


def test_a_raylet_is_killed(doomed: Server, nodes: Nodes) -> None:
    """Its actors go with it, and the engine's answer is awaited from there."""
    try:
        check_clean_end(doomed, nodes, nodes.kill_second)
    finally:
        nodes.add_second()


@pytest.mark.parametrize("own_nodes", [SOON], indirect=True)
def test_the_gcs_is_killed(headless: Server, own_nodes: Nodes) -> None:
    """Requests go on while Ray waits for it to come back, and end when Ray gives up and ends all its processes."""
    reasons = (f"Failed to connect to GCS within {SOON} seconds", *ACTOR_GONE)
    check_clean_end(headless, own_nodes, own_nodes.kill_gcs, reasons)


@pytest.mark.parametrize("own_nodes", [LATE], indirect=True)
@pytest.mark.parametrize("idle", [False, True], ids=["decoding", "idle"])
def test_the_head_is_killed(headless: Server, own_nodes: Nodes, idle: bool) -> None:
    """The actors beside it go at once, and the server before Ray gives up; the actor of the other node with that."""
    check_clean_end(headless, own_nodes, own_nodes.kill_head, idle=idle, limit=LATE - 5)


# An engine whose actor dies when it has answered all questions of the start: before it is told to run its loop
# ("asked"), or when all queues are connected and nobody watches it yet ("connected"). Or the start fails by itself when
# all actors are ready to be asked for their queues ("failed").
DIES_AT_START = """
import os, signal, sys, time
import ray
from vllm import LLM
from vllm.v1.executor.ray_executor_v2 import RayWorkerHandle
from vllm_nanocp.executor.ray.executor import NanoCPRayExecutor

model, point, victim = sys.argv[1], sys.argv[2], int(sys.argv[3])
run, watch, get = RayWorkerHandle.run, NanoCPRayExecutor.start_worker_monitor, ray.get
pids = {}

def say():
    print("\\nnow", flush=True)

def kill():
    os.kill(pids[victim], signal.SIGKILL)
    say()

def run_or_kill(handle):
    pids[handle.rank] = get(handle.actor.__ray_call__.remote(lambda actor: os.getpid()))
    if (point, victim) == ("asked", handle.rank):
        kill()
    run(handle)

def kill_and_watch(executor):
    if point == "connected":
        kill()
    watch(executor)

def get_or_fail(*args, **kwargs):
    found = get(*args, **kwargs)
    if point == "failed" and found == [None] * 3:
        time.sleep(2)  # for the test to see what there is
        say()
        raise RuntimeError("a failure that a test has asked for")
    return found

RayWorkerHandle.run = run_or_kill
NanoCPRayExecutor.start_worker_monitor = kill_and_watch
ray.get = get_or_fail
LLM(
    model=model, dtype="float32", enforce_eager=True, max_model_len=4096, block_size=32, num_gpu_blocks_override=90,
    enable_expert_parallel=True, additional_config={"nanocp": {"ranks": 3}}, distributed_executor_backend="ray",
)
"""
UNWATCHED = "RuntimeError: RayWorkerProc rank=[{}] died unexpectedly before the engine was up"
WATCHED = "RayWorkerProc rank=[{}] died unexpectedly, shutting down executor"


@pytest.mark.parametrize(
    ("point", "victim", "reason"),
    [
        # The first one is heard through shared memory, the last one, on the other node, through a socket.
        ("asked", 0, UNWATCHED),
        ("asked", 2, UNWATCHED),
        ("connected", 2, WATCHED),
        ("failed", -1, "RuntimeError: a failure that a test has asked for"),
    ],
    ids=["asked-first", "asked-last", "connected", "failed"],
)
def test_a_start_fails_late(
    tiny_model: str, nodes: Nodes, tmp_path: Path, point: str, victim: int, reason: str
) -> None:
    """The engine's process ends with the reason, and nothing is left of its actors."""
    command = [sys.executable, "-c", DIES_AT_START, tiny_model, point, str(victim)]
    # The hooks are for this process.
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path / "engine.log"
    workers: set[psutil.Process] = set()
    shared: set[str] = set()
    with log.open("wb") as sink, subprocess.Popen(command, env=env, stdout=sink, stderr=sink) as process:

        def has_happened() -> bool:
            workers.update(nodes.all_workers())
            shared.update(shared_memory([psutil.Process(process.pid), *workers]))
            said = log.read_text(errors="replace")
            assert process.poll() is None, said[-4000:]
            return "\nnow\n" in said

        try:
            wait_for("the start comes to that point", has_happened, START_LIMIT_S)
            since = time.monotonic()
            assert process.wait(LIMIT_S) == 1
        finally:
            process.kill()
    print(f"ended {time.monotonic() - since:.1f} s after")
    assert reason.format(victim) in log.read_text(errors="replace")
    assert len(workers) == 3 and queues_of(shared)
    wait_for("no actor is left", lambda: not nodes.all_workers(), 20)
    wait_for("no shared memory is left", lambda: not left_of(shared), 20)
