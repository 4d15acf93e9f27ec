# SPDX-License-Identifier: Apache-2.0
"""A layer of a sharded step on GPUs with the collective exchange: the work on rows that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..exchange.base import Counts
from .partial_rows import RowLayout, merge_rows


@dataclass
class GPURows:
    """A sharded step of this rank, on its device.

    Attributes:
        send: int64, indices in the batch of the queries to dispatch, in the exchange's order; at fixed places, behind
            these, of the queries that attend to what is held here of their own.
        exchanged: how many of these are dispatched.
        send_counts, recv_counts: see ``Exchange``.
        guests: the family's launches of the received queries, in order; none when nobody visits, and at fixed places.
        own: those of this rank's queries that visit others, over what is held here; none when there are none, and at
            fixed places.
        partials: room for the rows that come back, and behind them those of ``own``.
        tokens: int64 [num_results], the indices in the batch of the queries that visit; -1 for an unused one; None
            without such queries.
        pick: int64 [num_results, num_partials], see ``merge_rows``; None without such queries.
    """

    send: torch.Tensor
    exchanged: int
    send_counts: Counts
    recv_counts: Counts
    guests: Sequence[Any]
    own: Sequence[Any]
    partials: torch.Tensor
    tokens: torch.Tensor | None
    pick: torch.Tensor | None


class GPULayer(ABC):
    """``ShardedLayer`` but for what a family knows.

    Args:
        rows: the step's tables.
        layout: of partial results.
        query: [tokens, num_heads, query size].
        output: [tokens, num_heads, value size], written to.
    """

    def __init__(self, rows: GPURows, layout: RowLayout, query: torch.Tensor, output: torch.Tensor) -> None:
        self._rows, self.layout, self.query, self.output = rows, layout, query, output
        self.send_counts, self.recv_counts = rows.send_counts, rows.recv_counts
        self.partials, self._mine = rows.partials[: rows.exchanged], rows.partials[rows.exchanged :]

    @abstractmethod
    def plain(self) -> None:
        """See ``ShardedLayer``."""

    @property
    @abstractmethod
    def places_are_fixed(self) -> bool:
        """Whether received queries and this rank's own attend together, all of ``send``."""

    @abstractmethod
    def over_shards(self, queries: torch.Tensor, launches: Sequence[Any], into: torch.Tensor) -> None:
        """Partial results of queries over shards held here.

        Args:
            queries: [rows, num_heads, query size].
            launches: ``guests`` or ``own``, of these queries in order.
            into: [rows, layout size], written to.
        """

    @abstractmethod
    def over_places(self, queries: torch.Tensor, into: torch.Tensor) -> None:
        """The same of all places, where these are fixed."""

    def queries(self) -> torch.Tensor:
        return self.query.index_select(0, self._rows.send[: self._rows.exchanged])

    def own(self) -> None:
        if self._rows.own:
            assert self._rows.tokens is not None
            self.over_shards(self.query.index_select(0, self._rows.tokens), self._rows.own, self._mine)

    def serve(self, visiting: torch.Tensor) -> torch.Tensor:
        rows, device = self._rows, self.output.device
        if not self.places_are_fixed:
            answers = self.layout.empty(len(visiting), device)
            self.over_shards(visiting, rows.guests, answers)
            return answers
        visiting = torch.cat([visiting, self.query.index_select(0, rows.send[rows.exchanged :])])
        answers = self.layout.empty(len(visiting), device)
        self.over_places(visiting, answers)
        self._mine.copy_(answers[rows.exchanged :])
        return answers[: rows.exchanged]

    def finish(self, partials: torch.Tensor) -> None:
        rows = self._rows
        if rows.pick is not None:
            assert rows.tokens is not None
            merge_rows(rows.partials, self.layout, rows.pick, rows.tokens, self.output)
