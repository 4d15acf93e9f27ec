# SPDX-License-Identifier: Apache-2.0
"""Shared memory of tensor-parallel CPU workers that are killed.

Wrong upstream: `_CPUSHMDistributed._init_cpu_shm` (vllm/distributed/device_communicators/cpu_communicator.py) makes it
under a name, `...-cpushm_0` in /dev/shm, that is removed when the worker ends by itself. Workers are killed as a rule:
by the engine when they take too long, or because one has failed. Nobody else removes the name, and the memory, 4 MiB a
worker and tensor-parallel group, stays with it until the machine is started again.

Versions: 0.32.0, 0.33.0.

Repair: once all workers of the group have mapped it, the one that made it removes its name. The memory goes with the
last process that has it mapped.

Can go: when `_init_cpu_shm` removes the names itself.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_FOLDER = "/dev/shm"
_KNOWN_INIT: set[str] = {"1832d7046fab7e55"}  # 0.32.0


def apply() -> Outcome:
    """Let processes remove the names of the shared memory that they have made. Idempotent.

    Raises `PatchError` if `_CPUSHMDistributed._init_cpu_shm` is not the known one.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    return replace(__name__, Guarded(_CPUSHMDistributed, "_init_cpu_shm", _KNOWN_INIT, _nameless))


def _nameless(init: Any) -> Any:
    def _init_cpu_shm(self: Any) -> int:
        handle: int = init(self)  # ends with a barrier after all have mapped all
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{_FOLDER}/{self.group_name}_{self.communicator.rank}")
        return handle

    return _init_cpu_shm
