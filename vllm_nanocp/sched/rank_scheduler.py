# SPDX-License-Identifier: Apache-2.0
"""One rank's vLLM scheduler, with the few doors the composition needs.

Touches vLLM 0.32's ``Scheduler``, ``KVCacheManager``, its coordinator and block pool. The rest of ``sched`` uses
these doors, ``SchedulerInterface``, and the scheduler's public ``requests`` and ``waiting``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from ..placement import RankLoad
from .adapters import AdapterDoors
from .chunks import ChunkDoors
from .sessions import SessionDoors, is_idle

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.core.sched.output import SchedulerOutput

    from .sharded import Keeper

_tokens = attrgetter("num_tokens")


class RankDoors(SessionDoors, AdapterDoors, ChunkDoors):
    """Mixed into vLLM's scheduler: hooks on leaving, and shards that no queue knows of."""

    on_preempt: Callable[[Request], None]
    on_free: Callable[[Request], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Requests that came with tokens made elsewhere and that the model runner has not met.
        self._strangers: set[str] = set()
        # Those that it meets with this step's output: their tokens so far, by id.
        self.introduced: dict[str, list[int]] = {}
        # Blocks that requests which wait here without any will share with others, by id.
        self._to_share: dict[str, int] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.reserve_adapters()
        self.share_step()
        idle = not (self.running or self._coming or self._leaving)
        output = super().schedule(*args, **kwargs)
        if idle and not self.running:
            self.give_way_if_stuck()
        for request_id in self._to_share.keys() & output.num_scheduled_tokens.keys():
            del self._to_share[request_id]
        self.introduced = {}
        if self._strangers:
            for request_id in self._strangers & output.num_scheduled_tokens.keys():
                self._introduce(self.requests[request_id], output)
        return output

    def _introduce(self, request: Request, output: SchedulerOutput) -> None:
        """Describe to the model runner, as a new request, one that the scheduler took to be known."""
        request_id, cached = request.request_id, output.scheduled_cached_reqs
        if request_id in cached.req_ids:
            at = cached.req_ids.index(request_id)
            computed = cached.num_computed_tokens[at]
            for column in (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.num_output_tokens):
                del column[at]
            cached.all_token_ids.pop(request_id, None)
            cached.resumed_req_ids.discard(request_id)
            blocks = self.kv_cache_manager.get_block_ids(request_id)
            tokens = request._all_token_ids if self.use_v2_model_runner else None
            new = NewRequestData.from_request(request, blocks, tokens)
            new.num_computed_tokens = computed
            output.scheduled_new_reqs.append(new)
        self._strangers.discard(request_id)
        self.introduced[request_id] = list(request.output_token_ids)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.on_preempt(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        self._strangers.discard(request.request_id)
        self._to_share.pop(request.request_id, None)
        self._left(request)
        self.on_free(request)
        return result

    # -- shards ------------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> Any:
        """The manager of the first KV cache group; where requests are sharded there is no other."""
        return self.kv_cache_manager.coordinator.single_type_managers[0]

    @property
    def block_pool(self) -> BlockPool:
        return self.kv_cache_manager.block_pool

    def cached_run(self, hashes: Sequence[BlockHash], first_block: int) -> tuple[int, int]:
        """How many blocks from ``first_block`` on, one after another, are in this rank's prefix cache; and how many of
        them requests hold now."""
        get, group = self.block_pool.get_cached_block, [0]
        end, held = first_block, 0
        while end < len(hashes) and (found := get(hashes[end], group)) is not None:
            held += found[0].ref_cnt > 0
            end += 1
        return end - first_block, held

    def adopt_cached(self, member_id: str, hashes: Sequence[BlockHash]) -> int:
        """Begin a shard with blocks of this rank's prefix cache.

        Args:
            member_id: of the request as this rank's scheduler will know it; it must hold no blocks here.
            hashes: of its blocks; may be none.

        Returns:
            How many of them, one after another, are cached and begin the shard.
        """
        manager = self._manager
        assert not manager.req_to_blocks.get(member_id)
        get, group = self.block_pool.get_cached_block, [0]
        blocks = []
        for block_hash in hashes:
            found = get(block_hash, group)
            if found is None:
                break
            blocks.append(found[0])
        self.block_pool.touch(blocks)
        manager.req_to_blocks[member_id] = blocks
        manager.num_cached_block[member_id] = len(blocks)
        return len(blocks)

    def allocate(self, member_id: str, num_blocks: int) -> None:
        """Complete a shard that ``adopt_cached`` began, to so many blocks.

        Raises:
            ValueError: the rank has not enough free blocks. Placement has counted them, so this is a bug.
        """
        num_tokens = num_blocks * self._manager.block_size
        self._manager.allocate_new_blocks(member_id, num_tokens, num_tokens)

    def unfold(self, member_id: str, first_block: int) -> None:
        """Before its member computes: let vLLM's null block stand for each block before a shard's first."""
        manager = self._manager
        blocks = manager.req_to_blocks[member_id]
        manager.req_to_blocks[member_id] = [self.block_pool.null_block] * first_block + blocks
        manager.num_cached_block[member_id] += first_block

    def _fold(self, member_id: str, first_block: int) -> None:
        """Only the shard's own blocks are kept: a long request has as many members as chunks."""
        del self._manager.req_to_blocks[member_id][:first_block]

    def record_prefix_hits(self, request: Request, num_tokens: int) -> None:
        """Count a prefix-cache lookup in this rank's statistics, as vLLM's scheduler does for its own."""
        self.kv_cache_manager.record_prefix_cache_stats(request, num_tokens)

    def note_finished(self, request: Request) -> None:
        """Tell front-ends that track requests by id of one that ended before this scheduler knew it by its id."""
        if self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict[request.client_index].add(request.request_id)

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.get_num_free_blocks()

    @property
    def num_blocks(self) -> int:
        """All blocks that requests can use: without the null block."""
        return self.block_pool.num_gpu_blocks - 1

    def shard_blocks(self, keeper: Keeper) -> list[int]:
        """Block ids of a shard whose member does not compute, in order."""
        return [block.block_id for block in self._manager.req_to_blocks[keeper.request_id]]

    def close_shard(self, member: Request | Keeper) -> None:
        """Give a shard's blocks back. The member must not be in the scheduler's queues."""
        self.kv_cache_manager.coordinator.free(member.request_id)

    def holds(self, member: Request) -> bool:
        return bool(self._manager.req_to_blocks.get(member.request_id))

    # -- members -----------------------------------------------------------------------------------------------

    def enter(self, request: Request, to_share: int = 0) -> None:
        """Let a request wait here: a new one, a member with its shard open, or one that was preempted here.

        Args:
            request: waits nowhere.
            to_share: blocks that others hold and that it will share when it is scheduled.
        """
        if to_share:
            self._to_share[request.request_id] = to_share
        events = len(request.events)
        if request.request_id in self.requests:
            self._enqueue_waiting_request(request)
        else:
            chunks = request.streaming_queue
            self.add_request(request)
            request.streaming_queue = chunks
        # The request was queued when it came, not when it entered a rank.
        del request.events[events:]

    def leave(self, request: Request) -> None:
        """Schedule a running request no more; what it has in flight still comes to it."""
        self.running.remove(request)
        self._leaving[request.request_id] = request
        self.max_num_active_reqs -= 1

    def _left(self, request: Request) -> None:
        if self._leaving.pop(request.request_id, None) is not None:
            self.max_num_active_reqs += 1

    def stay(self, request: Request) -> None:
        """Take back one that was about to leave."""
        self._left(request)
        self.running.append(request)

    def expect(self, request: Request) -> None:
        """Keep a slot of the model runner, one for its adapter, and a block, for a request that is on its way here."""
        self._coming[request.request_id] = request
        self.max_num_active_reqs -= 1

    def expect_no_more(self, request_id: str) -> None:
        del self._coming[request_id]
        self.max_num_active_reqs += 1

    def hand_over(self, request: Request, keeper: Keeper, first_block: int) -> None:
        """Let a keeper have the shard of a request that has left; the model runner forgets the request."""
        self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        manager = self._manager
        manager.req_to_blocks[keeper.request_id] = manager.req_to_blocks.pop(request.request_id)
        manager.num_cached_block[keeper.request_id] = manager.num_cached_block.pop(request.request_id, 0)
        self._fold(keeper.request_id, first_block)
        self._strangers.discard(request.request_id)
        self._left(request)
        self._forget(request)

    def arrive(self, request: Request, first_block: int) -> None:
        """Go on with a request that has computed all before ``first_block`` elsewhere; before all others, for it has
        waited for a step."""
        self.expect_no_more(request.request_id)
        self.adopt_cached(request.request_id, [])
        self.unfold(request.request_id, first_block)
        self.requests[request.request_id] = request
        self._strangers.add(request.request_id)
        self.running.insert(0, request)

    def park(self, member: Request, first_block: int) -> None:
        """Take a member out of the scheduler and of the model runner; its shard stays."""
        self._fold(member.request_id, first_block)
        self.running.remove(member)
        self._forget(member)

    def withdraw(self, member: Request) -> None:
        """Take a member that waits (after a preemption, or not yet started) out; its shard stays, if any."""
        self.take_from_queues(member)
        self._forget(member)

    def take_from_queues(self, request: Request) -> None:
        """Out of the waiting queues; the scheduler and the model runner still know the request."""
        self.waiting.remove_requests([request])
        self.kv_holding_waiting.remove_requests([request])
        self.deferred_waiting.discard(request)

    def _forget(self, member: Request) -> None:
        self._inflight_prefills.discard(member)
        del self.requests[member.request_id]
        self.finished_req_ids.add(member.request_id)

    def preempt_running(self) -> None:
        """Preempt all; their output in flight is dropped, since they may resume in the same step."""
        now = time.monotonic()
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        self.prev_step_scheduled_req_ids.clear()

    # -- load --------------------------------------------------------------------------------------------------

    @property
    def spare_blocks(self) -> int:
        """Free blocks that nobody who runs, or is about to, needs for the tokens it has and the next one; may be
        negative."""
        return self.num_free_blocks - self.blocks_to_take

    @property
    def blocks_to_take(self) -> int:
        """Blocks that requests which run or are about to have yet to take for their tokens and the next one."""
        held, block_size = self._manager.req_to_blocks, self._manager.block_size
        return len(self._coming) + sum(
            max(0, -(-max(r.num_tokens, r.num_computed_tokens + 1) // block_size) - len(held[r.request_id]))
            for r in self.running
        )

    @property
    def tokens_to_compute(self) -> int:
        """Tokens of all that run here or wait that are yet to be computed."""
        present = chain(self.running, self.waiting, self.kv_holding_waiting)
        tokens = sum(max(0, request.num_tokens - request.num_computed_tokens) for request in present)
        return tokens - sum(self._to_share.values()) * self._manager.block_size

    @property
    def prompt_tokens(self) -> int:
        """Those of them that are of prompts."""
        prompts = chain(self._inflight_prefills, self.waiting, self.kv_holding_waiting)
        tokens = sum(request.num_tokens - request.num_computed_tokens for request in prompts)
        return tokens - sum(self._to_share.values()) * self._manager.block_size

    @property
    def num_tokens(self) -> int:
        """Tokens of all that run here, wait, or are about to leave."""
        here = chain(self.running, self.waiting, self.kv_holding_waiting, self._leaving.values())
        return sum(map(_tokens, here))

    def load(self, block_size: int, ahead: int = 0) -> RankLoad:
        """What placement needs to know. Requests that wait without blocks count as if they had them.

        Args:
            block_size: tokens a block holds.
            ahead: sharded requests that will have their home here.
        """
        # Sessions that wait for their client need a slot of the model runner and nothing else.
        waiting = len(self.waiting) + len(self.kv_holding_waiting) - self.num_waiting_for_streaming_input
        held, shared = self._manager.req_to_blocks, self._to_share
        promised = sum(
            max(0, -(-r.num_tokens // block_size) - len(held.get(r.request_id, ())) - shared.get(r.request_id, 0))
            for r in chain(self.waiting, self.kv_holding_waiting)
            if not is_idle(r)
        )
        batch = len(self.running) + waiting + ahead + len(self._coming)
        total = self.num_blocks
        watermark = self.kv_cache_manager.watermark_blocks if self.running else 0
        free = max(0, self.num_free_blocks - promised - self.blocks_to_take - watermark)
        slots = self.max_num_active_reqs + len(self._coming) - batch - self.num_waiting_for_streaming_input
        return RankLoad(
            free_blocks=free,
            used_blocks=total - free,
            batch=batch,
            slots=slots,
            adapters=self.adapters(),
            max_adapters=self.max_adapters,
            backlog=2 * max(0, self.prompt_tokens) // self.max_num_scheduled_tokens,
        )


class RankScheduler(RankDoors, Scheduler):
    """A rank's scheduler without async scheduling."""


class AsyncRankScheduler(RankDoors, AsyncScheduler):
    """A rank's scheduler with async scheduling."""
