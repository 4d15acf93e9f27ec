# SPDX-License-Identifier: Apache-2.0
"""A batch of a sharded step on CPU, split once a step, and the work of a layer on it that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata

from .merge import Partial, merge_partials
from .sharded_step import ShardedStep

Made = TypeVar("Made")


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
class SplitBatch:
    """A batch of a sharded step, split.

    Attributes:
        step: the exchange's counts and the guests.
        guest_rows: for each guest, its queries among the received ones.
        plain: vLLM's metadata of the rows that visit no other shard; None when there are none.
        plain_tokens: int64, where their queries are; None when they are the whole batch.
        local: the rows that do.
        send_tokens: int64 [sum(step.send_counts)], queries to dispatch, in the exchange's order.
    """

    step: ShardedStep
    guest_rows: list[slice]
    plain: Any
    plain_tokens: torch.Tensor | None
    local: list[LocalRow]
    send_tokens: torch.Tensor


def split_metadata(
    kind: Callable[..., Made],
    step: ShardedStep,
    common: CommonAttentionMetadata,
    block_size: int,
    build: Callable[[CommonAttentionMetadata], Any],
) -> Made:
    """Metadata of a batch, split by the rows laid out in a step.

    Args:
        kind: a dataclass, of vLLM's metadata with a field ``sharded`` more.
        step: this rank's part.
        common: vLLM's metadata of the batch.
        block_size: tokens a block holds.
        build: vLLM's own metadata of a batch.

    Returns:
        With the split, and vLLM's values: of the plain rows, or of the batch if there are none.
    """
    sharded, stock = _split(step, common, block_size, build)
    return kind(**{f.name: getattr(stock, f.name) for f in fields(stock)}, sharded=sharded)


def _split(
    step: ShardedStep,
    common: CommonAttentionMetadata,
    block_size: int,
    build: Callable[[CommonAttentionMetadata], Any],
) -> tuple[SplitBatch, Any]:
    starts = common.query_start_loc_cpu.tolist()
    rows = [own.batch_row() for own in step.own]
    visiting = set(rows)
    plain_rows = [r for r in range(common.num_reqs) if r not in visiting]
    if not plain_rows or not rows:
        stock, plain_tokens = build(common), None
    else:
        stock, plain_tokens = build(_some_rows(common, starts, plain_rows)), _tokens(starts, plain_rows)
    send_tokens, visits = step.lay_out([starts[row] for row in rows])
    local: list[LocalRow] = []
    for own, row, mine in zip(step.own, rows, visits, strict=True):
        tokens = slice(starts[row], starts[row] + own.num_queries)
        num_blocks = cdiv(own.local_tokens + own.num_queries, block_size)
        blocks = common.block_table_tensor[row, own.first_block : own.first_block + num_blocks].long()
        local.append(LocalRow(tokens, blocks, own.local_tokens, mine))
    plain = stock if plain_rows else None
    return SplitBatch(step, step.guest_rows(), plain, plain_tokens, local, send_tokens), stock


def later_draft(step: ShardedStep, common: CommonAttentionMetadata, block_size: int) -> ShardedStep:
    """The step of a draft model's forward after its first, for what is held here by now: how much that is depends on
    how many drafts were accepted, and is the home's own business.

    Args:
        step: with one query a row; its ``local_tokens`` are written.
        common: of the forward. A row of which something has no block ends with its blocks.
        block_size: tokens a block holds.
    """
    for own in step.own:
        length = int(common.seq_lens[own.batch_row()])
        own.local_tokens = max(0, length - 1 - own.first_block * block_size)
    return step


def _tokens(starts: list[int], rows: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(starts[r], starts[r + 1]) for r in rows])


def _some_rows(common: CommonAttentionMetadata, starts: list[int], rows: list[int]) -> CommonAttentionMetadata:
    """vLLM's metadata of some rows of a batch, in their order."""
    index = torch.tensor(rows)
    lengths = torch.tensor([starts[r + 1] - starts[r] for r in rows], dtype=common.query_start_loc.dtype)
    part = copy(common)
    part.num_reqs = len(rows)
    part.query_start_loc = torch.zeros(len(rows) + 1, dtype=common.query_start_loc.dtype)
    torch.cumsum(lengths, 0, out=part.query_start_loc[1:])
    part.query_start_loc_cpu = part.query_start_loc
    part.seq_lens = common.seq_lens[index].contiguous()
    for name in ("seq_lens_cpu_upper_bound", "is_prefilling"):
        if (values := getattr(common, name)) is not None:
            setattr(part, name, values[index].contiguous())
    part.block_table_tensor = common.block_table_tensor[index].contiguous()
    part.num_actual_tokens = int(part.query_start_loc[-1])
    part.max_query_len = int(lengths.max())
    part.max_seq_len = int(part.seq_lens.max())
    return part


class CPULayer(ABC):
    """One layer's attention in a sharded step on CPU: ``ShardedLayer`` but for what a family knows.

    Args:
        rows: the batch, split.
        query: [tokens, num_heads, query size].
        output: [tokens, num_heads, head_size], written to.
        result_scale: what merged results are multiplied with.
    """

    partials = None

    def __init__(self, rows: SplitBatch, query: torch.Tensor, output: torch.Tensor, result_scale: float = 1.0) -> None:
        self.rows, self.query, self.output, self.result_scale = rows, query, output, result_scale
        self.send_counts, self.recv_counts = rows.step.send_counts, rows.step.recv_counts
        self._held: list[list[Partial]] = []

    @abstractmethod
    def stock(self, tokens: torch.Tensor | None, output: torch.Tensor) -> None:
        """vLLM's attention of the plain rows.

        Args:
            tokens: where their queries are in the batch; None: they are the batch.
            output: of these queries, written to.
        """

    @abstractmethod
    def over_shard(self, queries: torch.Tensor, blocks: torch.Tensor, length: int) -> Partial:
        """Queries that see every key of the first ``length`` tokens of some blocks."""

    @abstractmethod
    def over_new(self, row: LocalRow) -> Partial:
        """A row's several queries, causally among themselves."""

    def queries(self) -> torch.Tensor:
        return self.query.index_select(0, self.rows.send_tokens)

    def plain(self) -> None:
        rows, output = self.rows, self.output
        if rows.plain is None:
            return
        if rows.plain_tokens is None:
            self.stock(None, output)
            return
        some = torch.empty((len(rows.plain_tokens), *output.shape[1:]), dtype=output.dtype)
        self.stock(rows.plain_tokens, some)
        output.index_copy_(0, rows.plain_tokens, some)

    def own(self) -> None:
        self._held = [self._own_row(row) for row in self.rows.local]

    def _own_row(self, row: LocalRow) -> list[Partial]:
        queries = self.query[row.tokens]
        if len(queries) == 1:  # its own key is the last one held here
            return [self.over_shard(queries, row.blocks, row.past + 1)]
        parts = [self.over_new(row)]
        if row.past:
            parts.append(self.over_shard(queries, row.blocks, row.past))
        return parts

    def serve(self, visiting: torch.Tensor) -> torch.Tensor:
        """[rows, num_heads, head_size + 1]: outputs, and behind each its log-sum-exp."""
        answers = torch.empty((*visiting.shape[:2], self.output.shape[2] + 1), dtype=torch.float32)
        for guest, part in zip(self.rows.step.guests, self.rows.guest_rows, strict=True):
            output, lse = self.over_shard(visiting[part], guest.blocks, guest.length)
            answers[part, :, :-1], answers[part, :, -1] = output, lse
        return answers

    def finish(self, partials: torch.Tensor) -> None:
        for row, parts in zip(self.rows.local, self._held, strict=True):
            parts += [(partials[visit, :, :-1], partials[visit, :, -1]) for visit in row.visits]
            outputs, lses = zip(*parts, strict=True)
            merged = merge_partials(torch.stack(outputs), torch.stack(lses))
            if self.result_scale != 1:
                merged.mul_(self.result_scale)
            self.output[row.tokens] = merged.to(self.output.dtype)
