# SPDX-License-Identifier: Apache-2.0
"""One server for all tests of what it answers: starting it is most of their time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .serving import FLAGS, IDLE_LIMIT_S, Server, serving, wait_for


@pytest.fixture(scope="package")  # then its memory is free for other tests
def _server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # The developers' routes: tests call workers, and reset the prefix cache.
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    # Each rank publishes at a port that is free.
    events = ["--kv-events-config", '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0"}']
    with serving(tiny_model, tmp_path_factory.mktemp("server") / "serve.log", [*FLAGS, *events], env) as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    """The shared server, which must be alive and as empty after a test as before it."""
    yield _server
    assert _server.process.poll() is None, _server.tail()
    wait_for("nothing runs and no KV is held", _server.idle, IDLE_LIMIT_S)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of faults are run as often as ``NANOCP_FAULT_REPEATS`` says: what is rare should show, too."""
    repeats = int(os.environ.get("NANOCP_FAULT_REPEATS", "1"))
    if repeats > 1 and "test_faults" in metafunc.module.__name__:
        metafunc.fixturenames.append("_repetition")
        metafunc.parametrize("_repetition", range(repeats), ids=lambda number: f"again{number}")
