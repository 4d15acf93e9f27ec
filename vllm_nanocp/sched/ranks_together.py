# SPDX-License-Identifier: Apache-2.0
"""What EngineCore asks of a scheduler and all ranks answer together, without a decision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from ..step_messages import NanoCPGrammarOutput
from .rank import rank_process
from .step_output import NanoCPSchedulerOutput

if TYPE_CHECKING:
    from .failures import Failures
    from .rank.interface import Allowed, Rank
    from .shard_lifecycle import Members
    from .state import Moves


class RanksTogether(SchedulerInterface):
    """Of vLLM's scheduler interface, what only sums up or passes on. ``NanoCPScheduler`` has the attributes."""

    ranks: list[Rank]
    requests: dict[str, Request]
    unplaced: dict[str, Request]
    members: Members
    mover: Moves
    failures: Failures
    kv_cache_config: KVCacheConfig
    _pause_state: PauseState
    # Whether a request that waited to be placed has been ended since the last step: as in vLLM, a step follows by which
    # the metrics tell so.
    _unplaced_ended = False
    # What may be computed of prompts in the step at hand.
    _allowed: Allowed = None

    def begin_schedule(self, ranks: Iterable[int], throttle_prefills: bool) -> None:
        for rank in ranks:
            self.ranks[rank].begin_schedule(throttle_prefills, self._allowed)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> NanoCPGrammarOutput | None:  # type: ignore[override]
        assert isinstance(scheduler_output, NanoCPSchedulerOutput)
        if not scheduler_output.has_structured_output_requests:
            return None
        pairs = list(zip(self.ranks, scheduler_output.parts, strict=True))
        for rank, part in pairs:
            if part.structured:
                rank.begin_bitmask(part)
        bitmasks = [rank.end_bitmask() if part.structured else None for rank, part in pairs]
        return NanoCPGrammarOutput(bitmasks) if any(b is not None for b in bitmasks) else None

    def update_draft_token_ids(self, draft_token_ids: Sequence[DraftTokenIds | None]) -> None:  # type: ignore[override]
        """Drafts for the next step.

        Args:
            draft_token_ids: what the workers of each rank have drafted; None of one that had no tokens.
        """
        for rank, drafts in zip(self.ranks, draft_token_ids, strict=True):
            if drafts is not None:
                rank.update_draft_token_ids(drafts)

    def update_draft_token_ids_in_output(  # type: ignore[override]
        self, draft_token_ids: Sequence[DraftTokenIds | None], scheduler_output: SchedulerOutput
    ) -> None:
        """What the drafts of a step are that has been scheduled without, so that grammars can judge them.

        Args:
            draft_token_ids: see ``update_draft_token_ids``.
            scheduler_output: of this class's ``schedule``; its bitmask has not been asked for.
        """
        assert isinstance(scheduler_output, NanoCPSchedulerOutput)
        for rank, part, drafts in zip(self.ranks, scheduler_output.parts, draft_token_ids, strict=True):
            if drafts is not None and part.structured:
                rank.tell_drafts(part, drafts)

    def has_request(self, request_id: str) -> bool:
        """Whether a request, or an open session, is here: queued for all ranks, at one, sharded or on its way."""
        return request_id in self.requests

    def get_num_unfinished_requests(self) -> int:
        waiting = len(self.unplaced) if self._pause_state == PauseState.UNPAUSED else 0
        if self._pause_state != PauseState.PAUSED_ALL:
            waiting += len(self.mover.leaving)
        return waiting + sum(rank.view.unfinished for rank in self.ranks)

    def has_finished_requests(self) -> bool:
        news = self.members.have_news or self.failures.pending or self._unplaced_ended
        return news or any(rank.view.finished for rank in self.ranks)

    def get_request_counts(self) -> tuple[int, int]:
        views = [rank.view for rank in self.ranks]
        running, queued = sum(view.running for view in views), sum(view.queued for view in views)
        return running + len(self.mover.leaving), queued + len(self.unplaced)

    def get_kv_cache_usage(self) -> float:
        return sum(rank.view.kv_usage for rank in self.ranks) / len(self.ranks)

    def free_blocks(self) -> list[int]:
        """Free KV blocks of each rank, now."""
        for rank in self.ranks:
            rank.refresh()
        return [rank.view.free_blocks for rank in self.ranks]

    def reset_encoder_cache(self) -> None:
        for rank in self.ranks:
            rank.reset_encoder_cache()

    def shutdown(self) -> None:
        for rank in self.ranks:
            rank.shutdown()
        rank_process.reap()

    def get_kv_event_publisher_config(self) -> Any:
        return self.ranks[0].get_kv_event_publisher_config()

    def kv_event_publisher_configs(self) -> list[Any]:
        """Where each rank publishes its KV events; None for those that do not."""
        return [rank.get_kv_event_publisher_config() for rank in self.ranks]

    @property
    def kv_cache_manager(self) -> Any:
        """What EngineCore reads of it: the layout of the KV cache groups, the same on all ranks."""
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        managers = [SimpleNamespace(block_size=spec.block_size, kv_cache_spec=spec) for spec in specs]
        return SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=managers))

    @property
    def pause_state(self) -> PauseState:
        return self._pause_state

    def set_pause_state(self, pause_state: PauseState) -> None:
        self._pause_state = pause_state
        for rank in self.ranks:
            rank.set_pause_state(pause_state)
