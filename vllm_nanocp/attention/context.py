# SPDX-License-Identifier: Apache-2.0
"""What the worker lays out for attention before a step: the one global of the package, set by the worker only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..exchange import Exchange


@dataclass
class OwnRow:
    """Queries computed here that visit shards elsewhere.

    Attributes:
        batch_row: finds the row's index in the batch, once the model runner has built it.
        num_queries: positive.
        first_block: index in the row's block table of the first block held here.
        local_tokens: KV tokens held here with a position below the first query.
        sources: for each visit, (rank, index of its first row among the rows exchanged with that rank).
    """

    batch_row: Callable[[], int]
    num_queries: int
    first_block: int
    local_tokens: int
    sources: list[tuple[int, int]]


@dataclass
class Guest:
    """Another rank's queries that visit a shard held here.

    Attributes:
        first_row: index among the received rows.
        num_queries: positive.
        blocks: [num_blocks] int64, the shard's block ids in order.
        length: KV tokens to attend to; the last block may be used in part.
    """

    first_row: int
    num_queries: int
    blocks: torch.Tensor
    length: int


@dataclass
class ShardedStep:
    """This rank's part of a step in which at least one row, somewhere, visits a shard.

    Attributes:
        own: rows of this rank, in the order of the plan.
        guests: in the order of the received rows.
        send_counts: query rows this rank sends to each rank.
        recv_counts: query rows it receives from each.
    """

    own: list[OwnRow]
    guests: list[Guest]
    send_counts: list[int]
    recv_counts: list[int]


@dataclass
class AttentionContext:
    """Attributes:
    exchange: set once the process groups exist.
    step: None in a step without sharded rows, which then is stock vLLM.
    """

    exchange: Exchange | None = None
    step: ShardedStep | None = None


context = AttentionContext()
