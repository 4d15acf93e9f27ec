# SPDX-License-Identifier: Apache-2.0
"""What is known of a rank between two steps: a few numbers, taken once and kept up to date."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ...placement.place import RankLoad
from .adapters import adapter_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class RankView:
    """A rank's queues and cache in numbers.

    Attributes:
        total_blocks: all that requests can use: without vLLM's null block.
        free_blocks: that nobody holds.
        to_take: blocks that requests which run have yet to take for their tokens and the next one.
        promised: the same of those that wait, without what they will share with others.
        watermark: blocks that vLLM keeps free while something runs.
        running: requests.
        waiting: requests, without sessions that wait for their client.
        idle_sessions: sessions that do.
        coming: requests that are about to arrive from another rank.
        slots: requests that the model runner has room for, without those about to leave or to arrive.
        tokens: of all that run, wait or are about to leave.
        to_compute: of these, yet to be computed by those that run or wait.
        prompt_tokens: of prompts, yet to be computed.
        budget: tokens of a step.
        computed: tokens of those that run whose KV is there: what a step reads.
        nobody_waits: whether nobody is in the queue of those without blocks, but idle sessions.
        busy: whether something runs or waits for nothing but room.
        only_chunks: whether all that run compute a part of their prompt.
        capacity_bound: vLLM's ``prefill_capacity_bound``.
        queued: requests in vLLM's queues, idle sessions included.
        unfinished: requests that are to be scheduled.
        finished: whether the model runner must be told of requests that have ended.
        kv_usage: part of the cache in use.
        adapters: those of requests that run there or are about to.
        max_adapters: how many may be active; None: as many as one likes.
    """

    total_blocks: int
    free_blocks: int
    to_take: int
    promised: int
    watermark: int
    running: int
    waiting: int
    idle_sessions: int
    coming: int
    slots: int
    tokens: int
    to_compute: int
    prompt_tokens: int
    budget: int
    computed: int
    nobody_waits: bool
    busy: bool
    only_chunks: bool
    capacity_bound: bool
    queued: int
    unfinished: int
    finished: bool
    kv_usage: float
    adapters: frozenset[int]
    max_adapters: int | None

    @property
    def spare_blocks(self) -> int:
        """Free blocks that nobody who runs, or is about to, needs for the tokens it has and the next one; may be
        negative."""
        return self.free_blocks - self.to_take

    def pack(self) -> tuple[Any, ...]:
        """Plain values, from which ``RankView(*values)`` makes it again."""
        values: tuple[Any, ...] = _values(self)
        return values

    def load(self, ahead: int = 0, read_blocks: int | None = None, prompts: int = 0) -> RankLoad:
        """What placement needs to know. Requests that wait without blocks count as if they had them.

        Args:
            ahead: sharded requests that will have their home here.
            read_blocks: see ``RankLoad``.
            prompts: tokens of sharded ones that it computes later.
        """
        batch = self.running + self.waiting + ahead + self.coming
        watermark = self.watermark if self.running else 0
        free = max(0, self.free_blocks - self.promised - self.to_take - watermark)
        return RankLoad(
            free_blocks=free,
            used_blocks=self.total_blocks - free,
            batch=batch,
            slots=self.slots + self.coming - batch - self.idle_sessions,
            read_blocks=read_blocks,
            adapters=self.adapters,
            max_adapters=self.max_adapters,
            backlog=2 * max(0, self.prompt_tokens + prompts) // self.budget,
        )

    def note_entered(self, request: Request, held: int, to_share: int, block_size: int, taken: int = 0) -> None:
        """A request waits there now.

        Args:
            request: itself.
            held: blocks that it has there.
            to_share: blocks that it will share with others.
            block_size: tokens a block holds.
            taken: tokens of it that are taken as computed.
        """
        tokens, adapter = request.num_tokens, adapter_of(request)
        self.waiting += 1
        self.queued += 1
        self.unfinished += 1
        self.promised += max(0, -(-tokens // block_size) - held - to_share)
        self.tokens += tokens
        left = max(0, tokens - max(taken, request.num_computed_tokens)) - to_share * block_size
        self.to_compute += left
        self.prompt_tokens += left
        if not request.num_computed_tokens:  # else it is in the queue of those that have blocks
            self.nobody_waits = False
        self.busy = True
        if adapter is not None and self.max_adapters is not None:
            self.adapters |= {adapter}


_values = attrgetter(*(one.name for one in fields(RankView)))
