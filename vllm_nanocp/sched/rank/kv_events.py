# SPDX-License-Identifier: Apache-2.0
"""What a rank tells subscribers of its prefix cache: those blocks that a request can use there, and no others.

vLLM tells of each block that is cached or evicted. A rank here may have a block without those before it: they are on
another rank, or were evicted before it. Nobody who follows one rank's events could place it, and no request on that
rank can use it. So a block is announced when the rank has all blocks before it, too, and withdrawn when it has not any
more. What subscribers know is then exactly what is usable: each parent is known when its child comes, and a block that
is withdrawn has no children left. A block of which the rank has several copies is announced once, and withdrawn with
the last of them.

Touches vLLM 0.32's ``KVCacheManager.take_events``, ``BlockPool.emit_cached_block_events`` and the events of
``vllm/distributed/kv_events.py``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

# As events name blocks: bytes or an integer, by vLLM's settings.
Hash = Any


@dataclass(eq=False, slots=True)
class _Stored:
    """What vLLM said when it cached some blocks, one after another; their tokens are packed apart."""

    event: BlockStored
    tokens: array[int]

    def part(self, first: int, hashes: list[Hash], parent: Hash | None) -> BlockStored:
        """The same of some of the blocks."""
        end, size, event = first + len(hashes), self.event.block_size, self.event
        return msgspec.structs.replace(
            event,
            block_hashes=hashes,
            parent_block_hash=parent,
            token_ids=self.tokens[first * size : end * size].tolist(),
            extra_keys=None if event.extra_keys is None else event.extra_keys[first:end],
        )


@dataclass(eq=False, slots=True)
class _Block:
    """A block in the cache: how many copies there are, what is before it, and its place in what vLLM said."""

    parent: Hash | None
    source: _Stored
    index: int
    copies: int = 0
    announced: bool = False


class UsablePrefixes:
    """From all that a rank's cache has to what of it is usable.

    For one KV cache group of full attention, whose blocks are cached in the order of the tokens.
    """

    def __init__(self) -> None:
        self._blocks: dict[Hash, _Block] = {}
        # By the block before them; None: first ones. Also of blocks that are not in the cache.
        self._children: dict[Hash | None, dict[Hash, None]] = {}

    def follow(self, events: Iterable[KVCacheEvent], reports: Iterable[KVCacheEvent] = ()) -> list[KVCacheEvent]:
        """What to publish when vLLM has this to say.

        Args:
            events: since the last call, in order.
            reports: those of them that tell of blocks that a request has used again. They are passed on.
        """
        again = {id(report) for report in reports}
        out: list[KVCacheEvent] = []
        added: dict[Hash, None] = {}
        removed: dict[Hash, _Block] = {}
        passed: list[BlockStored] = []
        for event in events:
            if isinstance(event, BlockStored):
                passed.append(event) if id(event) in again else self._add(event, added)
            elif isinstance(event, BlockRemoved):
                self._remove(event, removed)
            else:
                assert isinstance(event, AllBlocksCleared), event
                for known in (self._blocks, self._children, added, removed):
                    known.clear()  # type: ignore[attr-defined]
                out, passed = [event], []
        out += self._withdraw(removed)
        for block_hash in added:
            out += self._announce(block_hash)
        return out + [event for event in passed if all(map(self._is_announced, event.block_hashes))]

    def _add(self, event: BlockStored, added: dict[Hash, None]) -> None:
        source = _Stored(msgspec.structs.replace(event, token_ids=[], block_hashes=[]), array("i", event.token_ids))
        parent = event.parent_block_hash
        for index, block_hash in enumerate(event.block_hashes):
            block = self._blocks.get(block_hash)
            if block is None:
                block = self._blocks[block_hash] = _Block(parent, source, index)
                self._children.setdefault(parent, {})[block_hash] = None
                added[block_hash] = None
            block.copies += 1
            parent = block_hash

    def _remove(self, event: BlockRemoved, removed: dict[Hash, _Block]) -> None:
        for block_hash in event.block_hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                continue
            block.copies -= 1
            if block.copies:
                continue
            del self._blocks[block_hash]
            siblings = self._children[block.parent]
            del siblings[block_hash]
            if not siblings:
                del self._children[block.parent]
            if block.announced:
                removed[block_hash] = block

    def _withdraw(self, removed: dict[Hash, _Block]) -> list[KVCacheEvent]:
        """Blocks that are gone, and those behind them; last ones first."""
        gone = dict(removed)
        reached = list(removed)
        while reached:
            for child in self._children.get(reached.pop(), ()):
                block = self._blocks[child]
                if block.announced:
                    block.announced = False
                    gone[child] = block
                    reached.append(child)
        behind: dict[Hash | None, list[Hash]] = {}
        for block_hash, block in gone.items():
            behind.setdefault(block.parent if block.parent in gone else None, []).append(block_hash)
        order: list[Hash] = []
        reached = behind.get(None, [])
        while reached:
            order.append(reached.pop())
            reached += behind.get(order[-1], ())
        return [
            BlockRemoved(
                block_hashes=[block_hash],
                medium=gone[block_hash].source.event.medium,
                group_idx=gone[block_hash].source.event.group_idx,
            )
            for block_hash in reversed(order)
        ]

    def _announce(self, first: Hash) -> list[KVCacheEvent]:
        """A block, if all before it are announced, and all that have waited for it."""
        out: list[KVCacheEvent] = []
        reached = [first]
        while reached:
            block_hash = reached.pop()
            block = self._blocks.get(block_hash)
            if block is None or block.announced or not self._is_announced(block.parent):
                continue
            run, last = [block_hash], block
            last.announced = True
            while True:
                following = None
                for child in self._children.get(run[-1], ()):
                    candidate = self._blocks[child]
                    if candidate.announced:
                        continue
                    if candidate.source is last.source and candidate.index == last.index + 1:
                        following = child
                    else:
                        reached.append(child)
                if following is None:
                    break
                last = self._blocks[following]
                last.announced = True
                run.append(following)
            out.append(block.source.part(block.index, run, block.parent))
        return out

    def _is_announced(self, block_hash: Hash | None) -> bool:
        return block_hash is None or (block_hash in self._blocks and self._blocks[block_hash].announced)


def install(manager: KVCacheManager) -> None:
    """Let a rank's manager tell only of what is usable. Its events must be on, and it must have one group."""
    pool, prefixes = manager.block_pool, UsablePrefixes()
    take: Callable[[], list[KVCacheEvent]] = manager.take_events
    report = pool.emit_cached_block_events
    reports: list[KVCacheEvent] = []

    def emit_cached_block_events(*args: Any, **kwargs: Any) -> None:
        before = len(pool.kv_event_queue)
        report(*args, **kwargs)
        reports.extend(pool.kv_event_queue[before:])

    def take_events() -> list[KVCacheEvent]:
        events = prefixes.follow(take(), reports)
        reports.clear()
        return events

    pool.emit_cached_block_events = emit_cached_block_events  # type: ignore[method-assign]
    manager.take_events = take_events  # type: ignore[method-assign]
