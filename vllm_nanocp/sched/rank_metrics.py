# SPDX-License-Identifier: Apache-2.0
"""How the ranks stand, for the front-end's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm.v1.metrics.stats import SchedulerStats

from ..metrics.collector import RankState
from ..metrics.transport import attach
from .rank.stats import PlainStats, merge_scheduler_stats

if TYPE_CHECKING:
    from .state import SchedulerState


def rank_states(scheduler: SchedulerState) -> list[RankState]:
    """One a rank, as of the last step."""
    shards = scheduler.members.shards_by_rank()
    views = [rank.view for rank in scheduler.ranks]
    return [
        RankState(view.kv_usage, view.running, view.queued, work.guests, held)
        for view, work, held in zip(views, scheduler.mover.last_work, shards, strict=True)
    ]


def engine_stats(scheduler: SchedulerState, parts: Sequence[SchedulerStats | PlainStats]) -> SchedulerStats:
    """One engine's statistics, with this package's own.

    Args:
        scheduler: over all ranks.
        parts: the ranks' statistics; not empty.
    """
    stats = merge_scheduler_stats(parts, len(scheduler.unplaced))
    stats.num_running_reqs += len(scheduler.mover.leaving)
    coefficients = asdict(scheduler.mover.model.coefficients()) if scheduler.mover.moves else None
    attach(stats, scheduler.collector.snapshot(rank_states(scheduler), coefficients))
    return stats
