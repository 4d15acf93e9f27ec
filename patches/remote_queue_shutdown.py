# SPDX-License-Identifier: Apache-2.0
"""A reader on another node that waits for ever for a writer that is dead.

Wrong upstream: `MessageQueue.shutdown` (vllm/distributed/device_communicators/shm_broadcast.py) ends the waiting of
readers through shared memory, but not of those through a socket: `dequeue` polls the socket for the whole time limit,
which is five minutes for a step. So when an actor of `RayExecutorV2` on another node dies, its monitor shuts down
queues and executor at once, while the engine waits on for that actor's answer and its clients with it.

Versions: 0.32.0, 0.33.0.

Repair: a reader through a socket looks once a second whether its queue has been shut down, and then raises
`RuntimeError: cancelled`, as readers through shared memory do.

Can go: when `MessageQueue.shutdown` wakes readers through sockets.
"""

from __future__ import annotations

import time
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_DEQUEUE = {"00de2596a54e71f7"}  # 0.32.0
_KNOWN_SHUTDOWN = {"9f4d849c1a59094b"}  # 0.32.0
_LOOK_EVERY_S = 1.0


def apply() -> Outcome:
    """Let a shutdown wake readers through sockets. Idempotent.

    Raises `PatchError` if `MessageQueue.dequeue` or `.shutdown` is not the known one.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    return replace(
        __name__,
        Guarded(MessageQueue, "dequeue", _KNOWN_DEQUEUE, _until_shutdown),
        Guarded(MessageQueue, "shutdown", _KNOWN_SHUTDOWN),
    )


def _until_shutdown(original: Any) -> Any:
    def dequeue(self: Any, timeout: float | None = None, indefinite: bool = False) -> Any:
        if self._is_remote_reader:
            _await_message(self, timeout)
        return original(self, timeout, indefinite)

    return dequeue


def _await_message(queue: Any, timeout: float | None) -> None:
    """Return when there is something to read. Raises `TimeoutError`, and `RuntimeError` after a shutdown."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        wait = _LOOK_EVERY_S if deadline is None else min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic()))
        if queue.remote_socket.poll(timeout=int(wait * 1000)):
            return
        if queue.shutting_down:
            raise RuntimeError("cancelled")
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError
