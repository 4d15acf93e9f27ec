# SPDX-License-Identifier: Apache-2.0
"""A rank on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_dp_group
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from ..attention import flash_pieces
from ..attention.context import context
from ..attention.fixed_tables import CapturedTables
from ..attention.flash_tables import gather_tables, most_memory
from ..attention.partial_rows import RowLayout, warm_up
from ..exchange.choose import choose
from ..exchange.routes import Routes
from ..exchange.symmetric import allocate, first_problem, reachable
from .graphs import capacities, replays
from .worker import OneRank

logger = init_logger("vllm.nanocp.worker")  # vLLM shows what is under its own name


class NanoCPGPUWorker(OneRank, Worker):
    """vLLM's GPU worker as one of N ranks."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.nanocp.degree_limit > 1:
            layout, kv_heads, dtype = self._attention_shape()
            assert self.device is not None
            flash_pieces.self_check(layout.num_heads, kv_heads, layout.head_size, dtype, self.device)
            warm_up(layout, dtype, self.device)
            block = torch.zeros(1, dtype=torch.int32, device=self.device)
            gather_tables([block.data_ptr()], [1], self.device)  # compiled now
            self._choose_exchange(layout, dtype)

    def _attention_shape(self) -> tuple[RowLayout, int, torch.dtype]:
        """This worker's query heads, its KV heads, and the type of both."""
        model, parallel = self.vllm_config.model_config, self.parallel_config
        assert isinstance(model.dtype, torch.dtype)
        layout = RowLayout(model.get_num_attention_heads(parallel), model.get_head_size())
        return layout, model.get_num_kv_heads(parallel), model.dtype

    def _choose_exchange(self, layout: RowLayout, dtype: torch.dtype) -> None:
        """Set up the routed exchange if it is wanted and can be had. A collective of the ranks."""
        problem = "graph_capacities is empty" if self.nanocp.graph_capacities == () else ""
        if not problem and self.nanocp.exchange != "collective":
            problem = self._make_routes(layout, dtype)
        name, reason = choose(self.nanocp.exchange, problem)
        context.capacities = capacities(self.vllm_config, routed=bool(context.routes))
        if self.global_rank == 0:
            logger.info("nanocp: exchange %s: %s", name, reason)

    def _make_routes(self, layout: RowLayout, dtype: torch.dtype) -> str:
        """Memory of the routed exchange, for each capacity. Returns why there is none, the same on all ranks."""
        assert self.device is not None
        group, ranks, routes = get_dp_group(), self.nanocp.ranks, {}
        query_bytes = layout.query_bytes(dtype)
        problem = reachable(self.device, group.cpu_group)
        if problem:
            return problem
        try:
            for capacity in capacities(self.vllm_config, routed=True):
                size = Routes.size(capacity, ranks, layout, query_bytes)
                memory = allocate(size, group.device_group, self.device)
                routes[capacity] = Routes(capacity, ranks, group.rank_in_group, layout, query_bytes, *memory)
        except RuntimeError as error:  # a container may forbid what this takes
            problem = f"GPUs cannot share memory here ({error!r:.200})"
        problem = first_problem(problem, group.cpu_group)
        if not problem:
            context.routes.update(routes)
        return problem

    def determine_available_memory(self) -> int:
        if self.nanocp.degree_limit > 1:
            context.reserve = self._reserve
        try:
            return super().determine_available_memory()
        finally:
            context.reserve = None

    def _reserve(self) -> None:
        """Take what sharded steps take: for good, tables of fixed size; for a moment, what a layer needs at most."""
        assert self.device is not None
        ranks, shape = self.nanocp.ranks, self._attention_shape()
        layout, kv_heads, _ = shape
        most = self.vllm_config.scheduler_config
        used = context.capacities if context.routes or replays(self.vllm_config) else ()
        for capacity in used:
            if capacity not in context.tables:
                context.tables[capacity] = CapturedTables(
                    capacity, ranks, most.max_num_seqs, layout, kv_heads, self.device
                )
        bytes_ = most_memory(ranks, most.max_num_batched_tokens, *shape)
        torch.empty(bytes_, dtype=torch.uint8, device=self.device)

    def compile_or_warm_up_model(self) -> Any:
        # First, for at its end vLLM begins to report kernels that are compiled, or to refuse them.
        if self.nanocp.degree_limit > 1:
            layer = next(iter(self.attention_layers().values()))
            layer.impl.warm_up(layer, layer.kv_cache, self.model_config.dtype)
        return super().compile_or_warm_up_model()

    def register_attention(self) -> None:
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, "vllm_nanocp.attention.flash_backend.NanoCPFlashAttentionBackend"
        )
