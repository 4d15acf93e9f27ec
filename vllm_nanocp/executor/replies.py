# SPDX-License-Identifier: Apache-2.0
"""Answers of the workers: the first failure counts, whoever waits, and no answer is taken for another call's.

vLLM 0.32's ``MultiprocExecutor.collective_rpc`` reads one worker's answer after the other. Two things follow that do
not matter where a step is answered by one worker only, and do where each rank answers it:

- A worker that fails in the middle of a step leaves the others waiting for it in a collective. As long as the first of
  them has not answered, nobody looks at the one that has failed: the engine would hang until
  ``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`` have passed.
- If a call fails, the answers behind the first failure are left in their queues, where the next call would find them.

Touches the executor's ``response_mqs`` (iterated for the answers of all workers, indexed for that of one) and
``MessageQueue.dequeue``, ``.recv`` and ``.shutdown``, ``current_idx`` and ``local_socket``;
``WorkerProc.ResponseStatus``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc

# How long one worker is waited for before the others are looked at. Longer than nearly all steps, so that these cost
# nothing; shorter than a person notices.
_LOOK_AROUND_S = 0.5
# How long the body of a large answer may take behind the notice of it: whoever has written the one sends the other.
_BODY_S = 60.0


class _Queue:
    """One worker's answers, in order. ``stale``: how many of the next belong to calls that nobody waits for."""

    def __init__(self, queue: MessageQueue) -> None:
        self.queue = queue
        self.stale = 0
        self._early: deque[Any] = deque()

    def take(self, timeout: float | None) -> Any:
        """The next answer that somebody waits for; raises ``TimeoutError`` after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            answer = self._early.popleft() if self._early else self._read(left)
            if not self.stale:
                return answer
            self.stale -= 1

    def _read(self, timeout: float | None) -> Any:
        """An answer too large for shared memory comes by a socket. vLLM's queue takes the notice of it out before it
        waits for it, with the same timeout: if that ends then, the answer is not lost, only late."""
        noticed = self.queue.current_idx
        try:
            return self.queue.dequeue(timeout=timeout)
        except TimeoutError:
            if self.queue.current_idx == noticed:
                raise
            return MessageQueue.recv(self.queue.local_socket, _BODY_S)

    def peek(self) -> Any | None:
        """The next answer, if it has come; it stays to be taken."""
        try:
            answer = self.take(0.0)
        except TimeoutError:
            return None
        self._early.appendleft(answer)
        return answer


class _Turn:
    """A worker's queue, as ``collective_rpc`` uses it: in a round, or for a call that only this worker answers."""

    def __init__(self, replies: Replies, worker: int, alone: bool = False) -> None:
        self._replies = replies
        self._worker = worker
        self._alone = alone

    def dequeue(self, timeout: float | None = None) -> Any:
        take = self._replies.take_alone if self._alone else self._replies.take
        return take(self._worker, timeout)

    def shutdown(self) -> None:
        self._replies.queues[self._worker].queue.shutdown()


class Replies:
    """Stands in for the executor's list of response queues. A round is one call that all workers answer.

    ``incomplete``: the last round ended with a failure or without an answer in time; workers may hang.
    """

    def __init__(self, queues: Sequence[MessageQueue]) -> None:
        self.queues = [_Queue(queue) for queue in queues]
        self.incomplete = False
        self._unread: set[int] = set()

    def __len__(self) -> int:
        return len(self.queues)

    def __iter__(self) -> Iterator[_Turn]:
        return (_Turn(self, worker) for worker in range(len(self.queues)))

    def __getitem__(self, worker: int) -> _Turn:
        """For a call that only this worker answers."""
        return _Turn(self, worker, alone=True)

    def take(self, worker: int, timeout: float | None) -> Any:
        """A worker's answer in this round, or the failure of another one that has not been read in it yet.

        The first worker's turn begins a round.

        Args:
            worker: number in the world.
            timeout: seconds; None: for ever.

        Raises:
            TimeoutError: neither has come in time.
        """
        if worker == 0:
            self._settle()
            self._unread = set(range(len(self.queues)))
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LOOK_AROUND_S if deadline is None else min(_LOOK_AROUND_S, max(0.0, deadline - time.monotonic()))
            try:
                answer = self.queues[worker].take(left)
            except TimeoutError:
                if (failed := self._failed(worker)) is not None:
                    worker = failed
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    self.incomplete = True
                    raise
                continue
            self._unread.discard(worker)
            self.incomplete |= answer[0] != WorkerProc.ResponseStatus.SUCCESS
            return answer

    def take_alone(self, worker: int, timeout: float | None) -> Any:
        """A worker's answer to a call that only it answers; arguments and errors as of ``take``."""
        self._settle()
        try:
            return self.queues[worker].take(timeout)
        except TimeoutError:
            self.queues[worker].stale += 1
            self.incomplete = True
            raise

    def _settle(self) -> None:
        """What the round before has not read belongs to no later call."""
        for worker in self._unread:
            self.queues[worker].stale += 1
        self._unread = set()
        self.incomplete = False

    def _failed(self, waiting_for: int) -> int | None:
        """A worker whose answer in this round is a failure."""
        for worker in sorted(self._unread - {waiting_for}):
            answer = self.queues[worker].peek()
            if answer is not None and answer[0] != WorkerProc.ResponseStatus.SUCCESS:
                return worker
        return None
