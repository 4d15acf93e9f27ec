# SPDX-License-Identifier: Apache-2.0
"""A layer of grouped-query attention over shards on GPUs: what is the same whichever of vLLM's backends attends.

A step without sharded rows runs stock code. In one with them, tables are of the step's own size or fixed. With the
first, and with the collective exchange, rows that visit nobody are vLLM's launch, with length 0 for the rows that
visit; those, and all guests, attend to shards beside it and are merged. With fixed tables single queries attend to
shards in this package's own kernel (``split_kv.py``), with both backends; with these and the routed exchange, all
attention of a layer is one kernel (``routed_layer.py``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ...errors import UNSHARDED, refuse
from ..context import context
from ..family import attend
from ..gpu_rows import GPULayer
from ..partial_rows import RowLayout
from ..sharded_step import ShardedStep
from ..supported import grouped_query_problem
from .fixed_tables import CapturedTables
from .flash_tables import Launch, StepTables
from .routed_layer import MAX_LAYERS, LocalBatch, Route, Routes
from .split_kv import KV, Visits, pack
from .split_kv import attend as attend_visits

_layers, _draft_layers = itertools.count(), itertools.count(MAX_LAYERS // 2)


def captured_tables(
    builder: Any, step: ShardedStep, layout: RowLayout, num_kv_heads: int, queries: int | None = None
) -> CapturedTables:
    """The worker's tables for the step's capacity; made here where there are none.

    Args:
        builder: vLLM's builder of metadata, which keeps them.
        step: this rank's part, with a capacity.
        layout: of partial results.
        num_kv_heads: of this worker.
        queries: of a row; None: as many as requests are decoded with.
    """
    queries = queries or context.queries
    kept = dict(context.tables_for(queries))
    made: dict[int, CapturedTables] = builder.__dict__.setdefault(f"nanocp_tables_{queries}", kept)
    if step.capacity not in made:
        rows = builder.vllm_config.scheduler_config.max_num_seqs
        made[step.capacity] = _make_tables(
            step.capacity, step.num_ranks, rows, layout, num_kv_heads, builder.device, queries
        )
    return made[step.capacity]


def _make_tables(
    capacity: int, num_ranks: int, rows: int, layout: RowLayout, num_kv_heads: int, device: torch.device, queries: int
) -> CapturedTables:
    """For so many queries a row, and the routes of as many, if there are any. Where requests are decoded with drafts
    lengths end on the device."""
    routes, ends = context.routes_for(queries).get(capacity), context.queries > 1
    return CapturedTables(capacity, num_ranks, rows, layout, num_kv_heads, device, routes, queries, ends)


class ShardedAttention:
    """Mixed in before vLLM's implementation: plain rows, guests, own rows, merge. The KV of a rank's new tokens is in
    its cache before ``forward`` runs, so before it serves guests."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    kv_cache_dtype: str
    supports_quant_query_input: bool
    _number: int | None = None

    def over_shards(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, launch: Any, rows: torch.Tensor
    ) -> None:
        """Partial results of queries over shards held here.

        Args:
            layer: vLLM's, for its scales.
            query: [launch.num_queries, num_heads, head_size].
            kv_cache: of the layer.
            launch: one of those that the backend's builder has made.
            rows: [launch.num_queries, layout size], to write to; see ``RowLayout``.
        """
        raise NotImplementedError

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock backend's; in a sharded step with what the rank's rows see elsewhere, and for guests.

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
        stock: Callable[..., torch.Tensor] = super().forward  # type: ignore[misc]
        if rows is None:
            return stock(*args)
        if rows.routed is None:
            assert context.exchange is not None
            attend(
                ShardLayer(self, functools.partial(stock, *args), layer, query, kv_cache, rows, output),
                context.exchange,
            )
            return output
        # The same as one kernel, but for what it leaves to vLLM's.
        if rows.plain:
            stock(*args)
        assert rows.visits is not None
        routes, route = rows.routed
        batch = LocalBatch(query, output, attn_metadata.block_table, attn_metadata.seq_lens)
        routes.attend(batch, self.kv(layer, query, kv_cache), rows.visits, route, self._number_of(layer))
        return output

    def _number_of(self, layer: Any) -> int:
        """Of this layer, the same on all ranks, which run the same ones in the same order. A draft model's are larger
        than its target's, behind which it runs in a step: they may well run before, for vLLM captures all of its
        graphs, but few of the target's, when it foresees the memory of all."""
        if self._number is None:
            self._number = next(_draft_layers if layer.is_draft_layer else _layers)
        return self._number

    def keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a cache: [num_blocks, block_size, num_kv_heads, head_size]."""
        keys, values = (
            canonicalize_singleton_dim_strides(part) for part in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        if is_quantized_kv_cache(self.kv_cache_dtype):
            keys, values = keys.view(current_platform.fp8_dtype()), values.view(current_platform.fp8_dtype())
        return keys, values

    def kv(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> KV:
        """What queries attend to outside of the vendor's kernels."""
        scales: Any = (None, None, None)
        if is_quantized_kv_cache(self.kv_cache_dtype):
            quantized = query.dtype == current_platform.fp8_dtype()
            scales = (layer._q_scale if quantized else None, layer._k_scale, layer._v_scale)
        return KV(*self.keys_and_values(kv_cache), self.scale, scales)

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
        heads, kv = (self.num_heads, self.num_kv_heads, self.head_size), self.kv(layer, query, kv_cache)
        if not context.routes:
            visits = Visits.empty(1, 1, *heads, device, context.queries)
            attend_visits(query, kv, visits, dtype)
            pack(layout.empty(context.queries, device), layout, visits)
        for all_routes in (context.routes, context.draft_routes):
            routes = next(iter(all_routes.values()), None)
            if routes is None:
                continue
            visits = Visits.empty(1, routes.places, *heads, device, routes.queries, context.queries > 1)
            none = torch.zeros((routes.places, 2), dtype=torch.int64, device=device)
            nowhere = torch.full((1, routes.num_ranks + 1), -1, dtype=torch.int64, device=device)
            route = Route(none, none[:, 0], none.new_zeros(4), nowhere, nowhere[0, :1])
            batch = LocalBatch(query, output, visits.done, visits.done[0])
            routes.attend(batch, kv, visits, route, 0)


class ShardLayer(GPULayer):
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
        impl: ShardedAttention,
        stock: Callable[[], Any],
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: StepTables,
        output: torch.Tensor,
    ) -> None:
        super().__init__(rows, RowLayout(impl.num_heads, impl.head_size), query, output)
        self.impl, self.stock, self.layer, self.kv_cache, self.rows = impl, stock, layer, kv_cache, rows

    def plain(self) -> None:
        if self.rows.plain:
            self.stock()

    @property
    def places_are_fixed(self) -> bool:
        return self.rows.visits is not None

    def over_shards(self, queries: torch.Tensor, launches: Sequence[Launch], into: torch.Tensor) -> None:
        at = 0
        for launch in launches:
            part = slice(at, at + launch.num_queries)
            self.impl.over_shards(self.layer, queries[part], self.kv_cache, launch, into[part])
            at = part.stop

    def over_places(self, queries: torch.Tensor, into: torch.Tensor) -> None:
        visits = self.rows.visits
        assert visits is not None
        attend_visits(queries, self.impl.kv(self.layer, self.query, self.kv_cache), visits, self.output.dtype)
        pack(into, self.layout, visits)


class GroupedQueryOnGPU:
    """What ``GPUFamily`` asks and the backends answer alike.

    Attributes:
        backend: this package's, which all layers must be built on.
    """

    backend: type[Any]
    unrouted = ""

    def __init__(self, vllm_config: Any) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        assert isinstance(model.dtype, torch.dtype)
        self._config = vllm_config
        self.dtype, self.num_kv_heads = model.dtype, model.get_num_kv_heads(parallel)
        self.layout = RowLayout(model.get_num_attention_heads(parallel), model.get_head_size())
        self.query_bytes = self.layout.query_bytes(self.dtype)

    def problem(self, layer: Any) -> tuple[str, str] | None:
        found = grouped_query_problem(layer, self.backend)
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

    def tables(
        self, capacity: int, num_ranks: int, max_reqs: int, device: torch.device, queries: int
    ) -> CapturedTables:
        return _make_tables(capacity, num_ranks, max_reqs, self.layout, self.num_kv_heads, device, queries)

    def routes(self, capacity: int, num_ranks: int, rank: int, queries: int, allocate: Callable[[int], Any]) -> Routes:
        buffer, pointers = allocate(Routes.size(capacity, num_ranks, self.layout, self.query_bytes, queries))
        return Routes(capacity, num_ranks, rank, self.layout, self.query_bytes, buffer, pointers, queries)

    def warm_up(self, layer: Any) -> None:
        block_size, held = self._config.cache_config.block_size, layer.kv_cache.shape[2]
        if held != block_size:  # vLLM's tables have such pieces then, while shards are laid out in whole blocks
            refuse(
                f"--block-size {block_size} with max_degree above 1",
                f"the kernels of {self.backend.get_name()} take blocks of at most {held} tokens here",
                f"use --block-size {held}, or " + UNSHARDED,
            )
        try:
            layer.impl.warm_up(layer, layer.kv_cache, self.dtype)
        except OutOfResources as error:  # Triton has compared what its kernel takes with what the device has
            refuse(
                "this GPU with max_degree above 1", f"the kernel that attends to shards needs more: {error}", UNSHARDED
            )
