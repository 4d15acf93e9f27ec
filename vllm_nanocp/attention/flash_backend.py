# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend, taught shards. Touches ``vllm/v1/attention/backends/flash_attn.py`` of 0.32.

A step without sharded rows runs stock code. In one with them, rows that visit nobody still do: their launch is vLLM's,
with length 0 for the rows that visit. Those, and all guests, attend to shards in one launch more (two outside of
graphs), with log-sum-exps. FlashAttention's log-sum-exp is natural.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from ..errors import NanoCPConfigError
from .context import ShardedStep, context
from .flash_tables import CapturedTables, ShardedRows, ShardLaunch, exact_tables
from .partials import LOG2_E, RowLayout

# Enough pieces of one row's KV, over its KV heads, for all processors of a Hopper GPU (132).
_BUSY = 128


@dataclass
class ShardedFlashAttentionMetadata(FlashAttentionMetadata):
    """Stock metadata, without the rows that visit in a sharded step."""

    sharded: ShardedRows | None = field(default=None)


class NanoCPFlashAttentionBackend(FlashAttentionBackend):
    """Registered in place of FLASH_ATTN; a step without sharded rows runs stock code."""

    @staticmethod
    def get_impl_cls() -> type[NanoCPFlashAttentionImpl]:
        return NanoCPFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NanoCPFlashAttentionMetadataBuilder]:
        return NanoCPFlashAttentionMetadataBuilder


class NanoCPFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Takes the rows laid out in ``context.step`` out of the stock metadata and into tables of their own."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = copy(common_attn_metadata)
        if step.capacity:
            tables = self._captured_tables(step, common)
            rows, common.seq_lens = tables.fill(step, common)
        else:
            rows, common.seq_lens = exact_tables(step, common, self.block_size, self._layout)
        stock = super().build(0, common, fast_build)
        if step.capacity:
            self._schedule(tables.launch)
        values = {f.name: getattr(stock, f.name) for f in fields(FlashAttentionMetadata)}
        return ShardedFlashAttentionMetadata(**values, sharded=rows)

    @property
    def _layout(self) -> RowLayout:
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return RowLayout(self.num_heads_q, self.headdim, dtype)

    def _captured_tables(self, step: ShardedStep, common: CommonAttentionMetadata) -> CapturedTables:
        """Made when the first graph of a capacity is captured."""
        made: dict[int, CapturedTables] = self.__dict__.setdefault("nanocp_tables", {})
        if step.capacity not in made:
            places = step.capacity * step.num_ranks
            blocks = min(common.block_table_tensor.shape[1], self.cache_config.num_gpu_blocks or 1 << 31)
            made[step.capacity] = CapturedTables(
                capacity=step.capacity,
                num_ranks=step.num_ranks,
                max_tokens=self.vllm_config.scheduler_config.max_num_seqs,
                max_blocks=blocks,
                block_size=self.block_size,
                layout=self._layout,
                num_splits=max(self.max_num_splits, _BUSY // self.num_heads_kv),
                schedule_size=1 + -(-places // 4) * 16 if self.aot_schedule else 0,
                device=self.device,
            )
        return made[step.capacity]

    def _schedule(self, launch: ShardLaunch) -> None:
        """Have FlashAttention divide the work, once a step rather than once a layer."""
        made = self._get_scheduler_metadata(
            aot_schedule=self.aot_schedule,
            batch_size=len(launch.lengths),
            cu_query_lens=launch.query_starts,
            max_query_len=1,
            seqlens=launch.lengths,
            max_seq_len=launch.max_length,
            causal=launch.causal,
            max_num_splits=launch.num_splits,
        )
        if made is not None:
            assert launch.schedule is not None
            launch.schedule[: len(made)] = made
            launch.schedule[len(made) :] = 0


class NanoCPFlashAttentionImpl(FlashAttentionImpl):
    """Plain rows, guests, own rows, merge. The KV of all new tokens is in the cache before ``forward`` runs, on every
    rank before it serves guests (the dispatch is a collective).

    Raises:
        NanoCPConfigError: this GPU or layer would not run FlashAttention 3.
    """

    serves_shards = True

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if self.vllm_flash_attn_version != 3:
            raise NanoCPConfigError(
                f"nanocp: FlashAttention {self.vllm_flash_attn_version} with max_degree above 1 is not supported: only "
                "version 3 (Hopper GPUs) is known to return mergeable partials; use --nanocp-config "
                "'{\"max_degree\": 1}' to serve with one scheduler and no sharding"
            )

    def forward(  # type: ignore[override]
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows: ShardedRows | None = getattr(attn_metadata, "sharded", None)
        if rows is None or rows.plain:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if rows is not None:
            self._visit(layer, query, kv_cache, rows, output)
        return output

    def _visit(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: ShardedRows,
        output: torch.Tensor,
    ) -> None:
        """The sharded rows of a step: dispatch, attend, combine, merge, write."""
        exchange, layout = context.exchange, RowLayout(self.num_heads, self.head_size, output.dtype)
        assert exchange is not None
        visiting = exchange.dispatch(query.index_select(0, rows.send), rows.send_counts, rows.recv_counts)
        answers = layout.empty(len(visiting), output.device)
        if rows.guests is not None:
            self._attend(layer, visiting, kv_cache, rows.guests, layout, answers)
        sent = rows.partials[: len(rows.send)]
        exchange.combine(answers, rows.recv_counts, rows.send_counts, sent)
        if rows.own is not None:
            assert rows.tokens is not None
            mine = rows.partials[len(sent) : len(sent) + len(rows.tokens)]
            self._attend(layer, query.index_select(0, rows.tokens), kv_cache, rows.own, layout, mine)
        if rows.pick is None:
            return
        merged = layout.merge(rows.partials, rows.pick)
        if rows.result_of is None:
            assert rows.tokens is not None
            output.index_copy_(0, rows.tokens, merged)
        else:
            assert rows.visits is not None
            out = output[: len(rows.visits)]
            torch.where(rows.visits[:, None, None], merged.index_select(0, rows.result_of), out, out=out)

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        launch: ShardLaunch,
        layout: RowLayout,
        into: torch.Tensor,
    ) -> None:
        """Partial results of queries over shards held here, as rows."""
        keys, values = (
            canonicalize_singleton_dim_strides(part) for part in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        if is_quantized_kv_cache(self.kv_cache_dtype):
            keys, values = keys.view(current_platform.fp8_dtype()), values.view(current_platform.fp8_dtype())
        scales, version = (len(launch.lengths), self.num_kv_heads), self.vllm_flash_attn_version
        assert version is not None
        _, lse = fa_utils.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=layout.outputs(into),
            cu_seqlens_q=launch.query_starts,
            max_seqlen_q=launch.max_queries,
            seqused_k=launch.lengths,
            max_seqlen_k=launch.max_length,
            softmax_scale=self.scale,
            causal=launch.causal,
            block_table=launch.block_table,
            return_softmax_lse=True,
            scheduler_metadata=launch.schedule,
            fa_version=version,
            q_descale=layer._q_scale.expand(scales) if self.supports_quant_query_input else None,
            k_descale=layer._k_scale.expand(scales),
            v_descale=layer._v_scale.expand(scales),
            num_splits=launch.num_splits,
        )
        torch.mul(lse.transpose(0, 1), LOG2_E, out=layout.lses(into))
