# SPDX-License-Identifier: Apache-2.0
"""One rank's vLLM scheduler, with the few doors the composition needs.

Touches vLLM 0.32's ``Scheduler``, ``KVCacheManager``, its coordinator and block pool. The rest of ``sched`` knows a
rank as a ``Rank`` (``interface.py``), which these doors are: they take ids and plain data, so that they can be used
from another process. Requests themselves come in by ``enter``, ``arrive`` and ``add_chunk`` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from .allowance import AllowanceDoors
from .chunks import ChunkDoors
from .drafts import DraftDoors
from .interface import Allowed, Part
from .stats import Updated, take_stats
from .taken_prompts import TakenDoors
from .victims import VictimDoors

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.output import SchedulerOutput


class RankDoors(DraftDoors, ChunkDoors, VictimDoors, TakenDoors, AllowanceDoors):
    """Mixed into vLLM's scheduler: hooks on leaving, and shards that no queue knows of."""

    # The rank's scheduler has preempted a request, or freed a finished one, of this id.
    on_preempt: Callable[[str], None]
    on_free: Callable[[str], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Requests that came with tokens made elsewhere and that the model runner has not met; those that it meets with
        # this step's output: their tokens so far, by id.
        self._strangers: set[str] = set()
        self.introduced: dict[str, list[int]] = {}
        # With one rank vLLM 0.33 would hold prompts back itself, beside ``PrefillCadence``.
        self.local_prefill_interval = 1

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.refresh()
        self.reserve_adapters()
        self.choose_victims()
        self.share_step()
        idle = not (self.running or self._coming or self._leaving)
        output = super().schedule(*args, **kwargs)
        self.end_step(output, *args, **kwargs)
        if idle and not self.running and not self.held_back:
            self.give_way_if_stuck()
        for request_id in self.to_share.keys() & output.num_scheduled_tokens.keys():
            del self.to_share[request_id]
        self.refresh()
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
        self.on_preempt(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        self._strangers.discard(request.request_id)
        self.to_share.pop(request.request_id, None)
        self.forget_taken(request.request_id)
        self._left(request)
        self.refresh()
        self.on_free(request.request_id)
        return result

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        self.refresh()
        return outputs

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        self.refresh()

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self.refresh()
        return super().reset_prefix_cache(*args, **kwargs)

    def end(self, request_ids: Iterable[str], status: RequestStatus) -> None:
        """Finish requests that this rank knows, if they have not ended."""
        self.finish_requests(request_ids, status)
        self.refresh()

    # -- shards ------------------------------------------------------------------------------------------------

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
        self.refresh()
        return len(blocks)

    def allocate(self, member_id: str, num_blocks: int) -> None:
        """Complete a shard that ``adopt_cached`` began, to so many blocks.

        Raises:
            ValueError: the rank has not enough free blocks. Placement has counted them, so this is a bug.
        """
        num_tokens = num_blocks * self._manager.block_size
        self._manager.allocate_new_blocks(member_id, num_tokens, num_tokens)
        self.refresh()

    def unfold(self, member_id: str, first_block: int) -> None:
        """Before its member computes: let vLLM's null block stand for each block before a shard's first."""
        manager = self._manager
        blocks = manager.req_to_blocks[member_id]
        manager.req_to_blocks[member_id] = [self.block_pool.null_block] * first_block + blocks
        manager.num_cached_block[member_id] += first_block

    def _fold(self, member_id: str, first_block: int) -> None:
        """Only the shard's own blocks are kept: a long request has as many members as chunks."""
        del self._manager.req_to_blocks[member_id][:first_block]

    def record_prefix_hits(self, num_tokens: int, num_hits: int, preempted: bool) -> None:
        """Count a prefix-cache lookup in this rank's statistics, as vLLM's scheduler does for its own."""
        manager = self.kv_cache_manager
        if manager.log_stats and manager.enable_caching:
            assert manager.prefix_cache_stats is not None
            manager.prefix_cache_stats.record(num_tokens=num_tokens, num_hits=num_hits, preempted=preempted)

    def note_finished(self, request_id: str, client_index: int) -> None:
        """Tell front-ends that track requests by id of one that ended before this scheduler knew it by its id."""
        if self.finished_req_ids_dict is not None:
            self.finished_req_ids_dict[client_index].add(request_id)

    def shard_blocks(self, member_id: str) -> list[int]:
        """Block ids of a shard whose member does not compute, in order."""
        return [block.block_id for block in self._manager.req_to_blocks[member_id]]

    def close_shard(self, member_id: str) -> None:
        """Give a shard's blocks back. The member must not be in the scheduler's queues."""
        self.kv_cache_manager.coordinator.free(member_id)
        if member_id in self.requests:
            self.requests[member_id].num_computed_tokens = 0
        self.refresh()

    # -- members -----------------------------------------------------------------------------------------------

    def enter(self, request: Request, to_share: int = 0, taken: int = 0) -> None:
        """Let a request wait here: a new one, a member with its shard open, or one that was preempted here.

        Args:
            request: waits nowhere.
            to_share: blocks that others hold and that it will share when it is scheduled.
            taken: tokens of it to take as computed, once its blocks are free.
        """
        request_id = request.request_id
        self.take_as_computed(request, taken)
        if to_share:
            self.to_share[request_id] = to_share
        events = len(request.events)
        if request_id in self.requests:
            self._enqueue_waiting_request(request)
        else:
            chunks = request.streaming_queue
            self.add_request(request)
            request.streaming_queue = chunks
        # The request was queued when it came, not when it entered a rank.
        del request.events[events:]
        if self._view is not None:
            held = len(self.held_blocks.get(request_id, ()))
            self._view.note_entered(request, held, to_share, self._manager.block_size, taken)
            self.on_change()

    def add_chunk(self, chunk: Request) -> None:
        """The next chunk of a session that is here, or the end of its input."""
        self.add_request(chunk)
        self.refresh()

    def requeue(self, request_id: str) -> None:
        """Let a session that was preempted and has made its tokens wait here again."""
        self._enqueue_waiting_request(self.requests[request_id])
        self.refresh()

    def leave(self, request_id: str) -> None:
        """Schedule a running request no more; what it has in flight still comes to it."""
        request = self.requests[request_id]
        self.running.remove(request)
        self._leaving[request_id] = request
        self.max_num_active_reqs -= 1
        self.refresh()

    def _left(self, request: Request) -> None:
        if self._leaving.pop(request.request_id, None) is not None:
            self.max_num_active_reqs += 1

    def stay(self, request_id: str) -> None:
        """Take back one that was about to leave."""
        self._left(request := self.requests[request_id])
        self.drop_drafts(request)
        self.running.append(request)
        self.refresh()

    def expect(self, request_id: str, adapter: int | None) -> None:
        """Keep a slot of the model runner, one for its adapter, and a block, for a request that is on its way here.

        The block is taken now: who runs or waits here would else have it before the request comes, which then finds
        none and cannot leave again.
        """
        self._coming[request_id] = adapter
        self.max_num_active_reqs -= 1
        self.adopt_cached(request_id, [])
        self.allocate(request_id, 1)

    def expect_no_more(self, request_id: str) -> None:
        self._has_come(request_id)
        self.close_shard(request_id)

    def _has_come(self, request_id: str) -> None:
        del self._coming[request_id]
        self.max_num_active_reqs += 1

    def hand_over(self, request_id: str, keeper_id: str, first_block: int) -> None:
        """Let a keeper have the shard of a request that has left; the model runner forgets the request."""
        request, manager = self.requests[request_id], self._manager
        self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
        manager.req_to_blocks[keeper_id] = manager.req_to_blocks.pop(request_id)
        manager.num_cached_block[keeper_id] = manager.num_cached_block.pop(request_id, 0)
        self._fold(keeper_id, first_block)
        self.give_up_rest(request, keeper_id, first_block)
        self._strangers.discard(request_id)
        self._left(request)
        self._forget(request)

    def arrive(self, request: Request, first_block: int, outlet: int) -> None:
        """Go on with a request that has computed all before ``first_block`` elsewhere; before all others, for it has
        waited for a step.

        Args:
            request: runs nowhere, and has nothing in flight.
            first_block: of those that it takes here.
            outlet: the rank by which its output leaves, where ranks send it themselves.
        """
        self._has_come(request.request_id)
        self.unfold(request.request_id, first_block)
        self.requests[request.request_id] = request
        self._strangers.add(request.request_id)
        self.drop_drafts(request)
        self.running.insert(0, request)
        self.refresh()

    def park(self, member_id: str, first_block: int) -> None:
        """Take a member out of the scheduler and of the model runner; its shard stays."""
        member = self.requests[member_id]
        self._fold(member_id, first_block)
        self.running.remove(member)
        self._forget(member)

    def withdraw(self, member_id: str) -> list[Any]:
        """Take a member that waits (after a preemption, or not yet started) out; its shard stays, if any.

        Returns:
            Events that the caller's copy of it lacks.
        """
        self.take_from_queues(member_id)
        self._forget(self.requests[member_id])
        return []

    def take_from_queues(self, request_id: str) -> None:
        """Out of the waiting queues; the scheduler and the model runner still know the request."""
        request = self.requests[request_id]
        self.waiting.remove_requests([request])
        self.kv_holding_waiting.remove_requests([request])
        self.deferred_waiting.discard(request)
        self.to_share.pop(request_id, None)
        self.forget_taken(request_id)
        self.refresh()

    def _forget(self, member: Request) -> None:
        self._inflight_prefills.discard(member)
        del self.requests[member.request_id]
        self.finished_req_ids.add(member.request_id)
        self.refresh()

    def preempt_running(self) -> None:
        """Preempt all; their output in flight is dropped, since they may resume in the same step."""
        now = time.monotonic()
        while self.running:
            self._preempt_request(self.running.pop(), now, drop_stale_output=True)
        self.prev_step_scheduled_req_ids.clear()
        self.refresh()

    def note_backlog(self, backlog: bool) -> None:
        """Requests wait for a placement: then no prompts are deferred, so that no slot stays empty."""
        self.prefill_capacity_bound |= backlog
        self.refresh()

    # A request's state is its own where the scheduler is of the same process.

    def watch(self, request: Request) -> None:
        """Keep the caller's copy of a request that is here up to date."""

    def unwatch(self, request_id: str) -> None:
        """The copy is not looked at any more."""

    def wait(self) -> None:
        """Nothing runs by itself."""

    # -- a step, in two halves, as ranks elsewhere do it ---------------------------------------------------------

    def begin_schedule(self, throttle_prefills: bool, allowed: Allowed) -> None:
        self._throttle = throttle_prefills
        self.allow(allowed)

    def end_schedule(self) -> Part:
        return self.part_of(self.schedule(self._throttle))

    def begin_update(self, part: Part, output: Any) -> None:
        self._update = part, output

    def end_update(self) -> Updated:
        part, output = self._update
        del self._update
        updated = take_stats(self.update_from_output(part.payload, output))
        return updated._replace(sharded=self.take_sharded()) if self.speculates else updated

    def begin_bitmask(self, part: Part) -> None:
        self._bitmask_of = part.payload

    def end_bitmask(self) -> Any:
        """The part's bitmask, or None. A copy: ranks may share the manager, which fills one buffer for all."""
        assert not isinstance(self._bitmask_of, bytes)
        bitmask = self.get_grammar_bitmask(self._bitmask_of)
        del self._bitmask_of
        if bitmask is not None:
            bitmask.grammar_bitmask = bitmask.grammar_bitmask.copy()
        return bitmask


class RankScheduler(RankDoors, Scheduler):
    """A rank's scheduler without async scheduling."""


class AsyncRankScheduler(RankDoors, AsyncScheduler):
    """A rank's scheduler with async scheduling."""
