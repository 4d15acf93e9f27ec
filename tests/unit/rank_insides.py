# SPDX-License-Identifier: Apache-2.0
"""All that tests read or change inside one rank's scheduler. ``rank`` is an element of the scheduler's ``ranks``: it,
or the near end of one behind a channel of this process (``loopback.py``)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.request import Request


def scheduler_of(rank: Any) -> Any:
    return rank.channel.server.scheduler if hasattr(rank, "channel") else rank


def leftovers(rank: Any) -> list[Any]:
    """What it keeps of requests: nothing, when all have ended."""
    ends: list[str] = []
    if hasattr(rank, "channel"):
        rank.refresh()
        ends = [*rank._known, *rank._watched, *rank._sessions, *rank.channel.server.leftovers()]
    rank = scheduler_of(rank)
    manager = rank.kv_cache_manager.coordinator.single_type_managers[0]
    return [
        *ends,
        *rank._strangers,
        *rank.requests,
        *rank.running,
        *manager.req_to_blocks,
        *manager.num_cached_block,
        *rank.deferred_waiting,
        *rank._inflight_prefills,
        *rank._leaving,
        *rank._coming,
        *rank.outgrown,
        *rank.to_share,
    ]


def running(rank: Any) -> list[str]:
    """Ids of the requests that run there."""
    rank = scheduler_of(rank)
    return [request.request_id for request in rank.running]


def known(rank: Any) -> dict[str, Request]:
    """All that run or wait there, by id."""
    rank = scheduler_of(rank)
    requests: dict[str, Request] = rank.requests
    return requests


def preempt(rank: Any, request_id: str) -> Request:
    """Preempt one that runs there, as vLLM's scheduler does for another's sake."""
    scheduler = scheduler_of(rank)
    request: Request = scheduler.requests[request_id]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    rank.refresh()
    return request


def count_give_ups(rank: Any, counts: Counter[str], what: str) -> None:
    """Count the idle sessions that make way for others there."""
    rank = scheduler_of(rank)
    give_up = rank._give_up

    def counted(session: Request) -> Any:
        counts[what] += 1
        return give_up(session)

    rank._give_up = counted


# -- its prefix cache and KV events ------------------------------------------------------------------------------------


def publish_to(rank: Any, publisher: Any) -> None:
    rank = scheduler_of(rank)
    rank.kv_event_publisher = publisher


def unpublished_events(rank: Any) -> list[Any]:
    """Of blocks that were stored or evicted since the last step that published; they are taken."""
    rank = scheduler_of(rank)
    events: list[Any] = rank.kv_cache_manager.take_events()
    return events


def cached_prefix(rank: Any, request: Request) -> int:
    """How many of a request's first blocks it has."""
    rank = scheduler_of(rank)
    found: int = rank.cached_run(request.block_hashes, 0)[0]
    return found


def num_cached_blocks(rank: Any) -> int:
    rank = scheduler_of(rank)
    return len(rank.block_pool.cached_block_hash_to_block)
