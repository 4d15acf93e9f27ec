# SPDX-License-Identifier: Apache-2.0
"""On which node each rank runs. Pure functions; no Ray, no vLLM."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence


def nodes_of_ranks(room: Mapping[str, int], ranks: int, workers: int, first: str) -> list[str] | None:
    """Put ranks on as few nodes as will do, all workers of a rank on one.

    Args:
        room: node -> workers it can take.
        ranks: how many.
        workers: of each rank.
        first: the node to fill before all others, if it has room: the scheduler's.

    Returns:
        The node of each rank, those on one node together; None if they do not fit.
    """
    order = sorted(room, key=lambda node: (node != first, -room[node], node))
    nodes = [node for node in order for _ in range(room[node] // workers)]
    return nodes[:ranks] if len(nodes) >= ranks else None


def bundles_of_workers(nodes: Sequence[str], ranks: int, workers: int, first: str) -> list[int] | None:
    """Which bundle of a placement group each worker takes.

    Args:
        nodes: the node of each bundle. A bundle has room for one worker.
        ranks, workers, first: as for ``nodes_of_ranks``.

    Returns:
        A bundle's index for each worker, in the order of the world; None if the workers of some rank would be on
        different nodes.
    """
    bundles: dict[str, deque[int]] = defaultdict(deque)
    for index, node in enumerate(nodes):
        bundles[node].append(index)
    chosen = nodes_of_ranks({node: len(found) for node, found in bundles.items()}, ranks, workers, first)
    return None if chosen is None else [bundles[node].popleft() for node in chosen for _ in range(workers)]


def same_node(nodes: Sequence[str], workers: int) -> bool:
    """Whether the workers of each rank are on one node. ``nodes``: that of each worker, in the order of the world."""
    return all(len(set(nodes[first : first + workers])) == 1 for first in range(0, len(nodes), workers))
