# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend, taught shards. Touches ``vllm/v1/attention/backends/flash_attn.py`` of 0.32.

In a sharded step one launch attends to what is held here, for all rows of the batch (a row that visits shards
elsewhere is cut to its local blocks and length), and one serves all guests. FlashAttention's log-sum-exp is natural.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from .context import Guest, ShardedStep, context
from .merge import merge_partials


@dataclass
class GuestBatch:
    """All guests of a step as one batch.

    Attributes:
        query_starts: int32 [num_guests + 1].
        lengths: int32 [num_guests], KV tokens each sees.
        block_table: int32 [num_guests, most blocks].
        max_queries, max_length: the largest of them.
    """

    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    max_queries: int
    max_length: int


@dataclass
class ShardedRows:
    """A sharded step of this rank.

    Attributes:
        step: the exchange's counts.
        guests: None when nobody visits.
        send_tokens: int64 [sum(step.send_counts)], queries to dispatch, in the exchange's order.
        local: for each row that visits: where its queries are, and its slices of the combined partials.
    """

    step: ShardedStep
    guests: GuestBatch | None
    send_tokens: torch.Tensor
    local: list[tuple[slice, list[slice]]]


@dataclass
class ShardedFlashAttentionMetadata(FlashAttentionMetadata):
    """Stock metadata, of the local view in a sharded step."""

    sharded: ShardedRows | None = field(default=None)


class NanoCPFlashAttentionBackend(FlashAttentionBackend):
    """Registered in place of FLASH_ATTN; a step without sharded rows runs stock code."""

    @staticmethod
    def get_impl_cls() -> type[NanoCPFlashAttentionImpl]:
        return NanoCPFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NanoCPFlashAttentionMetadataBuilder]:
        return NanoCPFlashAttentionMetadataBuilder


def batch_guests(guests: list[Guest], device: torch.device) -> GuestBatch | None:
    """Lay the guests out for one varlen launch; they come in the order of the received rows."""
    if not guests:
        return None
    starts = [0]
    for guest in guests:
        starts.append(starts[-1] + guest.num_queries)
    table = torch.zeros((len(guests), max(len(g.blocks) for g in guests)), dtype=torch.int32, device=device)
    for row, guest in enumerate(guests):
        table[row, : len(guest.blocks)] = guest.blocks
    lengths = [guest.length for guest in guests]
    return GuestBatch(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        max(guest.num_queries for guest in guests),
        max(lengths),
    )


class NanoCPFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Cuts the rows laid out in ``context.step`` to what is held here."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        step = context.step
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = copy(common_attn_metadata)
        starts = common.query_start_loc_cpu.tolist()
        if step.own:
            common.seq_lens = common.seq_lens.clone()
            common.block_table_tensor = common.block_table_tensor.clone()
        first_of_rank = [0]
        for count in step.send_counts:
            first_of_rank.append(first_of_rank[-1] + count)
        send = torch.empty(first_of_rank[-1], dtype=torch.int64)
        local: list[tuple[slice, list[slice]]] = []
        block_size = self.kv_cache_spec.block_size
        for own in step.own:
            row = own.batch_row()
            tokens = slice(starts[row], starts[row] + own.num_queries)
            length = own.local_tokens + own.num_queries
            blocks = -(-length // block_size)
            held = common_attn_metadata.block_table_tensor[row, own.first_block : own.first_block + blocks]
            common.block_table_tensor[row, :blocks] = held
            common.seq_lens[row] = length
            visits = []
            for rank, first_row in own.sources:
                at = first_of_rank[rank] + first_row
                visits.append(slice(at, at + own.num_queries))
                send[visits[-1]] = torch.arange(tokens.start, tokens.stop)
            local.append((tokens, visits))
        stock = super().build(0, common, fast_build)
        device = common.seq_lens.device
        rows = ShardedRows(step, batch_guests(step.guests, device), send.to(device, non_blocking=True), local)
        values = {f.name: getattr(stock, f.name) for f in fields(FlashAttentionMetadata)}
        return ShardedFlashAttentionMetadata(**values, sharded=rows)


class NanoCPFlashAttentionImpl(FlashAttentionImpl):
    """Local rows, guests, merge. The KV of all new tokens is in the cache before ``forward`` runs, on every rank
    before it serves guests (the dispatch is a collective)."""

    serves_shards = True

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
        if rows is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        exchange, step, version = context.exchange, rows.step, self.vllm_flash_attn_version
        assert exchange is not None and version is not None
        n = attn_metadata.num_actual_tokens
        queries = query[:n]
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        visiting = exchange.dispatch(queries.index_select(0, rows.send_tokens), step.send_counts, step.recv_counts)
        answers = self._serve(rows.guests, visiting, keys, values)
        _, lse = flash_attn_varlen_func(
            q=queries,
            k=keys,
            v=values,
            out=output[:n],
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            seqused_k=attn_metadata.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=attn_metadata.block_table,
            return_softmax_lse=True,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            fa_version=version,
            num_splits=attn_metadata.max_num_splits,
        )
        partials = exchange.combine(answers, step.recv_counts, step.send_counts)
        for tokens, visits in rows.local:
            outputs = [output[tokens].float(), *(partials[visit, :, :-1] for visit in visits)]
            lses = [lse[:, tokens].transpose(0, 1), *(partials[visit, :, -1] for visit in visits)]
            output[tokens] = merge_partials(torch.stack(outputs), torch.stack(lses)).to(output.dtype)
        return output

    def _serve(
        self, guests: GuestBatch | None, visiting: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Partial results of the visiting queries: [rows, num_heads, head_size + 1], output and log-sum-exp."""
        shape = (*visiting.shape[:2], self.head_size + 1)
        answers = torch.empty(shape, dtype=torch.float32, device=visiting.device)
        version = self.vllm_flash_attn_version
        if guests is not None:
            assert version is not None
            out, lse = flash_attn_varlen_func(
                q=visiting,
                k=keys,
                v=values,
                cu_seqlens_q=guests.query_starts,
                max_seqlen_q=guests.max_queries,
                seqused_k=guests.lengths,
                max_seqlen_k=guests.max_length,
                softmax_scale=self.scale,
                causal=False,
                block_table=guests.block_table,
                return_softmax_lse=True,
                fa_version=version,
            )
            answers[:, :, :-1] = out
            answers[:, :, -1] = lse.transpose(0, 1)
        return answers
