# SPDX-License-Identifier: Apache-2.0
"""An engine in the process of its user (``LLM`` without multiprocessing) that fails to start leaves no processes.

vLLM counts on the process to end, which an engine's own does. Here it goes on, perhaps with another engine, while
workers and the ranks' scheduler processes of the first would wait for work for ever. Touches vLLM 0.32's
``EngineCore.__init__``.
"""

from __future__ import annotations

from typing import Any

from ..wrapping import to_wrap, wraps


def install() -> None:
    """Have engines of this process end what they have started. Idempotent; engines without nanocp are left alone."""
    from vllm.v1.engine.core import EngineCore

    start = to_wrap(EngineCore, "__init__", __name__)
    if start is None:
        return

    @wraps(start, __name__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            start(self, *args, **kwargs)
        except BaseException:
            _end(self)
            raise

    EngineCore.__init__ = init  # type: ignore[method-assign]


def _end(engine: Any) -> None:
    """What there is of an engine."""
    from ..sched.rank import rank_process
    from .multiproc import OneWorld

    executor, scheduler = getattr(engine, "model_executor", None), getattr(engine, "scheduler", None)
    if isinstance(executor, OneWorld):
        executor.shutdown()
        if scheduler is not None:
            scheduler.shutdown()
    rank_process.discard()
