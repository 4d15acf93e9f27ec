# SPDX-License-Identifier: Apache-2.0
"""`startup_interrupt`: an interrupt is not lost while an engine starts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import zmq
from vllm.v1.engine import utils

from vllm_nanocp.patches import Outcome, PatchError, startup_interrupt


@pytest.fixture(autouse=True)
def unpatched(stock: Any) -> None:
    stock(utils, "zmq_socket_ctx")


def start(folder: Path, error: type[BaseException]) -> None:
    with utils.zmq_socket_ctx(f"ipc://{folder}/socket", zmq.ROUTER, bind=True) as socket:
        assert not socket.closed
        raise error("terminated")


def test_upstream_loses_it(tmp_path: Path) -> None:
    start(tmp_path, KeyboardInterrupt)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_it_ends_the_start(tmp_path: Path, error: type[BaseException]) -> None:
    for _ in range(2):
        assert startup_interrupt.apply() is Outcome.APPLIED
    with pytest.raises(error, match="terminated"):
        start(tmp_path, error)
    with utils.zmq_socket_ctx(f"ipc://{tmp_path}/socket", zmq.ROUTER, bind=True) as socket:
        assert not socket.closed, "the first one is"
    assert socket.closed


def test_another_upstream_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "zmq_socket_ctx", inspect.unwrap)
    with pytest.raises(PatchError, match="startup_interrupt"):
        startup_interrupt.apply()
    assert utils.zmq_socket_ctx is inspect.unwrap  # type: ignore[comparison-overlap]
