# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention on CPU. Touches ``vllm/v1/attention/backends/cpu_attn.py`` of vLLM 0.32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..cache_dtypes import CACHE_DTYPES
from ..context import context
from ..cpu_partial import as_stored, attend_causal, attend_shard, gather_shard
from ..cpu_rows import CPULayer, LocalRow, SplitBatch, later_draft, split_metadata
from ..family import attend
from ..merge import Partial
from ..sharded_step import ShardedStep
from ..supported import grouped_query_problem


@dataclass
class ShardedCPUAttentionMetadata(CPUAttentionMetadata):
    """Stock metadata, with the batch's split in a sharded step."""

    sharded: SplitBatch | None = field(default=None)


class NanoCPCPUAttentionBackend(CPUAttentionBackend):
    """Registered in place of CPU_ATTN; a step without sharded rows runs stock code."""

    @staticmethod
    def get_impl_cls() -> type[NanoCPCPUAttentionImpl]:
        return NanoCPCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NanoCPCPUAttentionMetadataBuilder]:
        return NanoCPCPUAttentionMetadataBuilder


class NanoCPCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits the batch by the rows laid out in ``context.step``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa not in ("vec", "vec16"):
            # The packed layouts of the other kernels cannot be read by anything else. Set before the first KV is
            # written, for the writer and the reader alike.
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        if context.step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if context.draft_index:  # V2's runner does not say it
            return self.build_for_drafting(common_attn_metadata, context.draft_index)
        return self._split(context.step, common_attn_metadata, fast_build)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CPUAttentionMetadata:
        """Of a draft model's forwards the first has the target's rows."""
        step = context.draft_step
        if step is None or not draft_index:
            return self.build(0, common_attn_metadata, fast_build=True)
        return self._split(later_draft(step, common_attn_metadata, self.block_size), common_attn_metadata, True)

    def _split(
        self, step: ShardedStep, common_attn_metadata: CommonAttentionMetadata, fast_build: bool
    ) -> CPUAttentionMetadata:
        stock = super().build
        return split_metadata(
            ShardedCPUAttentionMetadata, step, common_attn_metadata, self.block_size,
            lambda common: stock(0, common, fast_build),
        )  # fmt: skip


class NanoCPCPUAttentionImpl(CPUAttentionBackendImpl):
    """The KV of all new tokens is in the cache before ``forward`` runs, on every rank before it serves guests (the
    dispatch is a collective)."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's on CPU; in a sharded step with what the rank's rows see elsewhere, and for guests.

        Args:
            attn_metadata: with ``sharded`` in a sharded step; then its other values are of the plain rows only.
            output: [tokens, num_heads, head_size], written to.
        """
        rows = getattr(attn_metadata, "sharded", None)
        stock = super().forward
        if rows is None:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        assert context.exchange is not None

        def plain(tokens: torch.Tensor | None, into: torch.Tensor) -> None:
            queries = query if tokens is None else query.index_select(0, tokens)
            stock(layer, queries, key, value, kv_cache, rows.plain, into)

        stored = as_stored(kv_cache, self.kv_cache_dtype, query.dtype)
        # A quantized cache holds keys and values divided by these. Scores are linear in keys, results in values.
        scale = self.scale * layer._k_scale_float
        attend(_Layer(rows, query, output, layer._v_scale_float, plain, key, value, stored, scale), context.exchange)
        return output


class _Layer(CPULayer):
    """One layer of a sharded step.

    Args:
        plain: see ``CPULayer.stock``.
        key, value: [tokens, num_kv_heads, head_size], of the batch.
        stored: the cache, in the type of its numbers.
        scale: of the scores.
        Others: as of ``CPULayer``.
    """

    def __init__(
        self,
        rows: SplitBatch,
        query: torch.Tensor,
        output: torch.Tensor,
        result_scale: float,
        plain: Callable[[torch.Tensor | None, torch.Tensor], None],
        key: torch.Tensor,
        value: torch.Tensor,
        stored: torch.Tensor,
        scale: float,
    ) -> None:
        super().__init__(rows, query, output, result_scale)
        self._plain, self._key, self._value, self._stored, self._scale = plain, key, value, stored, scale

    def stock(self, tokens: torch.Tensor | None, output: torch.Tensor) -> None:
        self._plain(tokens, output)

    def over_shard(self, queries: torch.Tensor, blocks: torch.Tensor, length: int) -> Partial:
        return attend_shard(queries, self._stored, blocks, length, self._scale)

    def over_new(self, row: LocalRow) -> Partial:
        queries, stored = self.query[row.tokens], self._stored
        if stored.dtype == queries.dtype:
            keys, values = self._key[row.tokens], self._value[row.tokens]
        else:  # what the cache keeps of them, as for all that come later
            whole, cut = divmod(row.past, stored.shape[2])
            held = gather_shard(stored, row.blocks[whole:], cut + len(queries), queries.dtype)
            keys, values = (part[:, cut:].transpose(0, 1) for part in held)
        return attend_causal(queries, keys, values, self._scale)


class GroupedQueryOnCPU:
    """See ``Family``."""

    cache_dtypes = CACHE_DTYPES[False, False]

    def register(self) -> None:
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{NanoCPCPUAttentionBackend.__name__}")

    def problem(self, layer: Any) -> tuple[str, str] | None:
        return grouped_query_problem(layer, NanoCPCPUAttentionBackend)

    def shape(self, layer: Any) -> tuple[Any, ...]:
        return layer.impl.num_heads, layer.impl.num_kv_heads, layer.impl.head_size

    def attach(self, layers: Mapping[str, Any]) -> None:
        pass
