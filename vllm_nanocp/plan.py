# SPDX-License-Identifier: Apache-2.0
"""The step plan: what all ranks must know of a step. Plain data; travels with the scheduler's output."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")

_KEEPER = re.compile(r"#\d+\.(\d+|m)$")


def keeper_id(request_id: str, serial: int, name: int | str) -> str:
    """Id of what keeps a part of a request at a rank, and may compute it there.

    Args:
        request_id: the request's.
        serial: unique among all that a request ever had.
        name: the number of its run, or "m" for what stays behind when the home moves.
    """
    return f"{request_id}#{serial}.{name}"


def is_keeper(request_id: str) -> bool:
    """Whether an id is one of these. A client's may have the same sign anywhere, but vLLM adds to its end."""
    return "#" in request_id and _KEEPER.search(request_id) is not None


def packs_flat(cls: type[_T]) -> type[_T]:
    """Have a dataclass of several fields pickle as its values in order: what goes between processes in each step is
    decoded in half the time that names and values take."""
    values = attrgetter(*(one.name for one in fields(cls)))  # type: ignore[arg-type]

    def reduce(self: _T) -> tuple[Any, ...]:
        return cls, values(self)

    cls.__reduce__ = reduce  # type: ignore[method-assign, assignment]
    return cls


@packs_flat
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


@packs_flat
@dataclass(slots=True)
class PlanRow:
    """The queries of one sharded request in this step.

    Attributes:
        req_id: the request's id in its home's model runner.
        home: the rank that computes the queries.
        num_queries: how many; positive.
        first_block: index of the first block in the home's block table that the home holds.
        local_tokens: KV tokens the home holds with a position below the first query; with drafts and async
            scheduling at most so many, for it is not known yet how many drafts of the step before are accepted.
        holders: the other shards, at most one a rank; at the home, what it holds of earlier parts. Not empty.
    """

    req_id: str
    home: int
    num_queries: int
    first_block: int
    local_tokens: int
    holders: tuple[Holder, ...]


class Batch(NamedTuple):
    """What the other ranks must know of one rank's batch, so that all run the same graph or none.

    Attributes:
        num_reqs: requests with tokens in this step.
        num_tokens: tokens of them.
        queries: tokens of each, if all have as many: one token after others that are computed already, and drafts of
            the next ones. Else 0.
    """

    num_reqs: int
    num_tokens: int
    queries: int


def idle_batch(queries: int) -> Batch:
    """What a rank runs that has no tokens while another has: see ``worker.OneRank``.

    Args:
        queries: tokens of the one request in it.
    """
    return Batch(num_reqs=1, num_tokens=queries, queries=queries)


# Without drafts.
IDLE = idle_batch(1)


@dataclass(slots=True)
class Arrival:
    """What a request brings from its old home.

    Attributes:
        tokens: that it has made.
        generator: state of the one it samples with, for model runners that keep one; None if it has no seed.
    """

    tokens: list[int]
    generator: bytes | None = None


@dataclass(slots=True)
class StepPlan:
    """A step's work as all ranks must know it, the same on every rank.

    Attributes:
        rows: sharded requests with queries in this step. Every rank derives the order and the sizes of the
            exchange from it.
        batches: each rank's; ``idle_batch`` for one without tokens beside one with. Empty when no rank has any.
        opened: for each rank, shards that rows of this or a later step visit: (shard id, block ids). An id is never
            used again.
        closed: shard ids that no row of this or a later step visits.
        arrived: requests that a rank's model runner meets for the first time after they have made tokens elsewhere.
        departing: requests whose home's worker is to report, with this step's output, where their generator is.
        next_tokens: for each member whose run ends with this step, the request's token behind it: a draft model takes
            it in. Empty without one.
        serial: number of the step; larger than those before.
    """

    rows: list[PlanRow] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    opened: dict[int, list[tuple[str, list[int]]]] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    arrived: dict[str, Arrival] = field(default_factory=dict)
    departing: list[str] = field(default_factory=list)
    next_tokens: dict[str, int] = field(default_factory=dict)
    serial: int = 0

    def most_visits(self, num_ranks: int, queries: int | None = 1) -> int | None:
        """Visits of the busiest pair of ranks, or rows that visit of the busiest home, if they are more.

        Tables of fixed size have room for so many of both.

        Args:
            num_ranks: N.
            queries: that each row has in such tables; None: one, whatever it has here, as in the
                later forwards of a draft model.

        Returns:
            None when a row has more or fewer queries, or visits more shards than such tables have places for.
        """
        pairs: Counter[tuple[int, int]] = Counter()
        homes: Counter[int] = Counter()
        for row in self.rows:
            if queries not in (None, row.num_queries) or len(row.holders) > num_ranks:
                return None
            homes[row.home] += 1
            for holder in row.holders:
                pairs[row.home, holder.rank] += 1
        return max(*pairs.values(), *homes.values(), 0, 0)
