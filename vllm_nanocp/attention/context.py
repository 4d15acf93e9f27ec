# SPDX-License-Identifier: Apache-2.0
"""What the worker lays out for attention before a step: the one global of the package, set by the worker only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..exchange import Exchange
from .sharded_step import ShardedStep


@dataclass
class AttentionContext:
    """Attributes:
    exchange: set once the process groups exist.
    capacities: of the graphs and tables of fixed size, ascending; see ``graph_capacities.capacities``.
    queries: that each row has in tables of fixed size: what a request is decoded with, drafts included.
    routes: of the routed exchange, by capacity, as the family has them; empty without it.
    tables: of fixed size, by capacity; which ones, the family says.
    draft_routes, draft_tables: the same for the forwards of a draft model after its first, of one query a row; empty
        where there are none, and without the routed exchange, where these have tables of their own size.
    step: None in a step without sharded rows, which then is stock vLLM.
    draft_step: of the forwards of a draft model after its first, which has the rows of ``step``; None like it, and
        without such a model.
    draft_index: of the forward whose metadata is built, or that is captured; 0 for the target's, and for the draft
        model's first.
    reserve: called by each layer while vLLM measures how much memory a step needs, for its dummy step visits no shard;
        takes up what one would that does.
    """

    exchange: Exchange | None = None
    capacities: tuple[int, ...] = ()
    queries: int = 1
    routes: dict[int, Any] = field(default_factory=dict)
    tables: dict[int, Any] = field(default_factory=dict)
    draft_routes: dict[int, Any] = field(default_factory=dict)
    draft_tables: dict[int, Any] = field(default_factory=dict)
    step: ShardedStep | None = None
    draft_step: ShardedStep | None = None
    draft_index: int = 0
    reserve: Callable[[], None] | None = None

    def tables_for(self, queries: int) -> dict[int, Any]:
        """The tables of fixed size, by capacity, for rows of so many queries."""
        return self.tables if queries == self.queries else self.draft_tables

    def routes_for(self, queries: int) -> dict[int, Any]:
        """The routes, by capacity, of these tables."""
        return self.routes if queries == self.queries else self.draft_routes

    def serial_of(self, draft_index: int, serial: int) -> int:
        """Of a draft model's forward after its first: they repeat its layers over the same routes, so each has a number
        of its own, larger than those before.

        Args:
            draft_index: 1 for the second forward.
            serial: of the step.
        """
        return serial * self.queries + draft_index


context = AttentionContext()
