# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for decode steps with sharded rows, of the model and of one that drafts. Touches vLLM 0.32's
``vllm/v1/worker/gpu/cudagraph_utils.py`` and ``spec_decode/target_dependent_ar/cudagraph_utils.py``.

vLLM captures one full graph for each of many batch sizes. Besides those, a few sizes are captured once more with the
exchange inside, for a few capacities: visits that any two ranks may exchange. A step takes the smallest that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from .. import config as nanocp_config
from ..attention.context import context
from ..attention.sharded_step import ShardedStep
from ..graph_capacities import replays


@dataclass(frozen=True)
class ShardedDescriptor(BatchExecutionDescriptor):
    """vLLM's descriptor of a batch that a graph is for.

    Attributes:
        capacity: visits that any two ranks exchange. A descriptor is never equal to one of vLLM's.
    """

    capacity: int = 0


# A batch is padded to the next size; a size is captured only if it saves more than this part of it.
SPARED = 0.2


def sharded_sizes(sizes: Iterable[int], capacities: Sequence[int]) -> list[tuple[int, int]]:
    """Which (requests, capacity) are captured: of vLLM's sizes those that spare a batch much padding, with capacities
    worth it for a size.

    A batch of R requests has at most R rows that visit, so a capacity above R serves only the visits of larger batches
    on other ranks; the smallest capacity that is enough for R is there, and all below it.

    Args:
        sizes: requests of vLLM's own decode graphs.
        capacities: ascending.
    """
    chosen: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        if not chosen or size <= chosen[-1] * (1 - SPARED):
            chosen.append(size)
    return [
        (size, c) for size in sorted(chosen) for i, c in enumerate(capacities) if i == 0 or capacities[i - 1] < size
    ]


class ShardedCapture(CudaGraphManager):
    """Mixed in between vLLM's manager and its base: captures the sharded graphs along with vLLM's."""

    def _init_candidates(self) -> None:
        super()._init_candidates()
        self.sharded: list[ShardedDescriptor] = []
        config = nanocp_config.of(self.vllm_config)
        full = self._capture_descs.get(CUDAGraphMode.FULL, [])
        queries = self.decode_query_len
        decodes = [d for d in full if d.uniform_token_count == queries and not d.num_active_loras]
        decode = [d.num_reqs for d in decodes if d.num_reqs]
        if not decode or config.degree_limit == 1 or not replays(self.vllm_config):
            return
        capacities = sorted(context.draft_routes) if self._later else context.capacities
        self.sharded = [
            ShardedDescriptor(
                CUDAGraphMode.FULL, size * queries, num_reqs=size, uniform_token_count=queries, capacity=capacity
            )
            for size, capacity in sharded_sizes(decode, capacities)
        ]
        # From large to small, so that the smaller ones find their memory in the pool; behind all of vLLM's. When it
        # foresees the memory of all, it takes the first two of the target's for samples, of a draft model's all.
        self._capture_descs[CUDAGraphMode.FULL] = [*full, *sorted(self.sharded, key=lambda d: -d.num_tokens)]

    @property
    def _later(self) -> bool:
        """Whether these are a draft model's forwards after its first, of one query a row."""
        return self.decode_query_len < context.queries

    def capture(self, create_forward_fn: Callable[..., Any], progress_bar_desc: str = "Capturing CUDA graphs") -> None:
        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Any:
            if not isinstance(desc, ShardedDescriptor):
                return create_forward_fn(desc, warmup=warmup)
            with self._empty_step(desc.capacity):
                forward = create_forward_fn(desc, warmup=warmup)

            def run(mode: CUDAGraphMode) -> None:
                with self._empty_step(desc.capacity):
                    forward(mode)

            return run

        super().capture(create, progress_bar_desc)

    @contextmanager
    def _empty_step(self, capacity: int) -> Iterator[None]:
        """As in a sharded step, one in which nobody visits."""
        none = [0] * nanocp_config.of(self.vllm_config).ranks
        rank = self.vllm_config.parallel_config.data_parallel_rank
        context.step = ShardedStep(rank, send_counts=none, recv_counts=none, capacity=capacity)
        if self._later:
            context.draft_step, context.draft_index = context.step, 1
        try:
            yield
        finally:
            context.step, context.draft_step, context.draft_index = None, None, 0

    def sharded_graph(self, num_tokens: int, visits: int) -> ShardedDescriptor | None:
        """The smallest captured graph for so many tokens on the largest rank, and visits of the busiest pair."""
        fitting = [d for d in self.sharded if d in self.graphs and d.num_tokens >= num_tokens and d.capacity >= visits]
        return min(fitting, key=lambda d: (d.num_tokens, d.capacity), default=None)


class NanoCPCudaGraphManager(ModelCudaGraphManager, ShardedCapture):  # type: ignore[misc]
    """vLLM's manager of the model's graphs, with ``ShardedCapture`` below it."""


class NanoCPDraftGraphManager(SpeculatorCudaGraphManager, ShardedCapture):  # type: ignore[misc]
    """The same of a draft model's graphs: of its first forward, whose rows are the target's, or of the later ones."""
