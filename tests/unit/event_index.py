# SPDX-License-Identifier: Apache-2.0
"""A router's index of one rank's prefix cache, made of nothing but its KV events: a tree of blocks by their adapter's
name and their tokens.

It is strict: a block whose parent it does not know, a second announcement, the withdrawal of an unknown block or of one
that has others behind it are errors. Real indexes drop or misplace such blocks, each in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored


class EventError(AssertionError):
    """A stream that an index cannot follow."""


Key = tuple[str | None, tuple[int, ...]]  # the adapter's name and the tokens


@dataclass
class Node:
    """A block, or the root."""

    block_hash: Any = None
    key: Key = (None, ())
    parent: Node | None = None
    children: dict[Key, Node] = field(default_factory=dict)


class Index:
    """What a subscriber to a rank's events knows.

    Args:
        rank: the events' rank, for messages.
        block_size: tokens a block must have.
    """

    def __init__(self, rank: int, block_size: int) -> None:
        self.rank, self.block_size = rank, block_size
        self.root = Node()
        self.nodes: dict[Any, Node] = {}

    def follow(self, events: Iterable[Any]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    self._remove(block_hash)
            else:
                self.root, self.nodes = Node(), {}

    def _store(self, event: BlockStored) -> None:
        size = self.block_size
        if event.block_size != size or len(event.token_ids) != size * len(event.block_hashes):
            raise EventError(f"rank {self.rank}: {event} has {len(event.token_ids)} tokens")
        if event.extra_keys is not None and len(event.extra_keys) != len(event.block_hashes):
            raise EventError(f"rank {self.rank}: {event} has other keys than blocks")
        parent = self.root if event.parent_block_hash is None else self.nodes.get(event.parent_block_hash)
        if parent is None:
            raise EventError(f"rank {self.rank}: nobody has announced the parent of {event}")
        if parent is not self.root and parent.key[0] != event.lora_name:
            raise EventError(f"rank {self.rank}: {event} goes on after a block of {parent.key[0]}")
        for at, block_hash in enumerate(event.block_hashes):
            key = event.lora_name, tuple(event.token_ids[at * size : (at + 1) * size])
            if block_hash in self.nodes or key in parent.children:
                raise EventError(f"rank {self.rank}: {block_hash!r} is announced again")
            parent.children[key] = self.nodes[block_hash] = parent = Node(block_hash, key, parent)

    def _remove(self, block_hash: Any) -> None:
        node = self.nodes.pop(block_hash, None)
        if node is None or node.parent is None:
            raise EventError(f"rank {self.rank}: {block_hash!r} is withdrawn, but was never announced")
        if node.children:
            raise EventError(f"rank {self.rank}: {block_hash!r} is withdrawn before those behind it")
        del node.parent.children[node.key]

    def match(self, tokens: Sequence[int], adapter: str | None = None) -> list[Any]:
        """Hashes of a prompt's first blocks, as far as the rank has them for the adapter of this name."""
        node, found = self.root, []
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            child = node.children.get((adapter, tuple(tokens[start : start + self.block_size])))
            if child is None:
                break
            node = child
            found.append(node.block_hash)
        return found
