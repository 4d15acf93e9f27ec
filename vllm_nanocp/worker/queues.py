# SPDX-License-Identifier: Apache-2.0
"""The executor's message queues go by a worker's number in the world; all else by its number within its rank.

vLLM has one number for both, ``Worker.rank``, for its executor has the workers of one data-parallel rank. What reads it
later (weight updates, trace names, start-up plans) means the number within the rank, so that is what it says. Touches
vLLM 0.32's ``WorkerProc._init_message_queues`` and ``RayWorkerProc._init_message_queues``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

_MARK = "_nanocp_installed"


@contextlib.contextmanager
def in_the_world(worker: Any) -> Iterator[None]:
    """While its queues are made, a worker's ``rank`` is its number in the world.

    Args:
        worker: a ``OneRank``.
    """
    within = worker.rank
    worker.rank = worker.global_rank
    try:
        yield
    finally:
        worker.rank = within


def install() -> None:
    """Let the worker processes of vLLM's multiprocessing executor make their queues so. Idempotent."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    make = WorkerProc._init_message_queues
    if hasattr(make, _MARK):
        return

    @functools.wraps(make)
    def init_message_queues(self: Any, *args: Any, **kwargs: Any) -> None:
        with in_the_world(self.worker.worker):
            make(self, *args, **kwargs)

    setattr(init_message_queues, _MARK, True)
    WorkerProc._init_message_queues = init_message_queues  # type: ignore[method-assign]
