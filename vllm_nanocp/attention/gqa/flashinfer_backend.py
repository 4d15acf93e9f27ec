# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashInfer backend, taught shards. Touches ``vllm/v1/attention/backends/flashinfer.py`` of 0.32.

What it does in a sharded step is in ``gpu_layer.py``, its launches over shards in ``flashinfer_launches.py``. Stock
attention is planned on the host, also for graphs: a row that visits has length 0 there, too, as vLLM has it for rows
that pad a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadata,
    FlashInferMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ...errors import UNSHARDED, refuse
from ..cache_dtypes import CACHE_DTYPES
from ..context import context
from ..partial_rows import RowLayout, warm_up
from ..sharded_step import ShardedStep
from . import flashinfer_launches
from .flash_tables import StepTables, exact_tables
from .flashinfer_launches import LaunchShape, PlannedLaunch, Planners, workspace_bytes
from .gpu_layer import GroupedQueryOnGPU, ShardedAttention, captured_tables


@dataclass
class ShardedFlashInferMetadata(FlashInferMetadata):
    """Stock metadata, without the rows that visit in a sharded step.

    Attributes:
        sharded: the step's tables.
        block_table, seq_lens: of the batch; rows that visit have length 0.
    """

    sharded: StepTables | None = field(default=None)
    block_table: torch.Tensor | None = field(default=None)
    seq_lens: torch.Tensor | None = field(default=None)


class NanoCPFlashInferBackend(FlashInferBackend):
    """Registered in place of FLASHINFER; a step without sharded rows runs stock code."""

    @staticmethod
    def get_impl_cls() -> type[NanoCPFlashInferImpl]:
        return NanoCPFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[NanoCPFlashInferMetadataBuilder]:
        return NanoCPFlashInferMetadataBuilder


class NanoCPFlashInferMetadataBuilder(FlashInferMetadataBuilder):
    """Takes the rows laid out in ``context.step`` out of the stock metadata and into tables of their own."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashInferMetadata:
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common, layout = copy(common_attn_metadata), RowLayout(self.num_qo_heads, self.head_dim)
        if step.capacity:
            rows, common.seq_lens = captured_tables(self, step, layout, self.num_kv_heads).fill(step, common)
        else:
            self._planners.begin()
            rows, common.seq_lens = exact_tables(step, common, layout, self._planners.plan)
            self._planners.end()
        common.seq_lens_cpu_upper_bound = _without_visits(step, common)
        stock = super().build(0, common, fast_build) if rows.plain else self._nothing(common)
        values = {f.name: getattr(stock, f.name) for f in fields(FlashInferMetadata)}
        return ShardedFlashInferMetadata(
            **values, sharded=rows, block_table=common.block_table_tensor, seq_lens=common.seq_lens
        )

    @functools.cached_property
    def _planners(self) -> Planners:
        dtype, kv_dtype = self.model_config.dtype, self.kv_cache_dtype
        assert isinstance(dtype, torch.dtype) and isinstance(kv_dtype, torch.dtype)
        shape = LaunchShape(
            num_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            block_size=self.page_size,
            scale=self.sm_scale,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        stock, need = self._get_workspace_buffer(), workspace_bytes(shape, self.device)
        enough = len(stock) >= need
        return Planners(shape, stock if enough else torch.empty(need, dtype=torch.uint8, device=self.device))

    def _nothing(self, common: CommonAttentionMetadata) -> FlashInferMetadata:
        """Of a batch of which stock attention computes nothing; so nothing is planned for it."""
        return FlashInferMetadata(
            kv_cache_layout=self.kv_cache_layout,
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping,
            q_data_type_prefill=self.q_data_type_prefill,
            q_data_type_decode=self.q_data_type_decode,
            num_decodes=0,
            num_decode_tokens=0,
            num_prefills=0,
            num_prefill_tokens=0,
            causal=True,
            prefill=None,
            decode=None,
        )


def _without_visits(step: ShardedStep, common: CommonAttentionMetadata) -> torch.Tensor | None:
    """The batch's lengths on the host, 0 for rows that visit."""
    lengths = common.seq_lens_cpu_upper_bound
    if lengths is not None:
        lengths = lengths.clone()
        lengths[[own.batch_row() for own in step.own]] = 0
    return lengths


class NanoCPFlashInferImpl(ShardedAttention, FlashInferImpl):  # type: ignore[misc]
    """Attends to shards by FlashInfer's kernel ``fa2``."""

    def over_shards(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, launch: PlannedLaunch, rows: torch.Tensor
    ) -> None:
        assert launch.scale == self.scale
        scales, v_scale, quantized = None, 1.0, query.dtype == current_platform.fp8_dtype()
        if is_quantized_kv_cache(self.kv_cache_dtype):
            scales = layer._q_scale_float if quantized else 1.0, layer._k_scale_float
            v_scale = layer._v_scale_float
        if quantized:  # as they come for kernels of Blackwell; this one takes 16 bits
            query = query.to(launch.dtype)
        outputs, lses = flashinfer_launches.attend(query, *self.keys_and_values(kv_cache), launch, scales)
        layout = RowLayout(self.num_heads, self.head_size)
        into = layout.outputs(rows).copy_(outputs)
        if v_scale != 1.0:
            into.mul_(v_scale)  # in float32
        layout.lses(rows).copy_(lses)


class GroupedQueryWithFlashInfer(GroupedQueryOnGPU):
    """See ``GPUFamily``. From Ampere on; on Hopper where it is chosen, and by default on Blackwell, as in vLLM."""

    backend = NanoCPFlashInferBackend
    cache_dtypes = CACHE_DTYPES[False, True]

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._cache = vllm_config.cache_config
        self._scale, self._workspace = self.layout.head_size**-0.5, 0

    def register(self) -> None:
        register_backend(AttentionBackendEnum.FLASHINFER, f"{__name__}.{NanoCPFlashInferBackend.__name__}")

    def attach(self, layers: Mapping[str, Any]) -> None:
        scales = {layer.impl.scale for layer in layers.values()}
        if len(scales) > 1:
            refuse(
                "attention whose layers scale their scores differently with max_degree above 1",
                "FlashInfer plans a step's attention once for all layers",
                UNSHARDED,
            )
        self._scale = scales.pop()

    def prepare(self, device: torch.device) -> None:
        quantized = is_quantized_kv_cache(self._cache.cache_dtype)
        if quantized and not current_platform.has_device_capability(89):
            refuse(
                f"--kv-cache-dtype {self._cache.cache_dtype} with max_degree above 1 on this GPU",
                "the kernel that attends to shards has no float8 before compute capability 8.9",
                "leave it out, or " + UNSHARDED,
            )
        layout = self.layout
        shape = LaunchShape(
            num_heads=layout.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=layout.head_size,
            block_size=self._cache.block_size or 16,
            scale=self._scale,
            dtype=self.dtype,
            kv_dtype=current_platform.fp8_dtype() if quantized else self.dtype,
        )
        need = workspace_bytes(shape, device)
        # Some models have so many query heads a KV head that vLLM's own may be too small.
        self._workspace = need if need > envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE else 0
        flashinfer_launches.self_check(shape, device)
        warm_up(layout, self.dtype, device)

    def most_memory(self, num_ranks: int, max_tokens: int) -> int:
        return self._workspace + flashinfer_launches.most_memory(num_ranks, max_tokens, self.layout, self.dtype)
