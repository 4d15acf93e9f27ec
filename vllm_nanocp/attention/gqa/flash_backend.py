# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend, taught shards. Touches ``vllm/v1/attention/backends/flash_attn.py`` of 0.32.

What it does in a sharded step is in ``gpu_layer.py``; here are its launches over shards and its metadata.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ...errors import UNSHARDED, NanoCPConfigError
from ..cache_dtypes import CACHE_DTYPES
from ..context import context
from ..flash_launches import ShardLaunch, TableRow, gather_tables, later_draft, make_launch
from ..partial_rows import RowLayout, pack_pieces, warm_up
from ..sharded_step import ShardedStep
from . import flash_splits
from .flash_tables import StepTables, exact_tables, most_memory
from .gpu_layer import GroupedQueryOnGPU, ShardedAttention, captured_tables


@dataclass
class ShardedFlashAttentionMetadata(FlashAttentionMetadata):
    """Stock metadata, without the rows that visit in a sharded step."""

    sharded: StepTables | None = field(default=None)


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
        if context.step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if context.draft_index:  # V2's runner does not say it
            return self.build_for_drafting(common_attn_metadata, context.draft_index)
        return self._split(context.step, common_attn_metadata, fast_build)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> FlashAttentionMetadata:
        """Of a draft model's forwards. The first has the target's rows, with V1's runner over the collective exchange.
        The later ones repeat its layers, over routes of their own, with a number of the exchange for each."""
        step, later = context.step, context.draft_step
        if step is None or later is None:
            return self.build(0, common_attn_metadata, fast_build=True)
        if not draft_index:
            return self._split(replace(step, capacity=0), common_attn_metadata, True)
        step = later_draft(later, common_attn_metadata, self.block_size)
        serial = context.serial_of(draft_index, step.serial)
        return self._split(replace(step, serial=serial), common_attn_metadata, True, 1)

    def _split(
        self,
        step: ShardedStep,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool,
        queries: int | None = None,
    ) -> FlashAttentionMetadata:
        common = copy(common_attn_metadata)
        if step.capacity:
            tables = captured_tables(self, step, self._layout, self.num_heads_kv, queries)
            rows, common.seq_lens = tables.fill(step, common)
        else:
            rows, common.seq_lens = exact_tables(step, common, self._layout, self._launch)
        stock = super().build(0, common, fast_build)
        values = {f.name: getattr(stock, f.name) for f in fields(FlashAttentionMetadata)}
        return ShardedFlashAttentionMetadata(**values, sharded=rows)

    @property
    def _layout(self) -> RowLayout:
        return RowLayout(self.num_heads_q, self.headdim)

    def _launch(self, rows: list[TableRow], causal: bool) -> ShardLaunch:
        launch = make_launch(rows, causal, self._layout, self.num_heads_kv, self.block_size, self.device)
        self._schedule(launch)
        return launch

    def _schedule(self, launch: ShardLaunch) -> None:
        quantized = is_quantized_kv_cache(self.cache_config.cache_dtype)
        flash_splits.make_schedule(
            launch,
            num_heads=self.num_heads_q,
            num_kv_heads=self.num_heads_kv,
            head_size=self.headdim,
            block_size=self.block_size,
            dtype=current_platform.fp8_dtype() if quantized else self.kv_cache_dtype,
        )


class NanoCPFlashAttentionImpl(ShardedAttention, FlashAttentionImpl):  # type: ignore[misc]
    """Attends to shards by FlashAttention 3, whose float32 pieces are merged here.

    Raises:
        NanoCPConfigError: this GPU or layer would not run FlashAttention 3.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if self.vllm_flash_attn_version != 3:
            raise NanoCPConfigError(
                f"nanocp: FlashAttention {self.vllm_flash_attn_version} with max_degree above 1 is not supported: only "
                "version 3 (Hopper GPUs) is known to return mergeable partials; use --attention-backend FLASHINFER, or "
                + UNSHARDED
            )

    def over_shards(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, launch: ShardLaunch, rows: torch.Tensor
    ) -> None:
        keys, values = self.keys_and_values(kv_cache)
        shape = (len(launch.lengths), self.num_kv_heads)
        q_scale = layer._q_scale.expand(shape) if self.supports_quant_query_input else None
        descale = (q_scale, layer._k_scale.expand(shape), layer._v_scale.expand(shape))
        outputs, lses = flash_splits.attend_pieces(query, keys, values, launch, self.scale, descale)
        assert launch.pieces is not None
        pack_pieces(rows, RowLayout(self.num_heads, self.head_size), outputs, lses, launch.pieces, launch.launch_row)


class GroupedQueryOnHopper(GroupedQueryOnGPU):
    """See ``GPUFamily``."""

    backend = NanoCPFlashAttentionBackend
    cache_dtypes = CACHE_DTYPES[False, True]

    def register(self) -> None:
        register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.{NanoCPFlashAttentionBackend.__name__}")

    def prepare(self, device: torch.device) -> None:
        layout = self.layout
        flash_splits.self_check(layout.num_heads, self.num_kv_heads, layout.head_size, self.dtype, device)
        warm_up(layout, self.dtype, device)
        block = torch.zeros(1, dtype=torch.int32, device=device)
        gather_tables([block.data_ptr()], [1], device)  # compiled now

    def most_memory(self, num_ranks: int, max_tokens: int) -> int:
        return most_memory(num_ranks, max_tokens, self.layout, self.num_kv_heads, self.dtype)
