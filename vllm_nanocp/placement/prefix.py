# SPDX-License-Identifier: Apache-2.0
"""Placing a request whose first blocks are cached somewhere: they stay where they lie and become its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .place import RankLoad, cdiv, place
from .shard_map import Run, ShardMap, join

# A short request follows its prefix to a rank with at most this many more requests than the emptiest.
BATCH_SLACK = 4
# The same for KV, as a fraction of the ranks' mean; used where KV is weighed.
KV_SLACK = 0.05


def _light(loads: Sequence[RankLoad], rank: int, blocks: int) -> bool:
    """Whether a rank's KV is near or below the mean, so that ``blocks`` more may be read there.

    Popular prefixes would else draw request after request to the rank that has them. Home moves keep its batch small
    meanwhile, so that the batch alone would never stop it.
    """
    mean = sum(load.kv_level for load in loads) / len(loads)
    return loads[rank].kv_level <= mean + max(KV_SLACK * mean, blocks)


def _follow(
    rank: int, need: int, block_size: int, loads: Sequence[RankLoad], home: int | None, headroom: int, weighed: bool
) -> ShardMap | None:
    """The whole request on the rank of its prefix, unless that is too busy."""
    load = loads[rank]
    batches = [other.batch for other in loads]
    # Where KV is weighed, home moves even out the batches: around the mean, not down to the smallest.
    least = max(min(batches), sum(batches) // len(batches) if weighed else 0)
    near = load.batch <= least + BATCH_SLACK
    if near and home in (None, rank) and load.slots > 0 and load.free_blocks >= need + headroom:
        return ShardMap(block_size, (Run(rank, 0, need),))
    return None


def _taken(load: RankLoad, blocks: int) -> RankLoad:
    """A rank's load once a request has blocks of its prefix cache."""
    read = None if load.read_blocks is None else load.read_blocks + blocks
    return replace(load, free_blocks=load.free_blocks - blocks, used_blocks=load.used_blocks + blocks, read_blocks=read)


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
    kv_weight: float | None = None,
    stripe_blocks: int | None = None,
) -> ShardMap | None:
    """Place a request around its cached prefix; None when that is not possible or not worth it.

    Where KV is weighed, a prefix on a rank with too much of it is not used: it is computed again elsewhere.

    A request of one segment stays on one rank: it follows the part of its prefix that the first of these ranks
    holds, unless that rank is too busy. A longer one keeps every cached block where it is, and the rest of it is
    placed as a request of its own.

    Args:
        prefix: where the request's first blocks are cached, from block 0 on; not all of its blocks.
        num_tokens: tokens the request has now.
        block_size, loads, segment_size, max_degree, home, headroom_blocks, kv_weight, stripe_blocks: as for ``place``.
    """
    need = cdiv(num_tokens, block_size)
    if kv_weight is not None and not all(_light(loads, run.rank, run.num_blocks) for run in prefix):
        return None
    if num_tokens <= segment_size or max_degree == 1:
        return _follow(prefix[0].rank, need, block_size, loads, home, headroom_blocks, weighed=kv_weight is not None)
    rest_loads = list(loads)
    for run in prefix:
        if rest_loads[run.rank].free_blocks < run.num_blocks:
            return None
        rest_loads[run.rank] = _taken(rest_loads[run.rank], run.num_blocks)
    known = prefix[-1].end_block
    rest = place(
        num_tokens - known * block_size,
        block_size,
        rest_loads,
        segment_size=segment_size,
        max_degree=max_degree,
        home=home,
        headroom_blocks=headroom_blocks,
        kv_weight=kv_weight,
        stripe_blocks=stripe_blocks,
    )
    if rest is None:
        return None
    moved = [Run(run.rank, run.first_block + known, run.end_block + known) for run in rest.runs]
    whole = ShardMap(block_size, join([*prefix, *moved]))
    return whole if whole.degree <= max_degree else None
