# SPDX-License-Identifier: Apache-2.0
"""The tables of a sharded step on GPUs: what is sent, which rows attend to which blocks, what is merged into what.

Here they are sized to the step, for attention outside of graphs; ``fixed_tables.py`` has those that graphs are captured
with. They know no requests: rows, lengths, blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..context import context
from ..flash_launches import (
    TableRow,
    groups_of,
    hidden_tokens,
    picks_of,
    pieces_that_fit,
    queries_at_once,
    table_address,
)
from ..gpu_rows import GPURows
from ..partial_rows import RowLayout
from ..sharded_step import ShardedStep
from .routed_layer import Route, Routes
from .split_kv import Visits


class Launch(Protocol):
    """One launch of attention over shards, as a backend has prepared it for all layers of a step.

    Attributes:
        num_queries: of all rows.
    """

    num_queries: int


@dataclass
class StepTables(GPURows):
    """A sharded step of this rank.

    Attributes:
        plain: whether rows of the batch that visit nobody are left to stock attention.
        visits: at fixed places, the received queries and those of this rank over what is held here; and rows that visit
            nobody, unless ``plain``.
        routed: the routed exchange, if it takes the place of ``Exchange``, and the step's route.
    """

    plain: bool
    visits: Visits | None = None
    routed: tuple[Routes, Route] | None = None


def most_memory(num_ranks: int, max_tokens: int, layout: RowLayout, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Bytes that attention outside of graphs takes in a layer beside stock attention's, in the fullest step: all tokens
    of every rank visit all ranks, for a home may hold earlier runs too.

    Args:
        num_ranks: N.
        max_tokens: most tokens of a rank's batch.
        layout: of partial results.
        num_kv_heads: of this worker.
        dtype: of queries.
    """
    query_bytes, heads, head_size = layout.query_bytes(dtype), layout.num_heads, layout.head_size
    # A copy of each query that is sent, also to its own rank, and its partial result; each that comes, and its answer;
    # and those over what is held here of the last run.
    rows = (2 * num_ranks + 1) * max_tokens
    launch = min(max_tokens, queries_at_once(heads, head_size))
    pieces = pieces_that_fit(launch, heads, head_size, num_kv_heads)
    return rows * (query_bytes + 4 * layout.size) + launch * (pieces * 4 * layout.size + query_bytes)


def exact_tables(
    step: ShardedStep,
    common: CommonAttentionMetadata,
    layout: RowLayout,
    make: Callable[[list[TableRow], bool], Launch],
) -> tuple[StepTables, torch.Tensor]:
    """Tables of the step's own size.

    Args:
        step: this rank's part of the step.
        common: vLLM's metadata of the batch.
        layout: of partial results.
        make: prepares a launch of some rows, which is causal or not.

    Returns:
        The tables, and the batch's lengths with 0 for rows that visit: int32 [num_reqs].
    """
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    rows = [own.batch_row() for own in step.own]
    firsts = [starts[row] for row in rows]
    send, visits = step.lay_out(firsts)
    seq_lens = common.seq_lens.clone()
    queries = [own.num_queries for own in step.own]
    held = [
        TableRow(own.num_queries, own.local_tokens + own.num_queries, table_address(common, row, own.first_block))
        for own, row in zip(step.own, rows, strict=True)
    ]
    if context.queries > 1:
        for part, row, hidden in zip(held, rows, hidden_tokens(step, rows, common), strict=True):
            part.ends = common.seq_lens[row], hidden
    tokens = pick = None
    if rows:
        seq_lens.index_fill_(0, async_tensor_h2d(rows, device, torch.int64), 0)
        batch = np.concatenate([np.arange(f, f + q) for f, q in zip(firsts, queries, strict=True)])
        tokens = async_tensor_h2d(batch, device)
        pick = async_tensor_h2d(picks_of(visits, queries, step.num_sent), device)
    most = queries_at_once(layout.num_heads, layout.head_size)
    guests = [TableRow(g.num_queries, g.length, g.blocks.data_ptr()) for g in step.guests]
    return StepTables(
        plain=len(rows) < common.num_reqs,
        send=async_tensor_h2d(send, device),
        exchanged=step.num_sent,
        send_counts=step.send_counts,
        recv_counts=step.recv_counts,
        guests=[make(group, False) for group in groups_of(guests, most, False)],
        own=[make(group, True) for group in groups_of(held, most, True)],
        partials=layout.empty(step.num_sent + sum(queries), device),
        tokens=tokens,
        pick=pick,
    ), seq_lens
