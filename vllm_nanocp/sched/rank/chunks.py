# SPDX-License-Identifier: Apache-2.0
"""Short prompts beside long ones: a part of a rank's step is theirs while they wait.

vLLM's scheduler gives the tokens of a step to those that run, in their order, and then to those that wait. So a long
prompt takes whole steps, and a short one that comes behind it gets its first token when all of that is computed. Here
the chunk of a long one is made smaller in steps in which there are short ones, by what these need, at most a part of
the step. When there are none nothing changes. Touches vLLM 0.32's ``long_prefill_token_threshold``, which its scheduler
reads in each step, and ``Scheduler._inflight_prefills``.

And the blocks that a prompt has yet to take are its own. vLLM's scheduler lets a request start if all of it fits into
what is free, whatever prompts that run have yet to take of that, and preempts when they do. Touches
``KVCacheManager.watermark_blocks``, which it keeps free of requests that wait.
"""

from __future__ import annotations

import os
from copy import copy
from itertools import islice
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from ...placement import cdiv
from ...placement.chunk_shares import PARTS, chunk_shares
from .allowance import AllowanceDoors

# Waiting requests that are looked at in a step.
_LOOKED_AT = 16


def _left(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


class ChunkDoors(AllowanceDoors):
    """Mixed into vLLM's scheduler: the size of chunks."""

    # Whether a member of a sharded request needs its whole chunk in a step, since others go on from there in the same.
    whole_chunks = False
    # Of prompts that get less than all: tokens, by id.
    shares: dict[str, int] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler_config = copy(self.scheduler_config)
        self._share = self.max_num_scheduled_tokens // PARTS
        # Whoever has set a size means it.
        self._shares_steps = not self.scheduler_config.long_prefill_token_threshold and self._share > 0
        self._shares_steps &= not self.need_mamba_block_aligned_split
        self._watermark = self.kv_cache_manager.watermark_blocks
        # Whoever lets prompts start of which only a part fits wants no block kept. By priority, a prompt that runs may
        # be the less important one: then it is preempted, as in vLLM.
        self._keeps_blocks = self.scheduler_reserve_full_isl and self.policy != SchedulingPolicy.PRIORITY

    @property
    def spare_blocks(self) -> int:
        """Free blocks that nobody who runs needs for the tokens it has; ``ViewDoors`` knows."""
        raise NotImplementedError

    def share_step(self) -> None:
        """Before a step: how large a chunk of a prompt may be in it."""
        if not self._shares_steps:
            return
        self.short_part, self.shares = 0.0, {}
        if not (self._inflight_prefills or self.kv_holding_waiting):
            return
        share = self._share
        prompts = [*self._inflight_prefills, *islice(self.kv_holding_waiting, _LOOKED_AT)]
        long = [request for request in prompts if _left(request) > share]
        if not long:
            return
        others = (len(self.running) - len(self._inflight_prefills)) * (1 + self.num_spec_tokens)
        budget = self.max_num_scheduled_tokens - others
        most = share
        if self.whole_chunks and any(map(self._is_part, long)):
            stripe = int(os.environ.get("CTL_STRIPE", "6144"))
            most = max(0, min(share, budget - stripe))
        short = sum(_left(request) for request in prompts if _left(request) <= share)
        kept = self._bring_forward(most - short) if most > short else 0
        if kept or short:
            self.short_part = 1 / PARTS
        prompts.sort(key=self._turn)
        shares = chunk_shares(list(map(_left, prompts)), budget, kept, most - kept)
        self.shares = {r.request_id: n for r, n in zip(prompts, shares, strict=True) if n < min(_left(r), budget)}
        if len(self.kv_holding_waiting) > 1:
            held = sorted(self.kv_holding_waiting, key=self._turn)
            self.kv_holding_waiting.remove_requests(held)
            for request in reversed(held):
                self.kv_holding_waiting.prepend_request(request)

    def _turn(self, request: Request) -> tuple[int, float]:
        return (request.priority if self.policy == SchedulingPolicy.PRIORITY else 0), request.arrival_time

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return self.shares.get(request.request_id) != 0 and super()._handle_blocked_waiting_request(request)

    def is_long(self, request: Request) -> bool:
        """Whether a prompt leaves a part of a step to short ones."""
        return _left(request) > self._share

    @property
    def kept_blocks(self) -> int:
        """Free blocks that are not for requests that wait."""
        kept = self._watermark if self.running else 0
        if self._keeps_blocks and self._inflight_prefills:
            kept += self._inflight_prefill_reserved_blocks()
        return kept

    def cut_chunk(self, request: Request, computed: int, most: int) -> int:
        """vLLM's scheduler asks this right before it takes blocks for a request. To one that waits are given none of
        those that prompts have yet to take, of which all that run have had theirs for this step."""
        starts = request.status != RequestStatus.RUNNING and not self._holds_kv_blocks(request)
        if starts and self._keeps_blocks and self._inflight_prefills:
            self.kv_cache_manager.watermark_blocks = self._watermark + self._inflight_prefill_reserved_blocks()
        return super().cut_chunk(request, computed, min(most, self.shares.get(request.request_id, most)))

    def keep_no_more(self) -> None:
        """After the step: elsewhere these blocks are counted as taken (``RankView.to_take``)."""
        self.kv_cache_manager.watermark_blocks = self._watermark

    def _bring_forward(self, most: int) -> int:
        """Put waiting requests that are short before those that are not, up to so many tokens; returns how many.

        With priorities only the first ones count, in the order that they have.
        """
        if not self.waiting or self._pause_state != PauseState.UNPAUSED:
            return 0
        brought: list[Request] = []
        tokens = 0
        slots = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        room = self.spare_blocks * self.block_size  # what long ones have yet to take is theirs
        for request in islice(self.waiting, _LOOKED_AT):
            left = _left(request)
            ready = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and len(brought) < slots
            if ready and left <= most - tokens and request.num_tokens < room:
                brought.append(request)
                tokens += left
                room -= cdiv(request.num_tokens + 1, self.block_size) * self.block_size
            elif self.policy == SchedulingPolicy.PRIORITY:  # which no one overtakes
                return tokens
        if brought and list(islice(self.waiting, len(brought))) != brought:
            for request in brought:
                self.waiting.remove_request(request)
            for request in reversed(brought):
                self.waiting.prepend_request(request)
        return tokens

    def _is_part(self, request: Request) -> bool:
        """Whether a request computes only a part of a sharded one."""
        blocks = self.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks.get(request.request_id)
        return "#" in request.request_id or bool(blocks and blocks[0].is_null)
