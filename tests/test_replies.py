# SPDX-License-Identifier: Apache-2.0
"""Workers' answers: which one a call gets when some fail, come late or not at all."""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc

from vllm_nanocp.executor.replies import Replies

OK, FAILURE = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


class Queue:
    """Behaves as vLLM's ``MessageQueue`` at its reader."""

    current_idx = 0

    def __init__(self, *answers: Any) -> None:
        self.answers = deque(answers)
        self.closed = False

    def dequeue(self, timeout: float | None = None) -> Any:
        end = None if timeout is None else time.monotonic() + timeout
        while not self.answers:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError
            time.sleep(0.01)
        return self.answers.popleft()

    def shutdown(self) -> None:
        self.closed = True


def call(replies: Replies, timeout: float | None = 5.0) -> list[Any]:
    """As vLLM's ``collective_rpc`` reads the answers of all workers."""
    deadline = None if timeout is None else time.monotonic() + timeout
    results = []
    for queue in replies:
        status, result = queue.dequeue(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        if status != OK:
            raise RuntimeError(result)
        results.append(result)
    return results


def test_answers_in_order() -> None:
    queues = [Queue((OK, f"{worker}a"), (OK, f"{worker}b")) for worker in range(3)]
    replies = Replies(queues)
    assert call(replies) == ["0a", "1a", "2a"] and call(replies) == ["0b", "1b", "2b"]
    assert len(replies) == 3 and not replies.incomplete


def test_a_late_answer_is_waited_for() -> None:
    first, second = Queue(), Queue((OK, "1a"))
    replies = Replies([first, second])
    threading.Timer(1.2, lambda: first.answers.append((OK, "0a"))).start()
    assert call(replies, None) == ["0a", "1a"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_is_not_waited_for(failing: int) -> None:
    """The others hang, because the one has failed."""
    queues = [Queue() for _ in range(3)]
    queues[failing].answers.append((FAILURE, "why"))
    replies = Replies(queues)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="why"):
        call(replies, None)
    assert time.monotonic() - start < 2 and replies.incomplete


def test_a_failure_behind_answers() -> None:
    replies = Replies([Queue((OK, "0a")), Queue(), Queue((FAILURE, "why"))])
    with pytest.raises(RuntimeError, match="why"):
        call(replies)


def test_the_next_call_gets_its_own_answers() -> None:
    """Whether those of a call that has failed had come by then, or come later."""
    queues = [Queue((FAILURE, "0"), (OK, "0b")), Queue((FAILURE, "1"), (OK, "1b")), Queue()]
    replies = Replies(queues)
    with pytest.raises(RuntimeError, match="0"):
        call(replies)
    assert replies.incomplete
    threading.Timer(0.3, lambda: queues[2].answers.extend([(FAILURE, "2"), (OK, "2b")])).start()
    assert call(replies) == ["0b", "1b", "2b"] and not replies.incomplete


def test_the_next_call_after_one_that_found_a_failure_early() -> None:
    queues = [Queue(), Queue((OK, "1a")), Queue((FAILURE, "2"))]
    replies = Replies(queues)
    with pytest.raises(RuntimeError, match="2"):
        call(replies)
    for worker, queue in enumerate(queues):
        queue.answers.extend([(OK, "0a")] if worker == 0 else [])
        queue.answers.append((OK, f"{worker}b"))
    assert call(replies) == ["0b", "1b", "2b"]


def test_the_next_call_after_one_that_took_too_long() -> None:
    queues = [Queue(), Queue((OK, "1a"))]
    replies = Replies(queues)
    with pytest.raises(TimeoutError):
        call(replies, 0.2)
    assert replies.incomplete
    queues[0].answers.extend([(OK, "0a"), (OK, "0b")])
    queues[1].answers.append((OK, "1b"))
    assert call(replies) == ["0b", "1b"]


def test_a_call_that_one_worker_answers() -> None:
    """It is no round; what is stale is skipped here, too."""
    queues = [Queue((FAILURE, "0")), Queue((FAILURE, "1"))]
    replies = Replies(queues)
    with pytest.raises(RuntimeError):
        call(replies)
    queues[1].answers.append((OK, "alone"))
    assert replies[1].dequeue(timeout=1.0) == (OK, "alone")
    queues[0].answers.append((OK, "0b"))
    queues[1].answers.append((OK, "1b"))
    assert call(replies) == ["0b", "1b"]


@pytest.mark.parametrize("first", [True, False], ids=["awaited", "looked at"])
def test_a_large_answer_whose_body_comes_late(first: bool) -> None:
    """By shared memory comes a notice, by a socket the rest: here a second later."""
    writer = MessageQueue(1, 1, max_chunk_bytes=64)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    late = Queue()

    def answer() -> None:
        with writer.acquire_write() as buffer:
            buffer[0] = 1
        time.sleep(1.0)
        late.answers.append((OK, "other"))
        writer.local_socket.send_multipart([pickle.dumps((OK, "large"))])
        time.sleep(0.1)
        writer.enqueue((OK, "next"))

    replies = Replies([reader, late] if first else [late, reader])  # type: ignore[list-item]
    writing = threading.Thread(target=answer)
    writing.start()
    try:
        assert sorted(call(replies)) == ["large", "other"]
        late.answers.append((OK, "next"))
        assert call(replies) == ["next"] * 2
    finally:
        writing.join()
        reader.shutdown()
        writer.shutdown()


def test_shutdown_reaches_all() -> None:
    queues = [Queue(), Queue()]
    for queue in Replies(queues):
        queue.shutdown()
    assert all(queue.closed for queue in queues)
