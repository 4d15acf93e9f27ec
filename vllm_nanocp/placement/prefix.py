# SPDX-License-Identifier: Apache-2.0
"""Placing a request whose first blocks are cached somewhere: they stay where they lie and become its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .place import RankLoad, cdiv, place
from .shard_map import Run, ShardMap, join

# A short request follows its prefix to a rank with at most this many more requests than the emptiest.
BATCH_SLACK = 4
# The same where the prefix is being computed: those that came with the first one would else compute it again.
COMING_SLACK = 12
# Where KV is weighed, a rank that has a prefix may have so much more than the ranks' mean: a fraction of that; the
# prefix so many times, since to compute a token takes as long as to read it in some hundred steps; or tokens whose
# reading takes no part of a step that counts (0.4 ms on an H200).
KV_SLACK = 0.05
KV_SLACK_PREFIXES = 3
KV_SLACK_TOKENS = 16384
# A request does not wait, nor is one of one segment spread over ranks, for a smaller part of its tokens than one in so
# many: it computes them again.
LEAST_PART = 10


@dataclass(frozen=True)
class Prefix:
    """Where a request's first blocks are cached.

    Attributes:
        runs: from block 0 on; not all of the request's blocks. May be none.
        held: for each run, how many of its blocks requests hold now: sharing those takes no room.
        coming: whether a part of it that counts is yet to be computed, by a request that came before.

    Raises:
        ValueError: not one number for each run.
    """

    runs: tuple[Run, ...] = ()
    held: tuple[int, ...] = ()
    coming: bool = False

    def __post_init__(self) -> None:
        if len(self.runs) != len(self.held):
            raise ValueError(f"{len(self.runs)} runs, but {self.held} are held of them")

    @property
    def num_blocks(self) -> int:
        return self.runs[-1].end_block if self.runs else 0


def worthwhile(blocks: int, num_tokens: int, block_size: int) -> bool:
    """Whether so many blocks are a part of a request for which it should wait, or be spread over ranks."""
    return blocks * block_size * LEAST_PART >= num_tokens


def light(prefix: Prefix, loads: Sequence[RankLoad], block_size: int) -> bool:
    """Whether the KV of all ranks that have a prefix is near or below the mean, so that it may be read there once more.

    Popular prefixes would else draw request after request to the rank that has them. Home moves keep its batch small
    meanwhile, so that the batch alone would never stop it.
    """
    mean = sum(load.kv_level for load in loads) / len(loads)
    least = max(KV_SLACK * mean, KV_SLACK_TOKENS // block_size)
    return all(loads[run.rank].kv_level <= mean + max(least, KV_SLACK_PREFIXES * run.num_blocks) for run in prefix.runs)


def _follow(
    prefix: Prefix, need: int, block_size: int, loads: Sequence[RankLoad], home: int | None, spare: int, weighed: bool
) -> ShardMap | None:
    """The whole request on the rank of its prefix, unless that is too busy or has no room."""
    rank = prefix.runs[0].rank
    load = loads[rank]
    batches = [other.batch for other in loads]
    # Where KV is weighed, home moves even out the batches: around the mean, not down to the smallest.
    least = max(min(batches), sum(batches) // len(batches) if weighed else 0)
    near = load.batch <= least + (COMING_SLACK if prefix.coming else BATCH_SLACK)
    room = load.slots > 0 and load.free_blocks >= need + spare - prefix.held[0]
    if near and room and home in (None, rank):
        return ShardMap(block_size, (Run(rank, 0, need),))
    return None


def _taken(load: RankLoad, blocks: int, held: int) -> RankLoad:
    """A rank's load once a request has blocks of its prefix cache, of which others hold some already."""
    read = None if load.read_blocks is None else load.read_blocks + blocks
    more = blocks - held
    return replace(load, free_blocks=load.free_blocks - more, used_blocks=load.used_blocks + more, read_blocks=read)


def _leading(runs: Sequence[Run], max_degree: int, home: int | None) -> list[Run]:
    """The first of these runs that lie on at most ``max_degree`` ranks, the home among them if it is given."""
    ranks = set() if home is None else {home}
    kept: list[Run] = []
    for run in runs:
        ranks.add(run.rank)
        if len(ranks) > max_degree:
            break
        kept.append(run)
    return kept


def _around(
    prefix: Prefix, num_tokens: int, block_size: int, loads: Sequence[RankLoad], max_degree: int, **rules: Any
) -> ShardMap | None:
    """Every cached block stays where it is, and the rest of the request is placed as one of its own."""
    runs = _leading(prefix.runs, max_degree, rules["home"])
    if not runs:
        return None
    rest_loads = list(loads)
    for run, held in zip(runs, prefix.held, strict=False):
        if rest_loads[run.rank].free_blocks < run.num_blocks - held:
            return None
        rest_loads[run.rank] = _taken(rest_loads[run.rank], run.num_blocks, held)
    known, holders = runs[-1].end_block, {run.rank for run in runs}

    def rest_on(allowed: set[int]) -> ShardMap | None:
        able = [load if rank in allowed else replace(load, slots=0) for rank, load in enumerate(rest_loads)]
        most = min(max_degree, len(allowed))
        return place(num_tokens - known * block_size, block_size, able, max_degree=most, **rules)

    rest = rest_on(set(range(len(loads))))
    if rest is not None and len(holders | {run.rank for run in rest.runs}) > max_degree:
        # Too many ranks: those that hold the prefix, and as many of the others as there may be, the home first.
        others = [rank for rank in dict.fromkeys(run.rank for run in rest.runs[::-1]) if rank not in holders]
        rest = rest_on(holders.union(others[: max_degree - len(holders)]))
    if rest is None:
        return None
    moved = [Run(run.rank, run.first_block + known, run.end_block + known) for run in rest.runs]
    return ShardMap(block_size, join([*runs, *moved]))


def place_after_prefix(
    prefix: Prefix,
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
    least_shard: int = 0,
    again: bool = False,
) -> ShardMap | None:
    """Place a request around its cached prefix; None when that is not possible or not worth it.

    Where KV is weighed, a prefix on a rank with too much of it is not used: it is computed again elsewhere.

    A request of one segment stays on one rank: it follows the part of its prefix that the first of these ranks
    holds, unless that rank is too busy. A longer one keeps every cached block where it is, and the rest of it is
    placed as a request of its own; so does one of a segment that would have to compute much again otherwise.

    Args:
        prefix: where the request's first blocks are cached; at least one of them is.
        num_tokens: tokens the request has now.
        block_size, loads, segment_size, max_degree, home, headroom_blocks, kv_weight, stripe_blocks, least_shard: as
            for ``place``.
        again: whether this is what is left of the request itself, which was preempted; it is used wherever it is.
    """
    need, first = cdiv(num_tokens, block_size), prefix.runs[0]
    if kv_weight is not None and not again and not light(prefix, loads, block_size):
        return None
    rules = dict(
        segment_size=segment_size,
        home=home,
        headroom_blocks=headroom_blocks,
        kv_weight=kv_weight,
        stripe_blocks=stripe_blocks,
        least_shard=least_shard,
    )
    one_rank = num_tokens <= segment_size or max_degree == 1
    lost = prefix.num_blocks - first.num_blocks
    if not one_rank or (max_degree > 1 and lost and worthwhile(lost, num_tokens, block_size)):
        whole = _around(prefix, num_tokens, block_size, loads, max_degree, **rules)
        if whole is not None or not one_rank:
            return whole
    return _follow(prefix, need, block_size, loads, home, headroom_blocks, weighed=kv_weight is not None)
