# SPDX-License-Identifier: Apache-2.0
"""`remote_queue_shutdown`: a reader through a socket whose queue is shut down."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from vllm_nanocp.patches import Outcome, PatchError, remote_queue_shutdown

pytest.importorskip("vllm")

LIMIT_S = 6.0


@pytest.fixture
def queues(stock: Any) -> Any:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    return stock(MessageQueue, "dequeue")


def _pair(queues: Any) -> tuple[Any, Any]:
    """A writer and a reader through a socket, as of two nodes."""
    writer = queues(1, 0, connect_ip="127.0.0.1")
    reader = queues.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready)
    ready.start()
    writer.wait_until_ready()
    ready.join(LIMIT_S)
    return writer, reader


def _wait_and_shut_down(queues: Any) -> tuple[type[BaseException], float]:
    """How a reader that waits for at most six seconds ends when its queue is shut down at once, and after how long."""
    writer, reader = _pair(queues)
    threading.Timer(0.2, reader.shutdown).start()
    start = time.monotonic()
    with pytest.raises((RuntimeError, TimeoutError)) as raised:
        reader.dequeue(timeout=LIMIT_S)
    del writer
    return raised.type, time.monotonic() - start


def test_upstream_waits_on(queues: Any) -> None:
    """The defect. If not, the patch can go."""
    kind, seconds = _wait_and_shut_down(queues)
    assert kind is TimeoutError and seconds >= LIMIT_S


def test_reader_is_woken(queues: Any) -> None:
    assert remote_queue_shutdown.apply() is Outcome.APPLIED
    kind, seconds = _wait_and_shut_down(queues)
    assert kind is RuntimeError and seconds < LIMIT_S / 2


def test_messages_and_time_limits_are_as_before(queues: Any) -> None:
    remote_queue_shutdown.apply()
    writer, reader = _pair(queues)
    writer.enqueue({"a": 1})
    assert reader.dequeue(timeout=LIMIT_S) == {"a": 1}
    threading.Timer(1.5, writer.enqueue, ["late"]).start()
    assert reader.dequeue() == "late"
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.2)
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0)


def test_apply_is_idempotent(queues: Any) -> None:
    remote_queue_shutdown.apply()
    function = queues.dequeue
    assert remote_queue_shutdown.apply() is Outcome.APPLIED
    assert queues.dequeue is function


def _other(self: Any) -> Any: ...


@pytest.mark.parametrize("name", ["dequeue", "shutdown"])
def test_apply_refuses_another_upstream(queues: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(queues, name, _other)
    with pytest.raises(PatchError, match=r"^remote_queue_shutdown: _other has changed upstream .*vLLM \d"):
        remote_queue_shutdown.apply()
