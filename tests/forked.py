# SPDX-License-Identifier: Apache-2.0
"""vLLM's processes are forked from one that has imported vLLM already: an import takes each process seven seconds of a
core, and on CPU vLLM spawns them all. Importing this module does it, for this process and for all that it starts.

Not all of what is tested starts so: see ``spawn`` of ``tests/server/serving.py``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver, spawn
from typing import Any

import setproctitle

_IMPORTED = [
    __name__,
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.entrypoints.openai.api_server",
    "vllm_nanocp.worker.cpu_worker",
]
_get_context: Callable[..., Any] = multiprocessing.get_context
_describe: Callable[..., dict[str, Any]] = spawn.get_preparation_data
_prepare: Callable[[dict[str, Any]], None] = spawn.prepare


def _forking(method: str | None = None) -> Any:
    return _get_context("forkserver" if method == "spawn" else method)


def _describe_with_environment(name: str) -> dict[str, Any]:
    """A process that is spawned has the environment of its parent; one that is forked, that of the fork server."""
    return {**_describe(name), "environ": dict(os.environ)}


def _prepare_with_environment(data: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(data.pop("environ", {}))
    _prepare(data)


setproctitle.getproctitle()  # it finds where the title is by the environment's first place, so before that is replaced
multiprocessing.get_context = _forking
spawn.get_preparation_data = _describe_with_environment  # type: ignore[assignment]
spawn.prepare = _prepare_with_environment  # type: ignore[assignment]
forkserver.set_forkserver_preload(_IMPORTED)
