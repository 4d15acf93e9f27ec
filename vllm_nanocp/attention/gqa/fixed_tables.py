# SPDX-License-Identifier: Apache-2.0
"""The tables of sharded steps at fixed addresses and of fixed size: a graph captured with them serves every decode step
that fits. Block ids are not copied: tables have the addresses where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..flash_launches import (
    empty_numbers,
    hidden_tokens,
    lengths_without,
    places_of,
    split_numbers,
    table_address,
    visited_places,
)
from ..partial_rows import RowLayout
from ..sharded_step import ShardedStep
from ..stream_k import cut
from .flash_tables import StepTables
from .routed_layer import MAX_LAYERS, Route, Routes
from .split_kv import Visits


class _Parts(NamedTuple):
    """What changes from step to step, as parts of one piece of memory, or how many numbers each has.

    Attributes:
        send: see ``StepTables``.
        asks, answers, counts, pick, tokens: see ``Route``.
        visiting: rows of the batch that visit; for an unused one, a spare row.
        hidden: tokens that the table of a row of the batch has before those that the row's place attends to.
        tables, pieces, starts, first, count: see ``Visits``.
    """

    send: Any
    asks: Any
    answers: Any
    counts: Any
    pick: Any
    tokens: Any
    visiting: Any
    hidden: Any
    tables: Any
    pieces: Any
    starts: Any
    first: Any
    count: Any


class CapturedTables:
    """Tables at fixed addresses for steps with at most ``capacity`` visits between any two ranks, of as many queries
    each.

    Place ``rank * capacity + i`` holds the i-th visit to, or from, a rank; ``num_ranks * capacity + i`` the i-th row of
    this rank that visits, over what is held here of its last run. So one launch serves guests and the rank's own rows.
    Query j of a place is row ``place * queries + j`` of what travels.

    Args:
        capacity: visits of a pair of ranks at most, and rows of a rank that visit.
        num_ranks: N.
        max_tokens: most tokens of a batch.
        layout: of partial results.
        num_kv_heads: of this worker.
        device: of all tables.
        routes: of the routed exchange, for as many; None without it.
        queries: of a row that visits.
        ends: whether what a row sees here ends with the batch's own length, not with the plan's.
    """

    def __init__(
        self,
        capacity: int,
        num_ranks: int,
        max_tokens: int,
        layout: RowLayout,
        num_kv_heads: int,
        device: torch.device,
        routes: Routes | None,
        queries: int = 1,
        ends: bool = False,
    ) -> None:
        self.queries, self.ends = queries, ends or queries > 1
        places = places_of(capacity, num_ranks)
        self.capacity, self.num_ranks, self.places, self.max_tokens = capacity, num_ranks, places, max_tokens
        self.routes = routes
        heads = layout.num_heads, num_kv_heads, layout.head_size
        self._visits = Visits.empty(max_tokens, places, *heads, device, queries, self.ends)
        self._programs = len(self._visits.starts) - 1
        # What changes from step to step comes in one copy.
        rows, width = max_tokens + places, num_ranks + 1
        sizes = dict(
            send=places * queries, asks=places * 2, answers=places, counts=4, pick=capacity * queries * width,
            tokens=capacity * queries, visiting=capacity, hidden=capacity, tables=places,
            pieces=self._visits.pieces.numel(), starts=self._programs + 1, first=rows, count=rows,
        )  # fmt: skip
        self._sizes = _Parts(**sizes)
        self._ints = empty_numbers(self._sizes, device)
        at = _Parts(*split_numbers(self._ints, self._sizes))
        self._send, self._visiting, self._hidden = at.send, at.visiting, at.hidden
        self._visits.tables, self._visits.pieces = at.tables, at.pieces.view(-1, 3)
        self._visits.starts, self._visits.first, self._visits.count = at.starts, at.first, at.count
        self._route = Route(at.asks.view(-1, 2), at.answers, at.counts, at.pick.view(-1, width), at.tokens)
        self._seq_lens = torch.zeros(max_tokens + 1, dtype=torch.int32, device=device)
        # The routed exchange has rows of its own.
        self._partials = layout.empty(places * queries if routes is None else 0, device)

    def fill(self, step: ShardedStep, common: CommonAttentionMetadata) -> tuple[StepTables, torch.Tensor]:
        """Write a step's tables. All rows that visit have ``queries`` queries.

        Args:
            step: this rank's part; nowhere more visits than the capacity.
            common: vLLM's metadata of the batch, padded as the graph is.

        Returns:
            As ``exact_tables``; the same tensors each time.
        """
        host = np.zeros(len(self._ints), dtype=np.int64)
        at = _Parts(*split_numbers(host, self._sizes))
        routes = self.routes
        # Stock attention runs if some row has several queries, and always with the collective exchange. Otherwise the
        # routed kernel attends for all rows.
        plain = routes is None or self.queries > 1 or common.max_query_len > 1
        n, lengths = common.num_reqs, np.zeros(self.max_tokens + self.places, dtype=np.int64)
        if not plain:
            assert common.seq_lens_cpu_upper_bound is not None
            lengths[:n] = common.seq_lens_cpu_upper_bound[:n]
        self._lay_out(step, common, at, lengths)
        if lengths.any():
            pieces, at.count[:], at.starts[:] = cut(lengths, self._programs)
            at.pieces[: pieces.size] = pieces.reshape(-1)
            at.first[:] = np.cumsum(at.count) - at.count
        async_tensor_h2d(host, out=self._ints)
        if self.ends:
            # The batch's own lengths: with async scheduling the plan's count drafts that have turned out to be wrong.
            own = self._visits.seen[self.capacity * self.num_ranks :]
            self._seq_lens[: common.num_reqs] = common.seq_lens
            torch.sub(self._seq_lens.index_select(0, self._visiting), self._hidden, out=own)
        return StepTables(
            plain=plain,
            send=self._send,
            exchanged=self.capacity * self.num_ranks * self.queries,
            send_counts=None,
            recv_counts=None,
            guests=[],
            own=[],
            partials=self._partials,
            tokens=self._route.tokens,
            pick=self._route.pick,
            visits=self._visits,
            routed=None if routes is None else (routes, self._route),
        ), lengths_without(self._visiting, common, out=self._seq_lens)

    def _lay_out(self, step: ShardedStep, common: CommonAttentionMetadata, at: _Parts, lengths: np.ndarray) -> None:
        """Which places a step uses, and what is attended to at them.

        Args:
            step, common: see ``fill``.
            at: to write to; zeros.
            lengths: [max_tokens + places], KV tokens that rows and places attend to; to write to. Rows that visit
                attend at their places only.
        """
        queries, each = self.queries, np.arange(self.queries)
        rows = np.array([own.batch_row() for own in step.own], dtype=np.int64)
        mine, here = len(rows), self.capacity * self.num_ranks + np.arange(len(rows))
        row, column, place = visited_places(step, self.capacity, queries)
        token = common.query_start_loc_cpu.numpy()[rows].astype(np.int64)
        pick, send = at.pick.reshape(self.capacity, queries, -1), at.send.reshape(-1, queries)
        pick[:], at.tokens[:], at.visiting[:] = -1, -1, self.max_tokens
        pick[:mine, :, 0], pick[row, :, column] = here[:, None] * queries + each, place[:, None] * queries + each
        at.tokens.reshape(-1, queries)[:mine], at.visiting[:mine] = token[:, None] + each, rows
        asked, tokens = np.concatenate([place, here]), np.concatenate([token[row], token])
        send[asked] = tokens[:, None] + each
        at.asks[: 2 * len(asked)] = np.stack([asked, tokens], axis=1).reshape(-1)
        guests = np.array(
            [guest.home * self.capacity + guest.index // queries for guest in step.guests], dtype=np.int64
        )
        at.answers[: len(guests) + mine] = np.concatenate([guests, here])
        at.counts[:] = step.serial * MAX_LAYERS, len(asked), len(guests) + mine, mine * queries
        at_places = lengths[self.max_tokens :]
        at_places[guests] = [guest.length for guest in step.guests]
        at_places[here], lengths[rows] = [own.local_tokens + queries for own in step.own], 0
        if self.ends:
            at.hidden[:mine] = hidden_tokens(step, rows.tolist(), common)
        at.tables[guests] = [guest.blocks.data_ptr() for guest in step.guests]
        at.tables[here] = [
            table_address(common, row, own.first_block) for row, own in zip(rows.tolist(), step.own, strict=True)
        ]
