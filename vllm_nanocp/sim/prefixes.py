# SPDX-License-Identifier: Apache-2.0
"""The ranks' prefix caches, in units of the trace's prefix ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..placement import Run, ShardMap
from .trace import PREFIX_TOKENS


class PrefixCaches:
    """What each rank has cached. A prompt's blocks count as cached from its admission on, before they are computed.

    Args:
        ranks: how many.
        block_size: tokens a KV block holds; a divisor of ``PREFIX_TOKENS``.
    """

    def __init__(self, ranks: int, block_size: int) -> None:
        self.unit = PREFIX_TOKENS // block_size  # KV blocks of one hashed block
        self.refs: list[dict[int, int]] = [{} for _ in range(ranks)]
        # Those that no request holds, the longest unused first.
        self.idle: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]
        self.held_by: dict[int, list[tuple[int, int]]] = {}

    def has(self, rank: int, block: int) -> bool:
        return block in self.refs[rank] or block in self.idle[rank]

    def find(self, blocks: Sequence[int]) -> list[Run]:
        """Where a prompt's first blocks are cached, on as few ranks as that takes, as the scheduler looks for it."""
        prefix: list[Run] = []
        at = 0
        while at < len(blocks):
            ends = []
            for rank in range(len(self.refs)):
                end = at
                while end < len(blocks) and self.has(rank, blocks[end]):
                    end += 1
                ends.append(end)
            longest = max(ends)
            if longest == at:
                break
            prefix.append(Run(ends.index(longest), at * self.unit, longest * self.unit))
            at = longest
        return prefix

    def adopt(self, request: int, blocks: Sequence[int], shard_map: ShardMap) -> tuple[int, np.ndarray]:
        """A placed request takes the cached blocks that lie where it does, and caches its others.

        Returns:
            Tokens from the start on that are cached where they should be; KV blocks that each rank shares anew
            between requests.
        """
        shared = np.zeros(len(self.refs), dtype=np.int64)
        held = self.held_by[request] = []
        hits, missed = 0, False
        for index, block in enumerate(blocks):
            rank = shard_map.rank_of(index * self.unit)
            missed |= not self.has(rank, block)
            hits += not missed
            if rank != shard_map.rank_of((index + 1) * self.unit - 1):
                missed = True  # a hashed block cut in two by a border of runs is not cached
                hits = min(hits, index)
                continue
            refs = self.refs[rank]
            shared[rank] += self.unit if block in refs else 0
            refs[block] = refs.get(block, 0) + 1
            self.idle[rank].pop(block, None)
            held.append((rank, block))
        return hits * PREFIX_TOKENS, shared

    def release(self, request: int) -> np.ndarray:
        """A request ends; its blocks stay cached while there is room. Returns KV blocks no longer shared, by rank."""
        shared = np.zeros(len(self.refs), dtype=np.int64)
        for rank, block in reversed(self.held_by.pop(request)):
            refs = self.refs[rank]
            refs[block] -= 1
            if refs[block]:
                shared[rank] += self.unit
            else:
                del refs[block]
                self.idle[rank][block] = None
        return shared

    def evict(self, free: Sequence[int]) -> None:
        """Forget unused blocks that no longer fit into the ranks' free KV blocks."""
        for idle, room in zip(self.idle, free, strict=True):
            while len(idle) * self.unit > room:
                idle.popitem(last=False)
