# SPDX-License-Identifier: Apache-2.0
"""Prompts beside each other: how much of a rank's step each one gets (``placement.chunk_shares``).

vLLM's scheduler gives the tokens of a step to those that run, in their order, and then to those that wait. So a long
prompt takes whole steps, and a short one that comes behind it gets its first token when all of that is computed; and a
member of a sharded request, which comes to its rank anew with each of its runs, would wait each time until all that
run there are computed. Here those that run are cut where others are to have their turn in the same step. Where there
is one prompt nothing changes. Touches vLLM 0.32's ``long_prefill_token_threshold`` (who has set it means it),
``Scheduler._inflight_prefills``, and what ``AllowanceDoors`` touches.

And the blocks that a prompt has yet to take are its own. vLLM's scheduler lets a request start if all of it fits into
what is free, whatever prompts that run have yet to take of that, and preempts when they do. Touches
``KVCacheManager.watermark_blocks``, which it keeps free of requests that wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import islice
from typing import Any

from vllm.config import SchedulerConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from ...placement import cdiv
from ...placement.chunk_shares import PARTS, Prompt, chunk_shares
from ...placement.place import stripe_blocks as stripe_blocks_of
from ...placement.prefill_steps import Allowance
from ...plan import is_keeper
from .allowance import AllowanceDoors
from .view_doors import BlockNumbers

# Waiting requests that are looked at in a step.
_LOOKED_AT = 16


def _left(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


def _is_ready(request: Request) -> bool:
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def stripe_blocks(config: SchedulerConfig, block_size: int, chunk_tokens: int | None, queries: int = 1) -> int:
    """Blocks of a prompt that a rank computes in one step, while the other ranks compute theirs, beside as many
    decoding requests as there may be.

    Args:
        config: vLLM's.
        block_size: tokens a block holds.
        chunk_tokens: most tokens of a chunk, if set.
        queries: of a decoding request: one, and its drafts.
    """
    most, slots, threshold = config.max_num_batched_tokens, config.max_num_seqs, config.long_prefill_token_threshold
    return stripe_blocks_of(most, slots * queries, threshold, block_size, chunk_tokens)


class ChunkDoors(BlockNumbers, AllowanceDoors):
    """Mixed into vLLM's scheduler: the size of chunks."""

    # Tokens of a member of a sharded request that it needs in one step, since others go on from there in the same.
    whole_chunk = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler_config = copy(self.scheduler_config)
        self._share = self.max_num_scheduled_tokens // PARTS
        self._shares_steps = not self.scheduler_config.long_prefill_token_threshold and self._share > 0
        # Whoever lets no prompt be computed in parts means that, too.
        self._shares_steps &= not self.need_mamba_block_aligned_split and self.scheduler_config.enable_chunked_prefill
        # Prompts that the step at hand is shared among; and whether none of them got anything of the last one.
        self._sharing: list[str] = []
        self._lost = False
        self._watermark = self.kv_cache_manager.watermark_blocks
        # Whoever lets prompts start of which only a part fits wants no block kept. By priority, a prompt that runs may
        # be the less important one: then it is preempted, as in vLLM.
        self._keeps_blocks = self.scheduler_reserve_full_isl and self.policy != SchedulingPolicy.PRIORITY

    def has_adapter_slot(self, request: Request) -> bool:
        """``AdapterDoors`` knows."""
        raise NotImplementedError

    def share_step(self) -> None:
        """Before a step: what each prompt gets of it."""
        if not self._shares_steps:
            return
        self.short_part, self.shares, self._sharing = 0.0, {}, []
        self.scheduler_config.long_prefill_token_threshold = 0
        if self._allowance is not None:
            self._leave_a_part(self._allowance)
            return
        if self._lost:  # what they were to have went to one that cannot go on, for a reason not known here
            self._lost = False
            return
        going_on = self._going_on()
        begun = sorted([*self._inflight_prefills, *going_on], key=self._turn)
        if not begun:
            return
        waiting = self._startable(self._slots - len(going_on))
        if len(begun) + len(waiting) == 1 and not self._before_decodes(begun[0]):
            return
        budget, part = self._budget(begun)
        prompts = [self._prompt(request, begun=True) for request in begun]
        prompts += [self._prompt(request, begun=False) for request in waiting]
        shares = chunk_shares(prompts, budget, part)
        for request, prompt, share in zip(begun, prompts, shares, strict=False):
            if share < min(prompt.left, self.max_num_scheduled_tokens):
                self.shares[request.request_id] = share
        self._bring_forward(self.waiting, [one for one, n in zip(waiting, shares[len(begun) :], strict=True) if n])
        self._bring_forward(self.kv_holding_waiting, going_on)
        self._sharing = [request.request_id for request in begun]

    def _leave_a_part(self, allowance: Allowance) -> None:
        """In steps of which only so much is for prompts, long ones leave a part to those that need no more than a part
        of a whole step, and all get the same of the rest."""
        if not self._inflight_prefills:
            return
        share = self._share
        rest = self.max_num_scheduled_tokens - self._decode_tokens()  # some that decode may run behind prompts
        allowance.tokens = min(allowance.tokens, max(rest, share))
        prompts = [*self._inflight_prefills, *islice(self.kv_holding_waiting, _LOOKED_AT)]
        long = [request for request in prompts if _left(request) > share]
        if not long or (self.whole_chunk and any(map(self._is_part, long))):
            return
        short = sum(_left(request) for request in prompts if _left(request) <= share)
        waiting = self._fitting(share - short, self._slots)
        self._bring_forward(self.waiting, waiting)
        kept = min(share, short + sum(map(_left, waiting)))
        if kept:
            self.short_part = 1 / PARTS
            if rest > kept:  # it bounds short ones, too
                self.scheduler_config.long_prefill_token_threshold = max((rest - kept) // len(long), kept)

    def _before_decodes(self, prompt: Request) -> bool:
        """Whether requests that decode run behind the only prompt: short ones that had a part of a step beside it. With
        all that is left it would keep them from their next tokens until it is computed."""
        return self.running[-1:] != [prompt]

    def _decode_tokens(self) -> int:
        """Tokens of the step that are no prompts'."""
        return max(0, len(self.running) - len(self._inflight_prefills)) * (1 + self.num_spec_tokens)

    def _budget(self, begun: Sequence[Request]) -> tuple[int, int]:
        """Tokens of the step for prompts, and of these for the shortest."""
        budget = self.max_num_scheduled_tokens - self._decode_tokens()
        part = min(self._share, max(0, budget) // 2)  # where decodes leave little, the first has half of that
        if self.whole_chunk:
            # Where whole chunks of several would fit and leave next to nothing, only the first has its own for certain.
            rest, least, half = budget, 0, part // 2
            for request in begun:
                if rest - self.whole_chunk >= least and self._is_part(request):
                    part, least = min(part, rest - self.whole_chunk), half
                rest -= _left(request)
        return budget, part

    def _turn(self, request: Request) -> tuple[int, float, str]:
        """Whoever has less comes first; members have what their request has."""
        priority = request.priority if self.policy == SchedulingPolicy.PRIORITY else 0
        return priority, request.arrival_time, request.request_id

    def _prompt(self, request: Request, begun: bool) -> Prompt:
        return Prompt(_left(request), begun, is_keeper(request.request_id), self._turn(request)[0])

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
        share = self.shares.get(request.request_id, most)
        if share and request.has_encoder_inputs:  # chosen for this chunk, which may not end within one of them
            share = most
        return super().cut_chunk(request, computed, min(most, share))

    def end_step(self, output: SchedulerOutput, throttle_prefills: bool = False) -> None:
        """After the step: elsewhere kept blocks are counted as taken (``RankView.to_take``)."""
        self.kv_cache_manager.watermark_blocks = self._watermark
        nothing = output.num_scheduled_tokens.keys().isdisjoint(self._sharing)
        self._lost = nothing and bool(self.shares) and not throttle_prefills

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Also asked of each that waits: one that gets nothing is passed over in this step."""
        return self.shares.get(request.request_id) != 0 and super()._handle_blocked_waiting_request(request)

    @property
    def _slots(self) -> int:
        """How many more may run."""
        return self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input

    def _going_on(self) -> list[Request]:
        """Requests that wait with blocks and can go on: what one gets that cannot is lost to those that run."""
        free = self.num_free_blocks - (self._watermark if self.running else 0)
        found = []
        for request in islice(self.kv_holding_waiting, _LOOKED_AT):
            needed = cdiv(request.num_tokens, self.block_size) - len(self.held_blocks.get(request.request_id, ()))
            if _is_ready(request) and self.has_adapter_slot(request) and needed <= free:
                found.append(request)
        return sorted(found, key=self._turn)[: max(0, self._slots)]

    def _startable(self, slots: int) -> list[Request]:
        """Waiting requests that have a slot and room, the shortest first. With priorities the first ones only that are
        short: none overtakes another."""
        if self.policy == SchedulingPolicy.PRIORITY:
            return self._fitting(self._share, slots)
        return self._fitting(0, slots, key=_left)

    def _fitting(self, most: int, slots: int, key: Callable[[Request], int] | None = None) -> list[Request]:
        """Waiting requests that have a slot and room, up to so many tokens in their order; with ``key`` any number in
        another. With priorities only the first ones count, in the order that they have."""
        if not self.waiting or self._pause_state != PauseState.UNPAUSED:
            return []
        found: list[Request] = []
        tokens = 0
        room = self.spare_blocks * self.block_size  # what long ones have yet to take is theirs
        first = list(islice(self.waiting, _LOOKED_AT))
        for request in first if key is None else sorted(first, key=key):
            left = _left(request)
            fits = key is not None or left <= most - tokens
            ready = _is_ready(request) and self.has_adapter_slot(request)
            if ready and len(found) < slots and fits and request.num_tokens < room:
                found.append(request)
                tokens += left
                room -= cdiv(request.num_tokens + 1, self.block_size) * self.block_size
            elif self.policy == SchedulingPolicy.PRIORITY:  # which no one overtakes
                break
        return found

    def _bring_forward(self, queue: RequestQueue, first: list[Request]) -> None:
        """Let these, of a queue, be its first ones. A queue by priority has them in that order."""
        if not first or self.policy == SchedulingPolicy.PRIORITY or list(islice(queue, len(first))) == first:
            return
        for request in first:
            queue.remove_request(request)
        for request in reversed(first):
            queue.prepend_request(request)

    def _is_part(self, request: Request) -> bool:
        """Whether a request computes only a part of a sharded one."""
        blocks = self.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks.get(request.request_id)
        return is_keeper(request.request_id) or bool(blocks and blocks[0].is_null)
