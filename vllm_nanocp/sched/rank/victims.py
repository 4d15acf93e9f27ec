# SPDX-License-Identifier: Apache-2.0
"""Whom a rank's scheduler preempts: policy is ``placement.victims``.

Without priorities vLLM's scheduler preempts the last of ``Scheduler.running``. So before a step in which a block may be
missing, those that are to be preempted are put there. With priorities it preempts the least important, as in vLLM.

With priorities it preempts also those that have their tokens of the step already. Blocks that were to be full with
these are in the prefix cache by then, and who finds them there, the preempted request itself first, would read what
nobody has computed (so in vLLM 0.32 and 0.33: its pull request 43569, its issue 57580). They are taken out of it.
This can go when vLLM does so itself.
Touches vLLM 0.32's ``Scheduler.running`` and ``Scheduler._preempt_request``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from ...placement.victims import Victim, victims
from .view_doors import BlockNumbers

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class VictimDoors(BlockNumbers, _Base):
    """Mixed into vLLM's scheduler: the order in which requests that run are preempted."""

    def choose_victims(self) -> None:
        """Before a step: put the cheapest to compute again behind all others."""
        running = self.running
        if len(running) < 2 or self.policy == SchedulingPolicy.PRIORITY:
            return
        # A step takes no more than this.
        if self.num_free_blocks > len(running) + self.max_num_scheduled_tokens // self.block_size:
            return
        short = -self.spare_blocks
        if short <= 0:
            return
        oldest = min(running, key=lambda request: (request.arrival_time, request.request_id))
        others = [request for request in running if request is not oldest]
        chosen = victims([self._victim(request) for request in others], short)
        if chosen:
            last = [others[i] for i in reversed(chosen)]
            names = {request.request_id for request in last}
            # The oldest first: if it was preempted, it has come back behind others.
            self.running = [oldest, *(request for request in others if request.request_id not in names), *last]

    def _victim(self, request: Request) -> Victim:
        held = self.held_blocks.get(request.request_id, ())
        if held and held[0].is_null:  # null blocks come before all others
            held = [block for block in held if not block.is_null]
        frees = [block.ref_cnt for block in held].count(1)
        return Victim(request.num_computed_tokens, frees, request.num_preemptions)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        uncomputed = set()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            # What is in flight is computed before anybody reads it.
            blocks = manager.req_to_blocks.get(request.request_id, ())
            behind = blocks[request.num_computed_tokens // manager.block_size :]
            uncomputed |= {block.block_id for block in behind if block.block_hash is not None}
        if uncomputed:
            self.kv_cache_manager.evict_blocks(uncomputed)
        super()._preempt_request(request, *args, **kwargs)
