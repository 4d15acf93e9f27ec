# SPDX-License-Identifier: Apache-2.0
"""A rank's scheduler in numbers: taken when they are asked for, and kept until something changes.

Touches vLLM 0.32's ``Scheduler``, ``KVCacheManager``, its coordinator and block pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request

from .adapters import AdapterDoors
from .interface import do_nothing
from .rank_view import RankView
from .sessions import SessionDoors, is_idle

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class BlockNumbers:
    """Of ``ViewDoors``, what doors beside it ask of blocks."""

    @property
    def spare_blocks(self) -> int:
        """Free blocks that nobody who runs needs for the tokens it has."""
        raise NotImplementedError

    @property
    def num_free_blocks(self) -> int:
        raise NotImplementedError

    @property
    def held_blocks(self) -> Any:
        """The blocks of each request, by id."""
        raise NotImplementedError


class ViewDoors(SessionDoors, AdapterDoors):
    """Mixed into vLLM's scheduler: what is known of it between two steps."""

    # See ``TakenDoors``.
    to_take_as_computed: dict[str, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The numbers are others now, or may be.
        self.on_change: Callable[[], object] = do_nothing
        super().__init__(*args, **kwargs)
        # Blocks that requests which wait here without any will share with others, by id.
        self.to_share: dict[str, int] = {}
        self._view: RankView | None = None

    @property
    def view(self) -> RankView:
        """The rank in numbers; see ``RankView``."""
        if self._view is None:
            self._view = self.take_view()
        return self._view

    def refresh(self) -> None:
        """Take the numbers anew when they are asked for next."""
        self._view = None
        self.on_change()

    def take_view(self) -> RankView:
        """The numbers, taken anew. Walks over this rank's requests, each once."""
        held, block_size = self.held_blocks, self.block_size
        shared, taken = self.to_share, self.to_take_as_computed
        tokens = computed = left = to_take = 0
        only_chunks = True
        for request in self.running:
            have, done = len(request._all_token_ids), request.num_computed_tokens
            tokens += have
            computed += done
            left += have - done if have > done else 0
            needed = -(-max(have, done + 1) // block_size) - len(held[request.request_id])
            to_take += needed if needed > 0 else 0
            only_chunks &= request.is_prefill_chunk
        promised = 0
        prompts = sum(request.num_tokens - request.num_computed_tokens for request in self._inflight_prefills)
        for request in chain(self.waiting, self.kv_holding_waiting):
            have, done = len(request._all_token_ids), request.num_computed_tokens
            done = max(done, taken.get(request.request_id, 0))
            tokens += have
            left += max(0, have - done)
            prompts += have - done
            if not is_idle(request):
                request_id = request.request_id
                needed = -(-have // block_size) - len(held.get(request_id, ())) - shared.get(request_id, 0)
                promised += max(0, needed)
        tokens += sum(request.num_tokens for request in self.leaving_requests)
        running, queued = self.get_request_counts()
        sessions = self.num_waiting_for_streaming_input
        return RankView(
            total_blocks=self.num_blocks,
            free_blocks=self.num_free_blocks,
            to_take=to_take,
            promised=promised,
            watermark=self.kv_cache_manager.watermark_blocks,
            running=running,
            waiting=queued - sessions,
            idle_sessions=sessions,
            coming=self.num_coming,
            slots=self.max_num_active_reqs,
            tokens=tokens,
            to_compute=left - sum(shared.values()) * block_size,
            prompt_tokens=prompts - sum(shared.values()) * block_size,
            budget=self.max_num_scheduled_tokens,
            computed=computed,
            nobody_waits=all(map(is_idle, self.waiting)),
            busy=self.is_busy,
            only_chunks=only_chunks,
            capacity_bound=self.prefill_capacity_bound,
            queued=queued,
            unfinished=self.get_num_unfinished_requests(),
            finished=self.has_finished_requests(),
            kv_usage=self.get_kv_cache_usage(),
            adapters=self.adapters(),
            max_adapters=self.max_adapters,
        )

    # -- what there is ------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> Any:
        """The manager of the first KV cache group; where requests are sharded there is no other."""
        return self.kv_cache_manager.coordinator.single_type_managers[0]

    @property
    def block_pool(self) -> BlockPool:
        return self.kv_cache_manager.block_pool

    @property
    def held_blocks(self) -> Any:
        """The blocks of each request, by id."""
        return self._manager.req_to_blocks

    @property
    def num_blocks(self) -> int:
        """All blocks that requests can use: without the null block."""
        return self.block_pool.num_gpu_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.get_num_free_blocks()

    @property
    def spare_blocks(self) -> int:
        """See ``RankView``; without the rest of it, for doors ask this in the middle of a step."""
        held, block_size = self.held_blocks, self.block_size
        spare = self.num_free_blocks
        for request in self.running:
            tokens, done = len(request._all_token_ids), request.num_computed_tokens
            missing = (tokens if tokens > done else done + 1) - len(held[request.request_id]) * block_size
            if missing > 0:  # of most that decode nothing is
                spare -= -(-missing // block_size)
        return spare

    @property
    def leaving_requests(self) -> Iterable[Request]:
        return self._leaving.values()

    @property
    def num_coming(self) -> int:
        return len(self._coming)
