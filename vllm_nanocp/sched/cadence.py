# SPDX-License-Identifier: Apache-2.0
"""``--prefill-schedule-interval``: prompts start in every so many steps only, on all ranks in the same ones.

In vLLM the engines of data-parallel ranks do that (``DPEngineCoreProc._should_throttle_prefills``): their steps are
counted alike from when all were idle. Here the one engine over all ranks is of another class, and never throttles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rank.interface import Rank


class PrefillCadence:
    """Counts steps.

    Args:
        interval: of steps that may start prompts; 1 means all.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.steps = 0
        # Ranks that may start prompts in the step at hand.
        self._open: list[Rank] = []

    def throttles(self, unfinished: int, ranks: Sequence[Rank]) -> bool:
        """Whether the step that begins now defers prompts, on ranks that have something to decode.

        Args:
            unfinished: requests that are to be scheduled.
            ranks: their schedulers.
        """
        throttled = bool(unfinished) and self.steps % self.interval != 0
        self.steps = self.steps + 1 if unfinished else 0
        self._open = [rank for rank in ranks if not throttled or rank.view.capacity_bound or rank.view.only_chunks]
        return throttled

    def note_backlog(self, backlog: bool) -> None:
        """After the step: as vLLM's scheduler does of its own queue, the ranks that could start prompts in it remember
        that more requests wait than there is room for. Then they defer none, so that no slot stays empty.

        Args:
            backlog: whether requests wait that found no room.
        """
        for rank in self._open:
            rank.note_backlog(backlog)

    def rest(self) -> None:
        """All requests have ended: the next one's prompt starts at once."""
        self.steps = 0
