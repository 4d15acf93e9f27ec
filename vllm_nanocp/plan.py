# SPDX-License-Identifier: Apache-2.0
"""The step plan: what all ranks must know of a step. Plain data; travels with the scheduler's output."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Holder:
    """A shard that a row's queries visit.

    Attributes:
        rank: who holds it.
        shard: its id at that rank (see ``StepPlan.opened``).
        length: KV tokens held there with a position below the row's first query. Positive.
    """

    rank: int
    shard: str
    length: int


@dataclass(slots=True)
class PlanRow:
    """The queries of one sharded request in this step.

    Attributes:
        req_id: the request's id in its home's model runner.
        home: the rank that computes the queries.
        num_queries: how many; positive.
        first_block: index of the first block in the home's block table that the home holds.
        local_tokens: KV tokens the home holds with a position below the first query.
        holders: shards elsewhere, in the order of the positions they hold; not empty.
    """

    req_id: str
    home: int
    num_queries: int
    first_block: int
    local_tokens: int
    holders: tuple[Holder, ...]


@dataclass(slots=True)
class StepPlan:
    """A step's sharded work, the same on every rank.

    Attributes:
        rows: sharded requests with queries in this step. Every rank derives the order and the sizes of the
            exchange from it.
        tokens: number of tokens scheduled on each rank.
        opened: for each rank, shards that rows of this or a later step visit: (shard id, block ids). An id is never
            used again.
        closed: shard ids that no row of this or a later step visits.
    """

    rows: list[PlanRow] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    opened: dict[int, list[tuple[str, list[int]]]] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
