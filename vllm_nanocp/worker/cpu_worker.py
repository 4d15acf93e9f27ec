# SPDX-License-Identifier: Apache-2.0
"""A rank on CPU."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import OneRank


class NanoCPCPUWorker(OneRank, CPUWorker):
    """vLLM's CPU worker as one of N ranks."""
