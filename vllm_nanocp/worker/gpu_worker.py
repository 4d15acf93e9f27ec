# SPDX-License-Identifier: Apache-2.0
"""A rank on NVIDIA GPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_dp_group
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from ..attention.context import context
from ..exchange.choose import choose
from ..exchange.symmetric import allocate, first_problem, reachable
from ..graph_capacities import capacities, replays
from .worker import OneRank

if TYPE_CHECKING:
    from ..attention.family import GPUFamily

logger = init_logger("vllm.nanocp.worker")  # vLLM shows what is under its own name


class NanoCPGPUWorker(OneRank, Worker):
    """vLLM's GPU worker as one of N ranks."""

    family: GPUFamily

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.nanocp.degree_limit > 1:
            assert self.device is not None
            self.family.prepare(self.device)
            self._choose_exchange()

    def _choose_exchange(self) -> None:
        """Set up the routed exchange if it is wanted and can be had. A collective of the ranks."""
        problem = "graph_capacities is empty" if self.nanocp.graph_capacities == () else ""
        if not problem and self.nanocp.exchange == "auto":
            problem = self.family.unrouted
        if not problem and self.nanocp.exchange != "collective":
            problem = self._make_routes()
        name, reason = choose(self.nanocp.exchange, problem)
        context.capacities = capacities(self.vllm_config, routed=bool(context.routes))
        if self.global_rank == 0:
            logger.info("nanocp: exchange %s: %s", name, reason)

    def _make_routes(self) -> str:
        """Memory of the routed exchange, for each capacity. Returns why there is none, the same on all ranks."""
        assert self.device is not None
        group, ranks = get_dp_group(), self.nanocp.ranks
        shared = partial(allocate, group=group.device_group, device=self.device)
        made = [(context.routes, context.queries)]
        if self.runner.drafts is not None and context.queries > 2:
            made.append((context.draft_routes, 1))
        problem = reachable(self.device, group.cpu_group)
        if problem:
            return problem
        try:
            for routes, queries in made:
                for capacity in capacities(self.vllm_config, routed=True):
                    routes[capacity] = self.family.routes(capacity, ranks, group.rank_in_group, queries, shared)
        except RuntimeError as error:  # a container may forbid what this takes
            problem = f"GPUs cannot share memory here ({error!r:.200})"
        problem = first_problem(problem, group.cpu_group)
        if problem:
            context.routes.clear()
            context.draft_routes.clear()
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
        ranks, most = self.nanocp.ranks, self.vllm_config.scheduler_config
        used = context.capacities if context.routes or replays(self.vllm_config) else ()
        later = context.draft_routes
        for tables, capacities_, queries in ((context.tables, used, context.queries), (context.draft_tables, later, 1)):
            for capacity in capacities_:
                if capacity not in tables:
                    tables[capacity] = self.family.tables(capacity, ranks, most.max_num_seqs, self.device, queries)
        bytes_ = self.family.most_memory(ranks, most.max_num_batched_tokens)
        torch.empty(bytes_, dtype=torch.uint8, device=self.device)

    def compile_or_warm_up_model(self) -> Any:
        # First, for at its end vLLM begins to report kernels that are compiled, or to refuse them.
        if self.nanocp.degree_limit > 1:
            layer = next(iter(self.attention_layers().values()))
            self.family.warm_up(layer)
        return super().compile_or_warm_up_model()
