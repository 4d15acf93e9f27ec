# SPDX-License-Identifier: Apache-2.0
"""A process that does not outlive its parent. Imports nothing that takes long: it is the first that a rank's scheduler
process does, and what that imports then takes seconds."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

# How often it is looked whether the parent lives, where the system cannot tell of its end.
_POLL_S = 0.5
# How long the process has to end by itself.
_GRACE_S = 2.0


def watch(parent: int) -> None:
    """From now on end this process soon after its parent has ended. A pipe to it is not enough: it stays open if the
    parent is killed and a process that it has forked lives on."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="Orphan").start()


def _end_with(parent: int) -> None:
    handle = None
    with contextlib.suppress(AttributeError, OSError):  # an old kernel, or a container that forbids it
        handle = os.pidfd_open(parent)
    if handle is not None:
        select.select([handle], [], [])
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    time.sleep(_GRACE_S)
    os._exit(1)
