# SPDX-License-Identifier: Apache-2.0
"""How tests end a server: a script stands for it that has shared memory and does not end when it is told to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from . import serving
from .serving import Server, is_resource_tracker, wait_for

LIMIT_S = 20.0
# Its child waits as a worker does, and holds what its parent holds.
SCRIPT = """
import os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=4096)
os.fork()
print(memory.name, flush=True)
time.sleep(120)
"""


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(serving, "VLLM", [sys.executable, "-c", SCRIPT])
    server = Server("none", tmp_path / "serve.log", flags=[], wait=False, spawn=True)
    yield server
    server.client.close()
    server.kill()


def memory_of(server: Server) -> str:
    """The path of its shared memory, once it and its child have said it."""
    lines = wait_for("both run", lambda: said if len(said := server.text().split()) == 2 else None, LIMIT_S)
    assert lines[0] == lines[1] and lines[0].startswith("psm_")
    return f"/dev/shm/{lines[0]}"


def test_nothing_stays_of_a_server_that_is_killed(stubborn: Server) -> None:
    """Its resource tracker lives long enough to remove the name."""
    path = memory_of(stubborn)
    assert os.path.exists(path) and sorted(map(is_resource_tracker, stubborn.members())) == [False, False, True]
    stubborn.kill()
    assert not os.path.exists(path) and not stubborn.members()


def test_a_tracker_that_hangs(stubborn: Server) -> None:
    """It is killed in the end."""
    path = memory_of(stubborn)
    [tracker] = filter(is_resource_tracker, stubborn.members())
    tracker.suspend()
    try:
        stubborn.kill(limit=1.0)
        assert psutil.wait_procs([tracker], LIMIT_S)[1] == [] and not stubborn.members()
    finally:
        os.unlink(path)


def test_close(stubborn: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """When SIGTERM has not ended it in time."""
    path = memory_of(stubborn)
    monkeypatch.setattr(Server.terminate, "__defaults__", (0.5,))
    stubborn.close()
    assert not os.path.exists(path) and not stubborn.members()
