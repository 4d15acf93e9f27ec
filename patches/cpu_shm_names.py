# SPDX-License-Identifier: Apache-2.0
"""Shared memory of CPU workers that are killed.

Wrong upstream: it is made under a name that is removed when the process that made it ends by itself. Workers are killed
as a rule: by the engine when they take too long, or because one has failed. Two kinds of names can stay in /dev/shm
then, and the memory with them, until the machine is started again:

- `...-cpushm_0`, 4 MiB a worker and tensor-parallel group: `_CPUSHMDistributed._init_cpu_shm`
  (vllm/distributed/device_communicators/cpu_communicator.py). Nobody else removes them.
- `psm_...`, up to 240 MiB a worker, its answers to the engine: `ShmRingBuffer`
  (vllm/distributed/device_communicators/shm_broadcast.py). Python's resource tracker, a process that the API server has
  started, removes them when all others have ended; not if it is killed with them, as with the session or the process
  group.

Versions: 0.32.0.

Repair: once all readers have mapped a segment, the process that made it removes its name. The memory goes with the last
process that has it mapped.

Can go: when `_init_cpu_shm` and `MessageQueue.wait_until_ready` remove the names themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

from vllm_nanocp.patches._guard import Outcome, require_source

_MODULE = "cpu_shm_names"
_MARK = "_nanocp_patch"
_FOLDER = "/dev/shm"
_KNOWN_INIT: set[str] = {"1832d7046fab7e55"}  # 0.32.0
_KNOWN_READY: set[str] = {"2f7f1ca41eca5d51"}  # 0.32.0


def apply() -> Outcome:
    """Let processes remove the names of the shared memory that they have made. Idempotent.

    Raises `PatchError` if `_CPUSHMDistributed._init_cpu_shm` or `MessageQueue.wait_until_ready` is not the known one.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    init, wait = _CPUSHMDistributed._init_cpu_shm, MessageQueue.wait_until_ready
    if hasattr(init, _MARK):
        return Outcome.APPLIED
    require_source(_MODULE, init, _KNOWN_INIT)
    require_source(_MODULE, wait, _KNOWN_READY)

    @functools.wraps(init)
    def _init_cpu_shm(self: Any) -> int:
        handle: int = init(self)  # ends with a barrier after all have mapped all
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{_FOLDER}/{self.group_name}_{self.communicator.rank}")
        return handle

    @functools.wraps(wait)
    def wait_until_ready(self: Any) -> None:
        wait(self)  # of the writer: until all readers have subscribed, which they do after they have mapped
        if self.buffer is not None and self.buffer.is_creator:
            self.buffer.is_creator = False
            self.buffer.shared_memory.unlink()

    setattr(_init_cpu_shm, _MARK, True)
    _CPUSHMDistributed._init_cpu_shm = _init_cpu_shm  # type: ignore[method-assign]
    MessageQueue.wait_until_ready = wait_until_ready  # type: ignore[method-assign]
    return Outcome.APPLIED
