# SPDX-License-Identifier: Apache-2.0
"""Which blocks a rank's prefix cache has, told to another process by what changes.

Touches vLLM 0.32's ``BlockPool.cached_block_hash_to_block`` and ``BlockHashToBlockMap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import get_block_hash

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool, KVCacheBlock
    from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId


class Changes(NamedTuple):
    """Since they were told last.

    Attributes:
        anew: whether all that was cached before is gone.
        cached, evicted: hashes.
    """

    anew: bool
    cached: list[BlockHash]
    evicted: list[BlockHash]


class _Recorded(BlockHashToBlockMap):
    """vLLM's map from hashes to blocks, which notes what comes and goes."""

    def __init__(self, changes: dict[BlockHash, bool]) -> None:
        super().__init__()
        self.changes = changes

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        if key not in self._cache:
            self.changes[get_block_hash(key)] = True
        super().insert(key, block)

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        block = super().pop(key, block_id)
        if block is not None and key not in self._cache:
            self.changes[get_block_hash(key)] = False
        return block


class CacheRecorder:
    """Records a pool's changes. The pool must be of one KV cache group, and its cache empty."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._map: BlockHashToBlockMap = pool.cached_block_hash_to_block
        self.changes()

    def changes(self) -> Changes | None:
        """What has changed since the last call; None if nothing has."""
        pool = self._pool
        anew = pool.cached_block_hash_to_block is not self._map or not isinstance(self._map, _Recorded)
        if anew:  # the pool was reset
            old, self._map = pool.cached_block_hash_to_block, _Recorded({})
            for key, blocks in old._cache.items():
                self._map._cache[key] = blocks
                self._map.changes[get_block_hash(key)] = True
            pool.cached_block_hash_to_block = self._map
        changes = self._map.changes  # type: ignore[attr-defined]
        if not changes and not anew:
            return None
        cached = [block_hash for block_hash, there in changes.items() if there]
        evicted = [block_hash for block_hash, there in changes.items() if not there]
        changes.clear()
        return Changes(anew, cached, evicted)


# Hashes, and on which ranks each is cached: bit ``rank`` of the number. Of all ranks in one place, for of most hashes
# it is only asked whether any rank has it.
Whereabouts = dict["BlockHash", int]


class CachedBlocks:
    """The hashes that a rank elsewhere has.

    Args:
        where: of all ranks.
        rank: which one.
    """

    def __init__(self, where: Whereabouts, rank: int) -> None:
        self._where, self._bit = where, 1 << rank

    def follow(self, changes: Changes) -> None:
        where, bit = self._where, self._bit
        if changes.anew:
            self._remove([block_hash for block_hash, ranks in where.items() if ranks & bit])
        for block_hash in changes.cached:
            known = where.get(block_hash)
            where[block_hash] = bit if known is None else known | bit
        self._remove(changes.evicted)

    def _remove(self, evicted: Sequence[BlockHash]) -> None:
        where, bit = self._where, self._bit
        for block_hash in evicted:
            others = where.pop(block_hash, 0) & ~bit
            if others:
                where[block_hash] = others

    def run(self, hashes: Sequence[BlockHash], first: int) -> int:
        """How many from ``first`` on, one after another, are there."""
        where, bit, end = self._where, self._bit, first
        while end < len(hashes) and where.get(hashes[end], 0) & bit:
            end += 1
        return end - first
