# SPDX-License-Identifier: Apache-2.0
"""From the step plan, the same on all ranks, to one rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from ..attention.sharded_step import Guest, OwnRow, ShardedStep
from ..plan import StepPlan


class ShardTable:
    """Block tables of the shards at this rank that other ranks' rows may visit.

    Args:
        rank: this rank.
        device: where attention reads the tables.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self._blocks: dict[str, torch.Tensor] = {}

    def update(self, plan: StepPlan) -> None:
        """Take in the shards that the plan opens here and drop those it closes.

        A shard may be opened and closed by one plan: when its request found it cached and was preempted at once.
        """
        for shard, blocks in plan.opened.get(self.rank, ()):
            self._blocks[shard] = async_tensor_h2d(blocks, self.device, torch.int32)
        for shard in plan.closed:
            self._blocks.pop(shard, None)

    def __getitem__(self, shard: str) -> torch.Tensor:
        return self._blocks[shard]

    def __len__(self) -> int:
        return len(self._blocks)


def make_step(
    plan: StepPlan, shards: ShardTable, num_ranks: int, batch_row: Callable[[str], int], queries: int | None = None
) -> ShardedStep | None:
    """This rank's part of a plan; None when no row anywhere visits a shard.

    Args:
        plan: the step's.
        shards: of this rank, updated with the plan.
        num_ranks: N.
        batch_row: finds a request's row in the batch, once the model runner has built it.
        queries: that each row has; None: the plan's.
    """
    if not plan.rows:
        return None
    me = shards.rank
    step = ShardedStep(me, send_counts=[0] * num_ranks, recv_counts=[0] * num_ranks, serial=plan.serial)
    rows = [0] * num_ranks
    for row in plan.rows:
        num_queries = queries or row.num_queries
        rows[row.home] += num_queries * (1 + len(row.holders))
        for holder in row.holders:
            rows[holder.rank] += num_queries
        visits: list[tuple[int, int]] = []
        for holder in row.holders:
            if row.home == me:
                visits.append((holder.rank, step.send_counts[holder.rank]))
                step.send_counts[holder.rank] += num_queries
            if holder.rank == me:
                first, blocks = step.recv_counts[row.home], shards[holder.shard]
                step.guests.append(Guest(row.home, first, num_queries, holder.shard, blocks, holder.length))
                step.recv_counts[row.home] += num_queries
        if row.home == me:
            own = OwnRow(partial(batch_row, row.req_id), num_queries, row.first_block, row.local_tokens, visits)
            step.own.append(own)
    step.most_rows = max(rows)
    step.guests.sort(key=lambda guest: (guest.home, guest.index))
    return step
