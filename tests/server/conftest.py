# SPDX-License-Identifier: Apache-2.0
"""One server for all tests of what it answers: starting it is most of their time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .serving import IDLE_LIMIT_S, Server, serving, wait_for


@pytest.fixture(scope="session")
def _server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model, tmp_path_factory.mktemp("server") / "serve.log") as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    """The shared server, which must be alive and as empty after a test as before it."""
    yield _server
    assert _server.process.poll() is None, _server.tail()
    wait_for("nothing runs and no KV is held", _server.idle, IDLE_LIMIT_S)
