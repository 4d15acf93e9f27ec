# SPDX-License-Identifier: Apache-2.0
"""All that tests read or change inside one rank's scheduler. ``rank`` is an element of the scheduler's ``ranks``: it,
or the near end of one behind a channel of this process (``loopback.py``) or of a process (``rank_forks.py``)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vllm.v1.request import Request

T = TypeVar("T")


def scheduler_of(rank: Any) -> Any:
    """The scheduler, which must be of this process; ``rank`` may also be the server that it is behind."""
    server = rank.channel.server if hasattr(rank, "channel") else rank
    return getattr(server, "scheduler", server)


def inside(function: Callable[..., T]) -> Callable[..., T]:
    """Called in the rank's process, if that is another one."""

    @functools.wraps(function)
    def call(rank: Any, *args: Any) -> T:
        if hasattr(rank, "channel") and not hasattr(rank.channel, "server"):
            found: T = rank._call("inspect", function.__name__, *args)
            return found
        return function(rank, *args)

    return call


def leftovers(rank: Any) -> list[Any]:
    """What it keeps of requests: nothing, when all have ended."""
    if not hasattr(rank, "channel"):
        return kept(rank)
    rank.refresh()
    return [*rank._known, *rank._watched, *rank._sessions, *kept(rank)]


@inside
def views(rank: Any) -> tuple[Any, Any]:
    """The numbers that its scheduler keeps, and those taken now from all that it has."""
    scheduler = scheduler_of(rank)
    fresh = scheduler.take_view()
    if scheduler.spare_blocks != fresh.spare_blocks:  # counted by itself
        raise AssertionError(f"{scheduler.spare_blocks} spare blocks instead of {fresh.spare_blocks}")
    return scheduler.view, fresh


@inside
def kept(rank: Any) -> list[str]:
    """Ids that its scheduler and the server before it still know."""
    server = getattr(rank, "channel", rank)
    server = getattr(server, "server", server)
    ends = server.leftovers() if hasattr(server, "leftovers") else []
    rank = scheduler_of(rank)
    manager = rank.kv_cache_manager.coordinator.single_type_managers[0]
    return [
        *ends,
        *rank._strangers,
        *rank.requests,
        *(request.request_id for request in rank.running),
        *manager.req_to_blocks,
        *manager.num_cached_block,
        *(request.request_id for request in rank.deferred_waiting),
        *(request.request_id for request in rank._inflight_prefills),
        *rank._leaving,
        *rank._coming,
        *rank.outgrown,
        *rank.to_share,
    ]


@inside
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


@inside
def count_give_ups(rank: Any) -> None:
    """From now on count the idle sessions that make way for others there."""
    rank = scheduler_of(rank)
    give_up = rank._give_up
    rank.num_given_up = 0

    def counted(session: Request) -> Any:
        rank.num_given_up += 1
        return give_up(session)

    rank._give_up = counted


@inside
def give_ups(rank: Any) -> int:
    """How many were counted."""
    number: int = scheduler_of(rank).num_given_up
    return number


# -- its prefix cache and KV events ------------------------------------------------------------------------------------


class Published:
    """Keeps the KV events that a rank publishes, for the next who asks for them."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.events += batch.events

    def shutdown(self) -> None:
        """As vLLM's publishers have it."""


@inside
def keep_events(rank: Any) -> None:
    """From now on keep those that it publishes."""
    scheduler_of(rank).kv_event_publisher = Published()


@inside
def take_events(rank: Any) -> list[Any]:
    """Those published since, and those of blocks that were stored or evicted since the last step that published."""
    rank = scheduler_of(rank)
    kept, rank.kv_event_publisher.events = rank.kv_event_publisher.events, []
    return [*kept, *(rank.kv_cache_manager.take_events() or ())]


def cached_prefix(rank: Any, request: Request) -> int:
    """How many of a request's first blocks it has."""
    return cached_run(rank, request.block_hashes)


@inside
def cached_run(rank: Any, hashes: Sequence[Any]) -> int:
    found: int = scheduler_of(rank).cached_run(hashes, 0)[0]
    return found


@inside
def num_cached_blocks(rank: Any) -> int:
    rank = scheduler_of(rank)
    return len(rank.block_pool.cached_block_hash_to_block)


# -- its answers -------------------------------------------------------------------------------------------------------


@inside
def dawdle(rank: Any, seconds: float, size: int) -> bytes:
    """A long answer that takes its time."""
    time.sleep(seconds)
    return bytes(size)
