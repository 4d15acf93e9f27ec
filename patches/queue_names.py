# SPDX-License-Identifier: Apache-2.0
"""Shared memory of message queues whose processes are killed.

Wrong upstream: `MessageQueue` (vllm/distributed/device_communicators/shm_broadcast.py) makes its memory under a name,
`psm_...` in /dev/shm, that stays for as long as the queue: 240 MiB for what the engine tells its workers, as much for
each worker's answers, 2 GiB with `--enable-shm-tensor-arena`. It is removed when the process that made it ends by
itself. If that is killed, Python's resource tracker removes it, a process that the API server has started; not if the
tracker is killed, too, as with the session or the process group. Then the name stays, and the memory with it, until the
machine is started again.

Versions: 0.32.0, 0.33.0.

Repair: `wait_until_ready` of the process that made a queue removes the names before it returns. The memory goes with
the last process that has it mapped. Nobody opens it later than that: a reader on this machine subscribes after it has
mapped the memory, both in `create_from_handle`, and the writer has waited for as many subscriptions as there are such
readers. Readers elsewhere have a socket, and never open it.

Workers apply this. The executor's process does not, which may have other engines: it calls `unlink` where its own queue
is ready.

Can go, with `unlink`: when `MessageQueue.wait_until_ready` removes the names itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

_KNOWN_READY = {"2f7f1ca41eca5d51"}  # 0.32.0
_KNOWN_READER = {"9786edb3aaaed311"}  # 0.32.0


def apply() -> Outcome:
    """Let processes remove the names of the queues that they have made. Idempotent.

    Raises `PatchError` if `MessageQueue.wait_until_ready` or `.create_from_handle` is not the known one.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    return replace(
        __name__,
        Guarded(MessageQueue, "wait_until_ready", _KNOWN_READY, _then_unlink),
        Guarded(MessageQueue, "create_from_handle", _KNOWN_READER),
    )


def _then_unlink(wait: Any) -> Any:
    def wait_until_ready(self: Any) -> None:
        wait(self)
        unlink(self)

    return wait_until_ready


def unlink(queue: MessageQueue) -> None:
    """Remove the names of a queue's shared memory, if it has any and this process has made it.

    For queues that are ready: nobody can open the memory any more.
    """
    for memory in (queue.buffer, queue.tensor_arena):
        if memory is not None and memory.is_creator:
            memory.is_creator = False  # else it would be removed once more when the queue goes
            memory.shared_memory.unlink()
