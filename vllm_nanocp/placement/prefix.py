# SPDX-License-Identifier: Apache-2.0
"""Placing a request whose first blocks are cached somewhere: they stay where they lie and become its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .place import RankLoad, cdiv, place
from .shard_map import Run, ShardMap

# A short request follows its prefix to a rank with at most this many more requests than the emptiest.
BATCH_SLACK = 4


def join(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same blocks on the same ranks, neighbours on one rank made one run."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].rank == run.rank:
            run = replace(joined.pop(), end_block=run.end_block)
        joined.append(run)
    return tuple(joined)


def place_after_prefix(
    prefix: Sequence[Run],
    num_tokens: int,
    block_size: int,
    loads: Sequence[RankLoad],
    *,
    segment_size: int,
    max_degree: int,
    home: int | None = None,
    headroom_blocks: int = 1,
) -> ShardMap | None:
    """Place a request around its cached prefix; None when that is not possible or not worth it.

    A request of one segment stays on one rank: it follows the part of its prefix that the first of these ranks
    holds, unless that rank is too busy. A longer one keeps every cached block where it is, and the rest of it is
    placed as a request of its own.

    Args:
        prefix: where the request's first blocks are cached, from block 0 on; not all of its blocks.
        num_tokens: tokens the request has now.
        block_size, loads, segment_size, max_degree, home, headroom_blocks: as for ``place``.
    """
    need = cdiv(num_tokens, block_size)
    if num_tokens <= segment_size or max_degree == 1:
        rank = prefix[0].rank
        load = loads[rank]
        near = load.batch <= min(other.batch for other in loads) + BATCH_SLACK
        if near and home in (None, rank) and load.slots > 0 and load.free_blocks >= need + headroom_blocks:
            return ShardMap(block_size, (Run(rank, 0, need),))
        return None
    rest_loads = list(loads)
    for run in prefix:
        load = rest_loads[run.rank]
        if load.free_blocks < run.num_blocks:
            return None
        taken = run.num_blocks
        rest_loads[run.rank] = replace(load, free_blocks=load.free_blocks - taken, used_blocks=load.used_blocks + taken)
    known = prefix[-1].end_block
    rest = place(
        num_tokens - known * block_size,
        block_size,
        rest_loads,
        segment_size=segment_size,
        max_degree=max_degree,
        home=home,
        headroom_blocks=headroom_blocks,
    )
    if rest is None:
        return None
    moved = [Run(run.rank, run.first_block + known, run.end_block + known) for run in rest.runs]
    whole = ShardMap(block_size, join([*prefix, *moved]))
    return whole if whole.degree <= max_degree else None
