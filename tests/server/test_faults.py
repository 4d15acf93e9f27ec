# SPDX-License-Identifier: Apache-2.0
"""When a worker dies, or the server is told to stop: clients get an end, and nothing is left on the machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.engine.harness import prompt

from .serving import ANSWER_LIMIT_S, RANKS, Server, serving, wait_for

pytestmark = pytest.mark.engine

LONG = 3500
# What the client of a request that is cut off may see of it, at most.
MANY = 560


class Client(threading.Thread):
    """Streams one answer and keeps what came: events, an error, and when it ended."""

    def __init__(self, server: Server, tokens: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.body = dict(model=server.model, prompt=tokens, max_tokens=max_tokens, ignore_eos=True, stream=True)
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.error: Exception | None = None
        self._sock: socket.socket | None = None

    def leave(self) -> None:
        """Close the connection, also while nothing comes."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            with (
                httpx.Client(base_url=self.server.url, timeout=ANSWER_LIMIT_S, trust_env=False) as client,
                client.stream("POST", "/v1/completions", json=self.body) as response,
            ):
                self._sock = response.extensions["network_stream"].get_extra_info("socket")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line:
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, ValueError) as error:
            self.error = error

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for event in list(self.events) for choice in event.get("choices", [])]

    @property
    def finished(self) -> bool:
        """Whether it was told that its answer is complete."""
        reasons = [choice["finish_reason"] for event in self.events for choice in event.get("choices", [])]
        return any(reason in ("length", "stop") for reason in reasons)

    @property
    def told(self) -> bool:
        """Whether it can tell that its answer is not complete: an error event, or a connection that broke."""
        return self.error is not None or any("error" in event for event in self.events)


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Names under /dev/shm that the processes map or hold open. Others use that folder too."""
    names: set[str] = set()
    for process in processes:
        proc = Path("/proc") / str(process.pid)
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/([^\s/]+)", (proc / "maps").read_text()))
        with contextlib.suppress(OSError):
            for link in (proc / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("/dev/shm/"):
                        names.add(target.removeprefix("/dev/shm/").split(" ")[0])
    return names


def left_of(names: set[str]) -> set[str]:
    return names & set(os.listdir("/dev/shm"))


def running_clients(server: Server) -> list[Client]:
    """A long request, sharded, and two short ones, all of them decoding."""
    clients = [Client(server, prompt(length, length), MANY) for length in (LONG, 40, 700)]
    for client in clients:
        client.start()
    wait_for("all are decoding", lambda: all(len(client.texts) >= 3 for client in clients), 60)
    assert not any(client.done for client in clients)
    return clients


@pytest.fixture
def doomed(tiny_model: str, tmp_path: Path) -> Iterator[Server]:
    """A server of one test's own."""
    with serving(tiny_model, tmp_path / "serve.log") as server:
        yield server


def check_clients_ended(clients: list[Client], limit: float) -> None:
    end = time.monotonic() + limit
    for client in clients:
        client.join(max(0.0, end - time.monotonic()))
        assert not client.is_alive(), f"a client still waits after {limit:.0f} s"
        assert len(client.texts) < MANY and not client.finished


def test_a_worker_is_killed(doomed: Server) -> None:
    """Clients are told; the server ends, as stock vLLM's does, and takes the other rank with it."""
    workers = doomed.workers()
    assert len(workers) == RANKS
    [victim] = [worker for worker in workers if f"DP{RANKS - 1}" in worker.name()]
    clients = running_clients(doomed)
    shared = shared_memory(doomed.members())
    assert left_of(shared), "otherwise there is nothing to find"
    victim.kill()
    killed = time.monotonic()
    check_clients_ended(clients, 60)
    assert all(client.told for client in clients), [(client.error, client.events[-1]) for client in clients]
    code = doomed.process.wait(max(1.0, 60 - (time.monotonic() - killed)))
    assert code >= 0, "by itself, not by a signal"
    wait_for("no process is left", lambda: not doomed.members(), 20)
    assert not left_of(shared)


def test_the_server_is_told_to_stop(doomed: Server) -> None:
    """SIGTERM in the middle of requests: the engine ends at once, the server when its clients are gone.

    vLLM 0.32 kills the engine right after telling it to abort its requests. Where a step takes longer than that, no
    client hears of it, and the server waits for them to close their connections: stock vLLM with 24 layers, too.
    """
    clients = running_clients(doomed)
    members = doomed.members()
    shared = shared_memory(members)
    assert left_of(shared), "otherwise there is nothing to find"
    engine = [process.pid for process in members if process.name().startswith("VLLM")]
    assert len(engine) == 1 + RANKS
    doomed.process.terminate()
    wait_for("the engine has ended", lambda: not {p.pid for p in doomed.members()} & {*engine}, 20)
    for client in clients:
        client.leave()
    assert doomed.process.wait(20) == 0
    check_clients_ended(clients, 20)
    wait_for("no process is left", lambda: not doomed.members(), 20)
    assert not left_of(shared)
