# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend, taught shards. Touches ``vllm/v1/attention/backends/flash_attn.py`` of 0.32.

A step without sharded rows runs stock code. In one with them, tables are of the step's own size or fixed. With the
first, and with the collective exchange, rows that visit nobody are vLLM's launch, with length 0 for the rows that
visit; those, and all guests, attend to shards beside it and are merged. With fixed tables and the routed exchange, all
attention of a layer is one kernel (``routed_layer.py``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
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
from ..family import attend
from ..flash_launches import ShardLaunch, gather_tables
from ..partial_rows import RowLayout, merge_rows, pack_pieces, warm_up
from ..sharded_step import ShardedStep
from ..supported import grouped_query_problem
from . import flash_splits
from .fixed_tables import CapturedTables
from .flash_tables import StepTables, exact_tables, most_memory
from .routed_layer import LocalBatch, Route
from .split_kv import KV, Visits, pack
from .split_kv import attend as attend_visits

_layers = itertools.count()


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
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = copy(common_attn_metadata)
        if step.capacity:
            rows, common.seq_lens = self._captured_tables(step).fill(step, common)
        else:
            rows, common.seq_lens = exact_tables(step, common, self.block_size, self._layout, self.num_heads_kv)
        for launch in (*rows.guests, *rows.own):
            self._schedule(launch)
        stock = super().build(0, common, fast_build)
        values = {f.name: getattr(stock, f.name) for f in fields(FlashAttentionMetadata)}
        return ShardedFlashAttentionMetadata(**values, sharded=rows)

    @property
    def _layout(self) -> RowLayout:
        return RowLayout(self.num_heads_q, self.headdim)

    def _captured_tables(self, step: ShardedStep) -> CapturedTables:
        """The worker's; made here where there is none."""
        made: dict[int, CapturedTables] = self.__dict__.setdefault("nanocp_tables", dict(context.tables))
        if step.capacity not in made:
            most = self.vllm_config.scheduler_config.max_num_seqs
            made[step.capacity] = CapturedTables(
                step.capacity,
                step.num_ranks,
                most,
                self._layout,
                self.num_heads_kv,
                self.device,
                context.routes.get(step.capacity),
            )
        return made[step.capacity]

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


class NanoCPFlashAttentionImpl(FlashAttentionImpl):
    """Plain rows, guests, own rows, merge. The KV of a rank's new tokens is in its cache before ``forward`` runs, so
    before it serves guests.

    Raises:
        NanoCPConfigError: this GPU or layer would not run FlashAttention 3.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if self.vllm_flash_attn_version != 3:
            raise NanoCPConfigError(
                f"nanocp: FlashAttention {self.vllm_flash_attn_version} with max_degree above 1 is not supported: only "
                f"version 3 (Hopper GPUs) is known to return mergeable partials; {UNSHARDED}"
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
        """As FlashAttention's; in a sharded step with what the rank's rows see elsewhere, and for guests.

        Three ways: no shard is visited anywhere, which is vLLM's own; the collective exchange (``attend``), outside of
        graphs or within; the routed one, which is one kernel but for rows of several queries.

        Args:
            attn_metadata: with ``sharded`` in a sharded step; None while vLLM measures how much memory a step takes.
            output: [tokens, num_heads, head_size], written to.
        """
        rows: StepTables | None = getattr(attn_metadata, "sharded", None)
        if attn_metadata is None and context.reserve is not None:
            context.reserve()
        args = (layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if rows is None:
            return super().forward(*args)
        stock = super().forward
        if rows.routed is None:
            assert context.exchange is not None
            attend(
                _Layer(self, functools.partial(stock, *args), layer, query, kv_cache, rows, output), context.exchange
            )
            return output
        # The same as one kernel, but for what it leaves to vLLM's.
        if rows.plain:
            stock(*args)
        assert rows.visits is not None
        routes, route = rows.routed
        batch = LocalBatch(query, output, attn_metadata.block_table, attn_metadata.seq_lens)
        routes.attend(batch, self.kv(layer, query, kv_cache), rows.visits, route, self._number)
        return output

    @functools.cached_property
    def _number(self) -> int:
        """Of this layer: all ranks run the same layers in the same order."""
        return next(_layers)

    def pieces(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, launch: ShardLaunch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of queries over pieces of the shards held here, as ``attend_pieces`` returns them."""
        keys, values = self._keys_and_values(kv_cache)
        shape = (len(launch.lengths), self.num_kv_heads)
        q_scale = layer._q_scale.expand(shape) if self.supports_quant_query_input else None
        descale = (q_scale, layer._k_scale.expand(shape), layer._v_scale.expand(shape))
        return flash_splits.attend_pieces(query, keys, values, launch, self.scale, descale)

    def _keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a cache: [num_blocks, block_size, num_kv_heads, head_size]."""
        keys, values = (
            canonicalize_singleton_dim_strides(part) for part in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        if is_quantized_kv_cache(self.kv_cache_dtype):
            keys, values = keys.view(current_platform.fp8_dtype()), values.view(current_platform.fp8_dtype())
        return keys, values

    def kv(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> KV:
        """What queries attend to outside of FlashAttention."""
        scales: Any = (None, None, None)
        if is_quantized_kv_cache(self.kv_cache_dtype):
            quantized = query.dtype == current_platform.fp8_dtype()
            scales = (layer._q_scale if quantized else None, layer._k_scale, layer._v_scale)
        return KV(*self._keys_and_values(kv_cache), self.scale, scales)

    def warm_up(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> None:
        """Compile the kernels of sharded decode steps now, not in front of the first long request. Nothing is sent.

        Args:
            layer: this implementation's.
            kv_cache: of the layer.
            dtype: of the output.
        """
        device, layout = kv_cache.device, RowLayout(self.num_heads, self.head_size)
        output = torch.zeros((1, self.num_heads, self.head_size), dtype=dtype, device=device)
        quantized = is_quantized_kv_cache(self.kv_cache_dtype) and self.supports_quant_query_input
        query = output.to(current_platform.fp8_dtype()) if quantized else output
        routes = next(iter(context.routes.values()), None)
        places = 1 if routes is None else routes.places
        visits = Visits.empty(1, places, self.num_heads, self.num_kv_heads, self.head_size, device)
        kv = self.kv(layer, query, kv_cache)
        if routes is None:
            attend_visits(query, kv, visits, dtype)
            pack(layout.empty(1, device), layout, visits)
            return
        none = torch.zeros((places, 2), dtype=torch.int64, device=device)
        nowhere = torch.full((1, routes.num_ranks + 1), -1, dtype=torch.int64, device=device)
        route = Route(none, none[:, 0], none.new_zeros(4), nowhere, nowhere[0, :1])
        batch = LocalBatch(query, output, visits.done, visits.done[0])
        routes.attend(batch, kv, visits, route, 0)


class _Layer:
    """One layer of a sharded step with the collective exchange; see ``ShardedLayer``.

    Args:
        impl: vLLM's implementation of the layer's attention.
        stock: runs it over the batch.
        layer: vLLM's, for its scales.
        query, kv_cache, output: as of ``forward``.
        rows: the step's tables.
    """

    def __init__(
        self,
        impl: NanoCPFlashAttentionImpl,
        stock: Callable[[], Any],
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: StepTables,
        output: torch.Tensor,
    ) -> None:
        self.impl, self.stock, self.layer, self.query, self.kv_cache = impl, stock, layer, query, kv_cache
        self.rows, self.output, self.layout = rows, output, RowLayout(impl.num_heads, impl.head_size)
        self.send_counts, self.recv_counts = rows.send_counts, rows.recv_counts
        self.partials, self._mine = rows.partials[: rows.exchanged], rows.partials[rows.exchanged :]

    def queries(self) -> torch.Tensor:
        return self.query.index_select(0, self.rows.send[: self.rows.exchanged])

    def plain(self) -> None:
        if self.rows.plain:
            self.stock()

    def own(self) -> None:
        if self.rows.own:
            assert self.rows.tokens is not None
            self._attend(self.query.index_select(0, self.rows.tokens), self.rows.own, self._mine)

    def serve(self, visiting: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        if rows.visits is None:
            answers = self.layout.empty(len(visiting), self.output.device)
            self._attend(visiting, rows.guests, answers)
            return answers
        # At fixed places, guests and this rank's own rows attend in one launch.
        visiting = torch.cat([visiting, self.query.index_select(0, rows.send[rows.exchanged :])])
        answers = self.layout.empty(len(visiting), self.output.device)
        attend_visits(visiting, self.impl.kv(self.layer, self.query, self.kv_cache), rows.visits, self.output.dtype)
        pack(answers, self.layout, rows.visits)
        self._mine.copy_(answers[rows.exchanged :])
        return answers[: rows.exchanged]

    def finish(self, partials: torch.Tensor) -> None:
        rows = self.rows
        if rows.pick is not None:
            assert rows.tokens is not None
            merge_rows(rows.partials, self.layout, rows.pick, rows.tokens, self.output)

    def _attend(self, query: torch.Tensor, launches: list[ShardLaunch], into: torch.Tensor) -> None:
        """Partial results of queries over shards held here, as rows."""
        at = 0
        for launch in launches:
            part = slice(at, at + launch.num_queries)
            outputs, lses = self.impl.pieces(self.layer, query[part], self.kv_cache, launch)
            assert launch.pieces is not None
            pack_pieces(into[part], self.layout, outputs, lses, launch.pieces, launch.launch_row)
            del outputs, lses  # before the next launch has its own: memory is set aside for one
            at = part.stop


class GroupedQueryOnHopper:
    """See ``GPUFamily``."""

    cache_dtypes = CACHE_DTYPES[False, True]
    unrouted = ""

    def __init__(self, vllm_config: Any) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        assert isinstance(model.dtype, torch.dtype)
        self.dtype, self.num_kv_heads = model.dtype, model.get_num_kv_heads(parallel)
        self.layout = RowLayout(model.get_num_attention_heads(parallel), model.get_head_size())
        self.query_bytes = self.layout.query_bytes(self.dtype)

    def register(self) -> None:
        register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.{NanoCPFlashAttentionBackend.__name__}")

    def problem(self, layer: Any) -> tuple[str, str] | None:
        found = grouped_query_problem(layer, NanoCPFlashAttentionBackend)
        mine = (self.layout.num_heads, self.num_kv_heads, self.layout.head_size)
        if found is None and self.shape(layer) != mine:
            found = (
                "attention whose layers differ in heads or head size",
                f"the exchange and its memory are laid out for one shape, not {mine}, {self.shape(layer)}",
            )
        return found

    def shape(self, layer: Any) -> tuple[Any, ...]:
        return layer.impl.num_heads, layer.impl.num_kv_heads, layer.impl.head_size

    def attach(self, layers: Mapping[str, Any]) -> None:
        pass

    def prepare(self, device: torch.device) -> None:
        layout = self.layout
        flash_splits.self_check(layout.num_heads, self.num_kv_heads, layout.head_size, self.dtype, device)
        warm_up(layout, self.dtype, device)
        block = torch.zeros(1, dtype=torch.int32, device=device)
        gather_tables([block.data_ptr()], [1], device)  # compiled now

    def tables(self, capacity: int, num_ranks: int, max_reqs: int, device: torch.device) -> CapturedTables:
        routes = context.routes.get(capacity)
        return CapturedTables(capacity, num_ranks, max_reqs, self.layout, self.num_kv_heads, device, routes)

    def most_memory(self, num_ranks: int, max_tokens: int) -> int:
        return most_memory(num_ranks, max_tokens, self.layout, self.num_kv_heads, self.dtype)

    def warm_up(self, layer: Any) -> None:
        layer.impl.warm_up(layer, layer.kv_cache, self.dtype)
