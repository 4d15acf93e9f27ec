# SPDX-License-Identifier: Apache-2.0
"""The shard map of one request: block index -> rank, kept as runs of consecutive blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Run:
    """Blocks ``first_block`` to ``end_block`` - 1 of a request, held by ``rank``."""

    rank: int
    first_block: int
    end_block: int

    @property
    def num_blocks(self) -> int:
        return self.end_block - self.first_block


def join(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same blocks on the same ranks, neighbours on one rank made one run."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].rank == run.rank:
            run = replace(joined.pop(), end_block=run.end_block)
        joined.append(run)
    return tuple(joined)


@dataclass(frozen=True)
class ShardMap:
    """Which rank holds each block of a request.

    The runs cover the blocks from 0 on without a gap; the last run is the home's and is open: the blocks of new
    tokens join it.

    Attributes:
        block_size: tokens a block holds.
        runs: at least one.

    Raises:
        ValueError: runs that leave a gap, overlap, or are empty.
    """

    block_size: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if self.block_size < 1 or not self.runs:
            raise ValueError("a shard map needs a positive block size and at least one run")
        at = 0
        for run in self.runs:
            if run.first_block != at or run.end_block <= at or run.rank < 0:
                raise ValueError(f"runs must be non-empty and follow each other: {self.runs}")
            at = run.end_block

    @property
    def home(self) -> int:
        """The rank of the last block: it computes the new tokens."""
        return self.runs[-1].rank

    @property
    def num_blocks(self) -> int:
        return self.runs[-1].end_block

    @property
    def degree(self) -> int:
        """How many ranks hold a shard."""
        return len({run.rank for run in self.runs})

    def rank_of(self, block: int) -> int:
        """The rank that holds a block; blocks past the last run belong to the home.

        Raises:
            ValueError: a negative block index.
        """
        if block < 0:
            raise ValueError(f"block index {block} is negative")
        for run in self.runs:
            if block < run.end_block:
                return run.rank
        return self.home

    def first_token(self, index: int) -> int:
        """Position of the first token of run ``index``."""
        return self.runs[index].first_block * self.block_size

    def end_token(self, index: int, num_tokens: int) -> int:
        """One past the last position of run ``index`` in a request of ``num_tokens`` tokens."""
        if index == len(self.runs) - 1:
            return num_tokens
        return min(self.runs[index].end_block * self.block_size, num_tokens)

    def tokens_by_rank(self, num_ranks: int, num_tokens: int) -> list[int]:
        """KV tokens each rank holds of the first ``num_tokens`` tokens."""
        held = [0] * num_ranks
        for index, run in enumerate(self.runs):
            held[run.rank] += max(0, self.end_token(index, num_tokens) - self.first_token(index))
        return held
