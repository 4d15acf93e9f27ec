# SPDX-License-Identifier: Apache-2.0
"""The executor's message queues go by a worker's number in the world; all else by its number within its rank.

vLLM has one number for both, ``Worker.rank``, for its executor has the workers of one data-parallel rank. What reads it
later (weight updates, trace names, start-up plans) means the number within the rank, so that is what it says. Touches
vLLM 0.32's ``WorkerProc._init_message_queues`` and ``RayWorkerProc._init_message_queues``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..wrapping import to_wrap, wraps


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

    make = to_wrap(WorkerProc, "_init_message_queues", __name__)
    if make is None:
        return

    @wraps(make, __name__)
    def init_message_queues(self: Any, *args: Any, **kwargs: Any) -> None:
        with in_the_world(self.worker.worker):
            make(self, *args, **kwargs)

    WorkerProc._init_message_queues = init_message_queues  # type: ignore[method-assign]
