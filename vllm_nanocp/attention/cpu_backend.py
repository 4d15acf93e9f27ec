# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention backend, taught shards. Touches ``vllm/v1/attention/backends/cpu_attn.py`` of 0.32."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ..errors import refuse
from .context import ShardedStep, context
from .cpu_partial import as_stored, attend_causal, attend_shard, gather_shard
from .merge import merge_partials


@dataclass
class LocalRow:
    """One row's queries and the KV held here that they see.

    Attributes:
        tokens: where the queries are in the batch.
        blocks: int64 [num_blocks], the blocks held here, in order.
        past: KV tokens of them with a position below the first query.
        visits: rows of the combined partials, one slice a shard visited elsewhere.
    """

    tokens: slice
    blocks: torch.Tensor
    past: int
    visits: list[slice]


@dataclass
class ShardedRows:
    """A batch of a sharded step, split.

    Attributes:
        step: the exchange's counts and the guests.
        guest_rows: for each guest, its queries among the received ones.
        plain: metadata of the rows that visit no other shard; None when there are none.
        plain_tokens: int64, where their queries are; None when they are the whole batch.
        local: the rows that do.
        send_tokens: int64 [sum(step.send_counts)], queries to dispatch, in the exchange's order.
    """

    step: ShardedStep
    guest_rows: list[slice]
    plain: CPUAttentionMetadata | None
    plain_tokens: torch.Tensor | None
    local: list[LocalRow]
    send_tokens: torch.Tensor


@dataclass
class ShardedCPUAttentionMetadata(CPUAttentionMetadata):
    """Stock metadata for the whole batch, with its split in a sharded step."""

    sharded: ShardedRows | None = field(default=None)


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
        if is_quantized_kv_cache(self.kv_cache_dtype) and self.isa != "vec":
            refuse(
                f"--kv-cache-dtype {self.kv_cache_dtype} with blocks of {self.block_size} tokens",
                "vLLM's kernel for it takes multiples of 32",
                "use --block-size 32 or a multiple, or leave --kv-cache-dtype out",
            )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        rows = [own.batch_row() for own in step.own]
        visiting = set(rows)
        plain_rows = [r for r in range(common.num_reqs) if r not in visiting]
        stock, plain_tokens = self._plain(common, starts, plain_rows, fast_build)
        send_tokens, visits = step.lay_out([starts[row] for row in rows])
        local = self._local(common, starts, rows, step, visits)
        return ShardedCPUAttentionMetadata(
            **{f.name: getattr(stock, f.name) for f in fields(CPUAttentionMetadata)},
            sharded=ShardedRows(
                step, step.guest_rows(), stock if plain_rows else None, plain_tokens, local, send_tokens
            ),
        )

    def _plain(
        self, common: CommonAttentionMetadata, starts: list[int], rows: list[int], fast_build: bool
    ) -> tuple[CPUAttentionMetadata, torch.Tensor | None]:
        """Stock metadata of the given rows, and where their tokens are (None: all)."""
        if not rows or len(rows) == common.num_reqs:
            return super().build(0, common, fast_build), None
        index = torch.tensor(rows)
        lengths = torch.tensor([starts[r + 1] - starts[r] for r in rows], dtype=common.query_start_loc.dtype)
        part = copy(common)
        part.num_reqs = len(rows)
        part.query_start_loc = torch.zeros(len(rows) + 1, dtype=common.query_start_loc.dtype)
        torch.cumsum(lengths, 0, out=part.query_start_loc[1:])
        part.query_start_loc_cpu = part.query_start_loc
        part.seq_lens = common.seq_lens[index].contiguous()
        part.block_table_tensor = common.block_table_tensor[index].contiguous()
        part.num_actual_tokens = int(part.query_start_loc[-1])
        part.max_query_len = int(lengths.max())
        part.max_seq_len = int(part.seq_lens.max())
        tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])
        return super().build(0, part, fast_build), tokens

    def _local(
        self,
        common: CommonAttentionMetadata,
        starts: list[int],
        rows: list[int],
        step: ShardedStep,
        visits: list[list[slice]],
    ) -> list[LocalRow]:
        local: list[LocalRow] = []
        for own, row, mine in zip(step.own, rows, visits, strict=True):
            tokens = slice(starts[row], starts[row] + own.num_queries)
            num_blocks = -(-(own.local_tokens + own.num_queries) // self.block_size)
            blocks = common.block_table_tensor[row, own.first_block : own.first_block + num_blocks].long()
            local.append(LocalRow(tokens, blocks, own.local_tokens, mine))
        return local


class NanoCPCPUAttentionImpl(CPUAttentionBackendImpl):
    """Local rows, guests, merge. The KV of all new tokens is in the cache before ``forward`` runs, on every rank
    before it serves guests (the dispatch is a collective)."""

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
        rows = getattr(attn_metadata, "sharded", None)
        if rows is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        exchange, step = context.exchange, rows.step
        assert exchange is not None
        arrive = exchange.dispatch(query.index_select(0, rows.send_tokens), step.send_counts, step.recv_counts)
        # What needs no other rank comes first: in ``combine`` each waits for all.
        if rows.plain is not None:
            self._plain(layer, query, key, value, kv_cache, rows, output)
        # A quantized cache holds keys and values divided by these. Scores are linear in keys, results in values.
        scale, value_scale = self.scale * layer._k_scale_float, layer._v_scale_float
        stored = as_stored(kv_cache, self.kv_cache_dtype, query.dtype)
        held = [self._held(row, query, key, value, stored, scale) for row in rows.local]
        answers = self._serve(rows, arrive(), stored, scale)
        partials = exchange.combine(answers, step.recv_counts, step.send_counts)
        for row, parts in zip(rows.local, held, strict=True):
            parts += [(partials[visit, :, :-1], partials[visit, :, -1]) for visit in row.visits]
            outputs, lses = zip(*parts, strict=True)
            merged = merge_partials(torch.stack(outputs), torch.stack(lses))
            output[row.tokens] = merged.mul_(value_scale).to(output.dtype)
        return output

    def _serve(self, rows: ShardedRows, visiting: torch.Tensor, stored: torch.Tensor, scale: float) -> torch.Tensor:
        """Partial results of the visiting queries: [rows, num_heads, head_size + 1], output and log-sum-exp."""
        answers = torch.empty((*visiting.shape[:2], self.head_size + 1), dtype=torch.float32)
        for guest, part in zip(rows.step.guests, rows.guest_rows, strict=True):
            output, lse = attend_shard(visiting[part], stored, guest.blocks, guest.length, scale)
            answers[part, :, :-1], answers[part, :, -1] = output, lse
        return answers

    def _plain(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: ShardedRows,
        output: torch.Tensor,
    ) -> None:
        if rows.plain_tokens is None:
            super().forward(layer, query, key, value, kv_cache, rows.plain, output)
            return
        some = torch.empty((len(rows.plain_tokens), *output.shape[1:]), dtype=output.dtype)
        super().forward(layer, query.index_select(0, rows.plain_tokens), key, value, kv_cache, rows.plain, some)
        output.index_copy_(0, rows.plain_tokens, some)

    def _held(
        self,
        row: LocalRow,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        stored: torch.Tensor,
        scale: float,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Partial results, outputs and log-sum-exps, of a row over what is held here."""
        queries = query[row.tokens]
        if len(queries) == 1:  # its own key is the last one held here
            return [attend_shard(queries, stored, row.blocks, row.past + 1, scale)]
        if stored.dtype == query.dtype:
            keys, values = key[row.tokens], value[row.tokens]
        else:  # what the cache keeps of them, as for all that come later
            whole, cut = divmod(row.past, stored.shape[2])
            held = gather_shard(stored, row.blocks[whole:], cut + len(queries), query.dtype)
            keys, values = (part[:, cut:].transpose(0, 1) for part in held)
        parts = [attend_causal(queries, keys, values, scale)]
        if row.past:
            parts.append(attend_shard(queries, stored, row.blocks, row.past, scale))
        return parts
