# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention on CPU. Touches ``vllm/v1/attention/backends/mla/cpu_mla.py`` and
``vllm/model_executor/layers/attention/mla_attention.py`` of vLLM 0.32.

vLLM's layer calls an implementation once for prompts and once for decodes, or once only. Guests are there in any case,
so a layer is taken over as a whole (``attach``). Queries travel before they are absorbed, and results come back in the
space of values: all ranks have the same projections, and merging is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..cache_dtypes import CACHE_DTYPES
from ..context import context
from ..cpu_rows import CPULayer, LocalRow, SplitBatch, later_draft, split_metadata
from ..family import attend
from ..merge import Partial
from ..sharded_step import ShardedStep
from ..supported import latent_problem
from .cpu_latent import Latents, attend_new, attend_shard


@dataclass
class ShardedMLAMetadata(MLACommonMetadata[Any]):
    """Stock metadata, with the batch's split in a sharded step."""

    sharded: SplitBatch | None = field(default=None)


class NanoCPCPUMLABackend(CPUMLABackend):
    """Registered in place of CPU_MLA."""

    @staticmethod
    def get_builder_cls() -> type[NanoCPCPUMLAMetadataBuilder]:
        return NanoCPCPUMLAMetadataBuilder


class NanoCPCPUMLAMetadataBuilder(MLACommonMetadataBuilder[Any]):
    """Splits the batch by the rows laid out in ``context.step``."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if context.step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if context.draft_index:  # V2's runner does not say it
            return self.build_for_drafting(common_attn_metadata, context.draft_index)
        return self._split(context.step, common_attn_metadata, fast_build)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Any:
        """Of a draft model's forwards the first has the target's rows."""
        step = context.draft_step
        if step is None or not draft_index:
            return self.build(0, common_attn_metadata, fast_build=True)
        return self._split(later_draft(step, common_attn_metadata, self.page_size), common_attn_metadata, True)

    def _split(self, step: ShardedStep, common_attn_metadata: CommonAttentionMetadata, fast_build: bool) -> Any:
        stock = super().build
        return split_metadata(
            ShardedMLAMetadata, step, common_attn_metadata, self.page_size,
            lambda common: stock(0, common, fast_build),
        )  # fmt: skip


def forward_sharded(
    layer: Any,
    stock: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """In place of ``MLAAttention.forward_impl``. The latents of the new tokens are in the cache before.

    Args:
        layer: vLLM's.
        stock: its own method.
        Others: as of that.
    """
    rows: SplitBatch | None = getattr(attn_metadata, "sharded", None)
    if rows is None:
        return stock(q, k_c_normed, k_pe, kv_cache, attn_metadata, output=output, **kwargs)
    assert context.exchange is not None
    held = Latents(kv_cache, layer.W_UK_T, layer.W_UV, layer.scale)
    attend(_Layer(rows, q, output.view(-1, layer.num_heads, layer.v_head_dim), stock, k_c_normed, k_pe, held),
           context.exchange)  # fmt: skip
    return output


class _Layer(CPULayer):
    """One layer of a sharded step.

    Args:
        forward: vLLM's method.
        latents: [tokens, rank], of the batch.
        rotated: [tokens, 1, rotated], its rotated keys.
        held: what is attended to.
        Others: as of ``CPULayer``.
    """

    def __init__(
        self,
        rows: SplitBatch,
        query: torch.Tensor,
        output: torch.Tensor,
        forward: Callable[..., torch.Tensor],
        latents: torch.Tensor,
        rotated: torch.Tensor,
        held: Latents,
    ) -> None:
        super().__init__(rows, query, output)
        self._forward, self._latents, self._rotated, self._held_here = forward, latents, rotated, held

    def stock(self, tokens: torch.Tensor | None, output: torch.Tensor) -> None:
        batch = (self.query, self._latents, self._rotated)
        some = batch if tokens is None else [x.index_select(0, tokens) for x in batch]
        self._forward(*some, self._held_here.cache, self.rows.plain, output=output.flatten(1))

    def over_shard(self, queries: torch.Tensor, blocks: torch.Tensor, length: int) -> Partial:
        return attend_shard(queries, self._held_here, blocks, length)

    def over_new(self, row: LocalRow) -> Partial:
        latents = torch.cat([self._latents[row.tokens], self._rotated[row.tokens, 0]], dim=-1)
        return attend_new(self.query[row.tokens], latents, self._held_here)


class LatentOnCPU:
    """See ``Family``."""

    cache_dtypes = CACHE_DTYPES[True, False]

    def register(self) -> None:
        register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.{NanoCPCPUMLABackend.__name__}")

    def problem(self, layer: Any) -> tuple[str, str] | None:
        return latent_problem(layer, NanoCPCPUMLABackend)

    def shape(self, layer: Any) -> tuple[Any, ...]:
        return layer.num_heads, layer.qk_head_dim, layer.v_head_dim, layer.kv_lora_rank

    def attach(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            layer.forward_impl = partial(forward_sharded, layer, layer.forward_impl)
