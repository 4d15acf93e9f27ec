# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention on Hopper GPUs. Touches ``vllm/v1/attention/backends/mla/flashattn_mla.py`` and
``vllm/model_executor/layers/attention/mla_attention.py`` of vLLM 0.32.

As on CPU (``cpu_backend.py``): layers are taken over as a whole, queries travel before they are absorbed, results
come back in the space of values. A step without sharded rows runs stock code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder, get_mla_dims
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla.flashattn_mla import (
    FlashAttnMLABackend,
    FlashAttnMLAMetadata,
    FlashAttnMLAMetadataBuilder,
)
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ...errors import UNSHARDED, refuse
from ..context import context
from ..family import attend
from ..flash_launches import gather_tables, later_draft
from ..gpu_rows import GPULayer
from ..partial_rows import RowLayout, merge_rows
from ..row_routes import RowRoutes
from ..sharded_step import ShardedStep
from ..supported import latent_problem
from . import flash_mla
from .flash_latent import Work
from .flash_latent import attend as attend_work
from .flash_mla import FLASH_ATTENTION
from .latent_fixed import FixedLatentTables, empty_block_table, places_memory
from .latent_fixed import warm_up as warm_up_fixed
from .latent_kernel import LatentKernel, Latents
from .latent_sizes import LatentSizes
from .latent_tables import LatentRows, exact_tables, most_memory, projected_at_once
from .routed_latents import attend_routed

_layers = itertools.count()


class LatentTables(MLACommonMetadataBuilder[Any]):
    """Goes before vLLM's metadata builder of a backend: takes the rows laid out in ``context.step`` out of the stock
    metadata and into tables of their own.

    Attributes:
        sharded_metadata: the stock metadata's class, with ``sharded``: the tables of a step, or None.
        kernel: attends to what is held here.
    """

    sharded_metadata: ClassVar[type[Any]]
    kernel: ClassVar[LatentKernel]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if context.draft_index:  # V2's runner does not say it
            return self.build_for_drafting(common_attn_metadata, context.draft_index)
        return self._split(step, common_attn_metadata, fast_build)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Any:
        """Of a draft model's forwards the first has the target's rows, the later ones one query a row. They repeat its
        layers, so over routes of their own, with a number of the exchange for each."""
        step, later = context.step, context.draft_step
        if step is None or later is None or not draft_index:
            return self.build(0, common_attn_metadata, fast_build=True)
        step = later_draft(later, common_attn_metadata, self.page_size)
        serial = context.serial_of(draft_index, step.serial)
        return self._split(replace(step, serial=serial), common_attn_metadata, True, 1)

    def _split(
        self,
        step: ShardedStep,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool,
        queries: int | None = None,
    ) -> Any:
        stock, common = super().build, copy(common_attn_metadata)
        if step.capacity:
            rows, common.seq_lens = self._fixed_tables(step, queries or context.queries).fill(step, common)
            rows.plain = metadata = stock(0, common, fast_build)
        else:
            rows, plain = exact_tables(step, common, self._sizes, self.page_size, self._dtype, self.kernel)
            metadata = self._stock_beside_shards(common if plain is None else plain, fast_build)
            rows.plain = None if plain is None else metadata
        values = {f.name: getattr(metadata, f.name) for f in fields(metadata)}
        return self.sharded_metadata(**values, sharded=rows)

    def _stock_beside_shards(self, common: CommonAttentionMetadata, fast_build: bool) -> Any:
        """vLLM's own metadata, by which it projects less of a prompt's context at a time than usual (up to 65,536
        tokens): memory is full of what visits."""
        usual = self.chunked_prefill_workspace_size
        self.chunked_prefill_workspace_size = min(usual, projected_at_once(self._sizes, self.page_size, self._dtype))
        try:
            return super().build(0, common, fast_build)
        finally:
            self.chunked_prefill_workspace_size = usual

    @property
    def _sizes(self) -> LatentSizes:
        return _sizes_of(self.num_heads, self.mla_dims)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the model."""
        assert isinstance(self.model_config.dtype, torch.dtype)
        return self.model_config.dtype

    def _fixed_tables(self, step: ShardedStep, queries: int) -> FixedLatentTables:
        """The worker's, for rows of so many queries; made here where there are none."""
        kept = dict(context.tables_for(queries))
        made: dict[int, Any] = self.__dict__.setdefault(f"nanocp_tables_{queries}", kept)
        if step.capacity not in made:
            most = self.vllm_config.scheduler_config.max_num_seqs
            tokens = self.model_config.max_model_len
            table = empty_block_table(step.capacity, step.num_ranks, tokens, self.page_size, self.device)
            made[step.capacity] = FixedLatentTables(
                step.capacity, step.num_ranks, most, table, self._sizes, self.page_size, self._dtype, self.kernel,
                queries, context.routes_for(queries).get(step.capacity), context.queries > 1,
            )  # fmt: skip
        return made[step.capacity]


@dataclass
class ShardedFlashAttnMLAMetadata(FlashAttnMLAMetadata):
    """Stock metadata, with the tables of a sharded step."""

    sharded: LatentRows | None = field(default=None)


class NanoCPFlashAttnMLABackend(FlashAttnMLABackend):
    """Registered in place of FLASH_ATTN_MLA."""

    @staticmethod
    def get_builder_cls() -> type[NanoCPFlashAttnMLAMetadataBuilder]:
        return NanoCPFlashAttnMLAMetadataBuilder


class NanoCPFlashAttnMLAMetadataBuilder(LatentTables, FlashAttnMLAMetadataBuilder):
    """See ``LatentTables``."""

    sharded_metadata = ShardedFlashAttnMLAMetadata
    kernel = FLASH_ATTENTION


def _sizes_of(num_heads: int, dims: Any) -> LatentSizes:
    """From ``MLADims``, or a layer, which has the same names."""
    return LatentSizes(num_heads, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.kv_lora_rank, dims.v_head_dim)


def forward_sharded(
    layer: Any,
    stock: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """In place of ``MLAAttention.forward_impl``. The latents of the new tokens are in the cache before.

    Args:
        layer: vLLM's.
        stock: its own method.
        Others: as of that.
    """
    if attn_metadata is None and context.reserve is not None:
        context.reserve()
    rows: LatentRows | None = getattr(attn_metadata, "sharded", None)
    if rows is None:
        kwargs |= dict(output_scale=output_scale, output_block_scale=output_block_scale)
        return stock(q, k_c_normed, k_pe, kv_cache, attn_metadata, output=output, **kwargs)
    assert output_scale is None and output_block_scale is None, "the pass that makes these is refused"
    plain = partial(_plain, rows, partial(stock, **kwargs), (q, k_c_normed, k_pe), kv_cache, output)
    results, together = output.view(-1, layer.num_heads, layer.v_head_dim), rows.sizes.num_heads
    scales = rows.kernel.scales(layer)
    if rows.routed is not None:
        held = Latents(kv_cache, layer.W_UK_T, layer.W_UV, layer.scale, rows.sizes, rows.kernel, scales)
        attend_routed(rows.routed, rows, held, q, results, plain, layer.nanocp_number)
        return output
    assert context.exchange is not None
    for first in range(0, layer.num_heads, together):
        heads = slice(first, first + together)
        w_uk, w_uv = layer.W_UK_T[heads], layer.W_UV[heads]
        held = Latents(kv_cache, w_uk, w_uv, layer.scale, rows.sizes, rows.kernel, scales, (k_c_normed, k_pe))
        one = _Layer(rows, held, q[:, heads], results[:, heads], None if first else plain)
        attend(one, context.exchange)
    return output


def _plain(
    rows: LatentRows,
    stock: Callable[..., torch.Tensor],
    batch: tuple[torch.Tensor, ...],
    cache: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """vLLM's attention of the rows that visit nobody, all heads.

    Args:
        rows: the step's tables.
        stock: vLLM's method.
        batch: queries, latents and rotated keys of the batch.
        cache: of the layer.
        output: [tokens, num_heads * value_size].
    """
    if rows.plain is None:
        return
    if rows.plain_tokens is None:
        stock(*batch, cache, rows.plain, output=output)
        return
    some = output.new_empty((len(rows.plain_tokens), *output.shape[1:]))
    stock(*(x.index_select(0, rows.plain_tokens) for x in batch), cache, rows.plain, output=some)
    output.index_copy_(0, rows.plain_tokens, some)


class _Layer(GPULayer):
    """Some heads of one layer of a sharded step; see ``ShardedLayer``.

    Args:
        rows: the step's tables.
        held: what is attended to.
        query: [tokens, num_heads, query size].
        output: [tokens, num_heads, value_size].
        plain_rows: does the rows that visit nobody; None: that is done.
    """

    def __init__(
        self,
        rows: LatentRows,
        held: Latents,
        query: torch.Tensor,
        output: torch.Tensor,
        plain_rows: Callable[[], None] | None,
    ) -> None:
        super().__init__(rows, RowLayout(held.sizes.num_heads, held.sizes.value_size), query, output)
        self.rows, self.held, self.plain_rows = rows, held, plain_rows

    def plain(self) -> None:
        if self.plain_rows is not None:
            self.plain_rows()

    @property
    def places_are_fixed(self) -> bool:
        return self.rows.fixed is not None

    def over_shards(self, queries: torch.Tensor, launches: Sequence[Work], into: torch.Tensor) -> None:
        outputs, lses = self.layout.outputs(into), self.layout.lses(into)
        for work in launches:
            attend_work(queries, self.held, work, outputs, lses)

    def over_places(self, queries: torch.Tensor, into: torch.Tensor) -> None:
        assert self.rows.fixed is not None
        self.over_shards(queries, self.rows.fixed, into)


class LatentOnHopper:
    """See ``GPUFamily``. Over a cache of 16 bits; ``flashmla_backend.py`` has that of 8.

    Attributes:
        stock, backend: vLLM's backend, and what is put in its place.
        kernel: attends to what is held here.
    """

    cache_dtypes: tuple[str, ...] = ("auto",)
    stock = AttentionBackendEnum.FLASH_ATTN_MLA
    backend: type[Any] = NanoCPFlashAttnMLABackend
    kernel: LatentKernel = FLASH_ATTENTION
    unrouted = ""
    _block_table: torch.Tensor | None = None

    def __init__(self, vllm_config: Any) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        assert isinstance(model.dtype, torch.dtype)
        self.config, self.dtype = vllm_config, model.dtype
        self.sizes = _sizes_of(model.get_num_attention_heads(parallel), get_mla_dims(model))
        self.layout = RowLayout(self.sizes.num_heads, self.sizes.value_size)
        self.query_bytes = self.sizes.num_heads * self.sizes.query_size * self.dtype.itemsize

    def register(self) -> None:
        register_backend(self.stock, f"{self.backend.__module__}.{self.backend.__name__}")

    def problem(self, layer: Any) -> tuple[str, str] | None:
        found = latent_problem(layer, self.backend)
        if found is not None:
            return found
        prompts = layer.prefill_backend
        version = getattr(prompts, "vllm_flash_attn_version", None)
        if type(prompts) is not FlashAttnPrefillBackend or version != flash_mla.VERSION:
            kind = f"{type(prompts).__name__}, FlashAttention {version}"
            return f"latent attention whose prompts attend by {kind}", "shards attend by FlashAttention 3 as well"
        if (seen := _sizes_of(layer.num_heads, layer)) != self.sizes:
            return (
                "latent attention whose layers differ in size",
                f"the exchange and its memory are laid out for one shape, not {self.sizes}, {seen}",
            )
        return None

    def shape(self, layer: Any) -> tuple[Any, ...]:
        return layer.num_heads, layer.qk_head_dim, layer.v_head_dim, layer.kv_lora_rank

    def attach(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            layer.nanocp_number = next(_layers)  # the same on all ranks, which have the same layers in the same order
            layer.forward_impl = partial(forward_sharded, layer, layer.forward_impl)

    def prepare(self, device: torch.device) -> None:
        drafts = self.config.speculative_config
        queries = 1 if drafts is None else 1 + drafts.num_speculative_tokens
        if queries > 1 and not self.kernel.takes(queries, self.sizes):
            refuse(
                f"latent attention with {queries - 1} drafts a step and max_degree above 1",
                "rows of so many queries attend as prompts do, and these have no drafts",
                "take fewer in --speculative-config, or " + UNSHARDED,
            )
        self.kernel.self_check(self.sizes, self.dtype, device)
        block = torch.zeros(1, dtype=torch.int32, device=device)
        gather_tables([block.data_ptr()], [1], device)  # compiled now
        warm_up_fixed(device)

    def tables(self, capacity: int, num_ranks: int, max_reqs: int, device: torch.device, queries: int) -> Any:
        block_size = self.config.cache_config.block_size
        if self._block_table is None:
            most, tokens = max(context.capacities, default=capacity), self.config.model_config.max_model_len
            self._block_table = empty_block_table(most, num_ranks, tokens, block_size, device)
        table, layers = self._block_table, (self.sizes, block_size, self.dtype, self.kernel)
        routes, ends = context.routes_for(queries).get(capacity), context.queries > 1
        return FixedLatentTables(capacity, num_ranks, max_reqs, table, *layers, queries, routes, ends)

    def routes(
        self, capacity: int, num_ranks: int, rank: int, queries: int, allocate: Callable[[int], Any]
    ) -> RowRoutes:
        most = capacity * queries
        memory = allocate(RowRoutes.size(most, num_ranks, self.layout, self.query_bytes))
        return RowRoutes(most, num_ranks, rank, self.layout, self.query_bytes, *memory)

    def most_memory(self, num_ranks: int, max_tokens: int) -> int:
        most = most_memory(num_ranks, max_tokens, self.sizes, self.dtype, self.kernel)
        layers = self.sizes, self.dtype, self.kernel
        # The later forwards of a draft model have fewer queries, but these are cut into more pieces.
        used = [(capacity, context.queries) for capacity in context.routes]
        used += [(capacity, 1) for capacity in context.draft_routes]
        return max([most, *(places_memory(capacity, num_ranks, queries, *layers) for capacity, queries in used)])

    def warm_up(self, layer: Any) -> None:
        device, layout, many = layer.kv_cache.device, self.layout, 1024
        rows = layout.empty(many, device)
        output = torch.empty((many, layout.num_heads, layout.head_size), dtype=self.dtype, device=device)
        index = torch.zeros(many, dtype=torch.int64, device=device)
        for n in (1, many):
            merge_rows(rows, layout, index[:n, None], index[:n], output)
        for routes in (*context.routes.values(), *context.draft_routes.values()):
            routes.warm_up(self.dtype, self.sizes.query_size)
        flash_mla.warm_up_prompts(layer.impl, self.sizes, self.dtype, device)
