# SPDX-License-Identifier: Apache-2.0
"""From a step plan to each rank's part: what one rank sends, the other must expect, and find the right shard for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.attention.sharded_step import ShardedStep
from vllm_nanocp.plan import IDLE, Batch, Holder, PlanRow, StepPlan
from vllm_nanocp.worker.rank_step import ShardTable, make_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """A plan, and all the shards that exist when it runs."""

    num_ranks: int
    plan: StepPlan
    shards: dict[str, tuple[int, list[int]]]  # id -> rank, block ids

    def step_of(self, rank: int) -> ShardedStep | None:
        table = ShardTable(rank, CPU)
        table.update(self.plan)
        # The "batch" of a rank: requests' own names serve as rows, so that a swapped row shows.
        return make_step(self.plan, table, self.num_ranks, lambda req_id: int(req_id[1:]))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Requests with shards on any ranks, several at one rank or at the home too; several rows of one request (its
    consecutive chunks), which visit the same shards; rows in any order."""
    num_ranks = draw(st.integers(1, 5))
    ranks = st.integers(0, num_ranks - 1)
    shards: dict[str, tuple[int, list[int]]] = {}
    rows: list[PlanRow] = []
    for request in range(draw(st.integers(1, 5))):
        held = []
        for i in range(draw(st.integers(1, 4))):
            num_blocks = draw(st.integers(1, 3))
            shards[f"{request}#{i}"] = draw(ranks), [100 * len(shards) + block for block in range(num_blocks)]
            held.append(f"{request}#{i}")
        for _ in range(draw(st.integers(1, 2))):
            visited = held[: draw(st.integers(1, len(held)))]
            rows.append(
                PlanRow(
                    req_id=f"r{len(rows)}",
                    home=draw(ranks),
                    num_queries=draw(st.integers(1, 5)),
                    first_block=draw(st.integers(0, 9)),
                    local_tokens=draw(st.integers(0, 99)),
                    holders=tuple(Holder(shards[s][0], s, draw(st.integers(1, 48))) for s in visited),
                )
            )
    opened: dict[int, list[tuple[str, list[int]]]] = {}
    for shard, (rank, blocks) in shards.items():
        opened.setdefault(rank, []).append((shard, blocks))
    return World(num_ranks, StepPlan(rows=draw(st.permutations(rows)), opened=opened), shards)


@given(worlds())
def test_what_a_rank_sends_another_expects(world: World) -> None:
    steps = [world.step_of(rank) for rank in range(world.num_ranks)]
    for a, mine in enumerate(steps):
        for b, other in enumerate(steps):
            assert mine is not None and other is not None
            assert mine.send_counts[b] == other.recv_counts[a]
            visits = [r for r in world.plan.rows if r.home == a for h in r.holders if h.rank == b]
            assert mine.send_counts[b] == sum(row.num_queries for row in visits)


@given(worlds())
def test_all_ranks_know_how_much_the_busiest_has(world: World) -> None:
    """By which they decide, without a word, how much goes at a time."""
    steps = [step for rank in range(world.num_ranks) if (step := world.step_of(rank)) is not None]
    busiest = max(s.num_sent + s.num_received + sum(own.num_queries for own in s.own) for s in steps)
    assert {step.most_rows for step in steps} == {busiest}


@given(worlds())
def test_own_rows_are_the_plan_s(world: World) -> None:
    """In its order, with the home's view of its own shard."""
    for rank in range(world.num_ranks):
        step = world.step_of(rank)
        assert step is not None
        rows = [row for row in world.plan.rows if row.home == rank]
        assert [f"r{own.batch_row()}" for own in step.own] == [row.req_id for row in rows]
        for own, row in zip(step.own, rows, strict=True):
            assert (own.num_queries, own.first_block, own.local_tokens) == (
                row.num_queries,
                row.first_block,
                row.local_tokens,
            )
            assert [rank for rank, _ in own.visits] == [holder.rank for holder in row.holders]


@given(worlds())
def test_every_visit_meets_exactly_one_guest(world: World) -> None:
    """Carry each query by hand as the exchange does, and look at what the holders' guests pick up."""
    n = world.num_ranks
    steps = [step for rank in range(n) if (step := world.step_of(rank)) is not None]
    assert len(steps) == n
    # sent[a][b]: what a sends to b, one entry a query: (row, index of the holder, query).
    sent: list[list[list[tuple[str, int, int] | None]]] = [[[None] * count for count in s.send_counts] for s in steps]
    for home, step in enumerate(steps):
        for own in step.own:
            for i, (rank, first) in enumerate(own.visits):
                for query in range(own.num_queries):
                    assert sent[home][rank][first + query] is None, "two queries in one place"
                    sent[home][rank][first + query] = (f"r{own.batch_row()}", i, query)
    met: Counter[tuple[str, int]] = Counter()
    by_id = {row.req_id: row for row in world.plan.rows}
    for rank, step in enumerate(steps):
        received = [entry for home in range(n) for entry in sent[home][rank]]
        assert len(received) == sum(step.recv_counts)
        covered = []
        for guest, part in zip(step.guests, step.guest_rows(), strict=True):
            entries = received[part]
            covered += range(part.start, part.stop)
            assert entries and entries[0] is not None
            req_id, i, _ = entries[0]
            row = by_id[req_id]
            assert entries == [(req_id, i, query) for query in range(row.num_queries)]
            holder = row.holders[i]
            assert holder.rank == rank
            assert guest.length == holder.length
            assert guest.blocks.tolist() == world.shards[holder.shard][1]
            met[req_id, i] += 1
        assert covered == list(range(len(received))), "guests cover what was received, in its order"
    assert met == Counter((row.req_id, i) for row in world.plan.rows for i in range(len(row.holders)))


def test_without_rows_there_is_no_sharded_step() -> None:
    plan = StepPlan(batches=[Batch(3, 3, 1), IDLE], opened={0: [("a", [1])]})
    assert make_step(plan, ShardTable(0, CPU), 2, lambda _: 0) is None


def test_the_batch_row_is_asked_for_late() -> None:
    """The plan is laid out before the model runner has built its batch."""
    rows: dict[str, int] = {}
    table = ShardTable(0, CPU)
    plan = StepPlan(rows=[PlanRow("x", 0, 1, 0, 0, (Holder(1, "x#0", 16),))])
    step = make_step(plan, table, 2, lambda req_id: rows[req_id])
    rows["x"] = 5
    assert step is not None and step.own[0].batch_row() == 5


def test_a_table_follows_the_plans() -> None:
    table = ShardTable(1, CPU)
    table.update(StepPlan(opened={0: [("elsewhere", [9])], 1: [("a", [4, 2]), ("b", [7])]}))
    assert len(table) == 2 and table["a"].tolist() == [4, 2] and table["a"].dtype == torch.int32
    table.update(StepPlan())
    assert len(table) == 2, "shards stay until they are closed"
    table.update(StepPlan(closed=["a", "elsewhere"], opened={1: [("c", [4])]}))
    assert len(table) == 2 and table["b"].tolist() == [7] and table["c"].tolist() == [4]
    table.update(StepPlan(closed=["b", "c"]))
    assert len(table) == 0


def test_opened_and_closed_by_one_plan() -> None:
    """A request that found its shard cached and was preempted in the same step leaves nothing behind."""
    table = ShardTable(0, CPU)
    table.update(StepPlan(opened={0: [("a", [1, 2])]}, closed=["a"]))
    assert len(table) == 0
