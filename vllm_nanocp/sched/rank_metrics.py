# SPDX-License-Identifier: Apache-2.0
"""How the ranks stand, for the front-ends' metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from ..metrics.collector import RankState
from ..metrics.transport import attach
from ..placement.cost import Coefficients
from .rank.stats import PlainStats, merge_scheduler_stats

if TYPE_CHECKING:
    from .state import SchedulerState

_COEFFICIENTS = [field.name for field in fields(Coefficients)]


def rank_states(scheduler: SchedulerState) -> list[RankState]:
    """One a rank, as of the last step."""
    shards = scheduler.members.shards_by_rank()
    views = [rank.view for rank in scheduler.ranks]
    return [
        RankState(view.kv_usage, view.running, view.queued, work.guests, held)
        for view, work, held in zip(views, scheduler.mover.last_work, shards, strict=True)
    ]


def learnt(scheduler: SchedulerState) -> dict[str, float] | None:
    """The cost model's coefficients, by name; None without one."""
    if not scheduler.mover.moves:
        return None
    coefficients = scheduler.mover.model.coefficients()
    return {name: getattr(coefficients, name) for name in _COEFFICIENTS}


def engine_stats(scheduler: SchedulerState, parts: Sequence[SchedulerStats | PlainStats]) -> SchedulerStats:
    """One engine's statistics, with this package's own.

    Args:
        scheduler: over all ranks.
        parts: the ranks' statistics; not empty.
    """
    stats = merge_scheduler_stats(parts, len(scheduler.unplaced))
    stats.num_running_reqs += len(scheduler.mover.leaving)
    attach(stats, scheduler.collector.snapshot(rank_states(scheduler), learnt(scheduler)))
    return stats


class Readers:
    """Which front-end is told how the ranks stand: one that gets output of the step, as in vLLM; and where no step will
    follow, all that have been told before.

    All front-ends set the same gauges, and what was set last is shown. One that reads its messages late would set them
    to how a step in the middle of the work was, after another one had set them to the end, and be believed until the
    next request. (vLLM's next to last step says what its last one does, so it shows this more rarely; but shards on
    other ranks are freed after these have counted their blocks, so here the last step alone is right.)

    Args:
        scheduler: over all ranks.
    """

    def __init__(self, scheduler: SchedulerState) -> None:
        self._scheduler = scheduler
        # Clients that have been told of a step.
        self._told: set[int] = set()

    def tell(
        self, parts: Sequence[SchedulerStats | PlainStats], outputs: dict[int, EngineCoreOutputs], client: int
    ) -> None:
        """Put statistics to a step's outputs.

        Args:
            parts: the ranks'; not empty.
            outputs: by client, complete.
            client: who gets them if nobody gets output.
        """
        # EngineCore, too, looks for them in the first output.
        client = next(iter(outputs), client)
        stats = engine_stats(self._scheduler, parts)
        outputs.setdefault(client, EngineCoreOutputs()).scheduler_stats = stats
        self._told.add(client)
        if self._scheduler.has_requests():
            return
        others = self._told - {client}
        uncounted = self._uncounted(stats) if others else None
        for other in others:
            outputs.setdefault(other, EngineCoreOutputs()).scheduler_stats = uncounted

    def _uncounted(self, stats: SchedulerStats) -> SchedulerStats:
        """How the ranks stand, without what has been counted in the step: that is told once."""
        copy = SchedulerStats(
            num_running_reqs=stats.num_running_reqs,
            num_waiting_reqs=stats.num_waiting_reqs,
            num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
            kv_cache_usage=stats.kv_cache_usage,
        )
        attach(copy, self._scheduler.collector.snapshot(rank_states(self._scheduler), learnt(self._scheduler)))
        return copy
