# SPDX-License-Identifier: Apache-2.0
"""How requests are cut in the step at hand: as the user says, or as the cost model finds best (``placement.auto``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..placement.auto import Bounds, Segments, choose

if TYPE_CHECKING:
    from .state import SchedulerState


class StepSegments:
    """Asked for each request; found out once a step.

    Args:
        scheduler: over all ranks.
    """

    def __init__(self, scheduler: SchedulerState) -> None:
        self._scheduler = scheduler
        self._fixed = scheduler.config.segments
        capacity = min(rank.num_blocks for rank in scheduler.ranks) * scheduler.block_size
        self.bounds = Bounds.of(capacity)
        self._at = -1
        self._found = Segments(self.bounds.most, self.bounds.most, self.bounds.least)

    def __call__(self) -> Segments:
        if self._fixed is not None:
            return self._fixed
        scheduler = self._scheduler
        if self._at != scheduler.num_steps:
            self._at = scheduler.num_steps
            loads = scheduler.mover.loads()
            kv_tokens = sum(load.kv_level for load in loads) * scheduler.block_size / len(loads)
            model = scheduler.mover.model
            self._found = choose(model.coefficients(), self.bounds, kv_tokens, bool(scheduler.sharded))
        return self._found
