# SPDX-License-Identifier: Apache-2.0
"""A rank on NVIDIA GPUs."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from .worker import OneRank


class NanoCPGPUWorker(OneRank, Worker):
    """vLLM's GPU worker as one of N ranks."""

    def register_attention(self) -> None:
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, "vllm_nanocp.attention.flash_backend.NanoCPFlashAttentionBackend"
        )
