# SPDX-License-Identifier: Apache-2.0
"""A rank on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_dp_group
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from ..attention import flash_pieces
from ..attention.context import context
from ..attention.partial_rows import RowLayout, warm_up
from ..errors import NanoCPConfigError
from ..exchange.routes import Routes
from ..exchange.symmetric import allocate, reachable
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
            layout = RowLayout(heads, model.get_head_size())
            warm_up(layout, model.dtype, self.device)
            if self.nanocp.exchange == "routed":
                self._make_routes(layout, heads * model.get_head_size() * model.dtype.itemsize)

    def _make_routes(self, layout: RowLayout, query_bytes: int) -> None:
        """Memory of the routed exchange, for each capacity. A collective of the ranks."""
        assert self.device is not None
        group, ranks = get_dp_group(), self.nanocp.ranks
        problem = reachable(self.device, group.cpu_group)
        if problem:
            raise NanoCPConfigError(f"nanocp: exchange 'routed' is not supported: {problem}; use 'collective'")
        for capacity in self.nanocp.graph_capacities:
            size = Routes.size(capacity, ranks, layout, query_bytes)
            memory = allocate(size, group.device_group, self.device)
            context.routes[capacity] = Routes(capacity, ranks, group.rank_in_group, layout, query_bytes, *memory)

    def register_attention(self) -> None:
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, "vllm_nanocp.attention.flash_backend.NanoCPFlashAttentionBackend"
        )
