# SPDX-License-Identifier: Apache-2.0
"""A rank on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from ..attention import flash_pieces
from ..attention.partial_rows import RowLayout, warm_up
from .worker import OneRank


class NanoCPGPUWorker(OneRank, Worker):
    """vLLM's GPU worker as one of N ranks."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.nanocp.degree_limit > 1:
            model, parallel = self.vllm_config.model_config, self.parallel_config
            assert self.device is not None and isinstance(model.dtype, torch.dtype)
            heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
            flash_pieces.self_check(heads, kv_heads, model.get_head_size(), model.dtype, self.device)
            warm_up(RowLayout(heads, model.get_head_size()), model.dtype, self.device)

    def register_attention(self) -> None:
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, "vllm_nanocp.attention.flash_backend.NanoCPFlashAttentionBackend"
        )
