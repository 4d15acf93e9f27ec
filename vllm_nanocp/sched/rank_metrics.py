# SPDX-License-Identifier: Apache-2.0
"""How the ranks stand, for the front-end's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

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


def engine_stats(scheduler: SchedulerState, parts: Sequence[SchedulerStats | PlainStats]) -> SchedulerStats:
    """One engine's statistics, with this package's own.

    Args:
        scheduler: over all ranks.
        parts: the ranks' statistics; not empty.
    """
    stats = merge_scheduler_stats(parts, len(scheduler.unplaced))
    stats.num_running_reqs += len(scheduler.mover.leaving)
    learnt = scheduler.mover.model.coefficients() if scheduler.mover.moves else None
    coefficients = None if learnt is None else {name: getattr(learnt, name) for name in _COEFFICIENTS}
    attach(stats, scheduler.collector.snapshot(rank_states(scheduler), coefficients))
    return stats
