# SPDX-License-Identifier: Apache-2.0
"""``--prefill-schedule-interval``: prompts start in every so many steps only, on all ranks in the same ones.

In vLLM the engines of data-parallel ranks do that (``DPEngineCoreProc._should_throttle_prefills``): their steps are
counted alike from when all were idle. Here the one engine over all ranks is of another class, and never throttles.
"""

from __future__ import annotations


class PrefillCadence:
    """Counts steps.

    Args:
        interval: of steps that may start prompts; 1 means all.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.steps = 0

    def throttles(self, unfinished: int) -> bool:
        """Whether the step that begins now defers prompts, on ranks that have something to decode.

        Args:
            unfinished: requests that are to be scheduled.
        """
        if not unfinished:
            self.steps = 0
            return False
        throttled = self.steps % self.interval != 0
        self.steps += 1
        return throttled

    def rest(self) -> None:
        """All requests have ended: the next one's prompt starts at once."""
        self.steps = 0
