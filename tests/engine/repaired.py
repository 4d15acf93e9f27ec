# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM's CPU worker with this package's repairs of vLLM, and nothing else of it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_nanocp import patches


class Worker(CPUWorker):
    """Applies the patches before vLLM builds the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patches.apply_all()
        super().__init__(*args, **kwargs)
