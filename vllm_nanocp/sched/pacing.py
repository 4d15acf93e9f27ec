# SPDX-License-Identifier: Apache-2.0
"""``prefill_gap``: which steps compute prompts, on all ranks the same ones, and what steps took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..placement.prefill_steps import PrefillGap, PrefillSteps

if TYPE_CHECKING:
    from .rank.interface import Allowed, Part, Rank


class Pacing:
    """Asks the policy before each step, and tells it what the step took.

    Args:
        gap: the setting.
        ranks: their schedulers.
    """

    def __init__(self, gap: PrefillGap, ranks: Sequence[Rank]) -> None:
        self.steps = PrefillSteps(gap, len(ranks), ranks[0].max_num_scheduled_tokens)
        self._last_update = 0.0

    def begin(self, ranks: Sequence[Rank]) -> Allowed:
        """What each rank may compute of prompts in the step that begins."""
        views = [rank.view for rank in ranks]
        backlog = [max(0, view.prompt_tokens) for view in views]
        allowed = self.steps.begin(backlog, not all(view.only_chunks for view in views), time.monotonic())
        return None if allowed is None else (allowed.tokens, allowed.pairs)

    def observe(self, parts: Sequence[Part], scheduled: float) -> None:
        """A step's output has come.

        Args:
            parts: what the ranks had scheduled.
            scheduled: when, by ``time.monotonic``.
        """
        now = time.monotonic()
        if any(part.tokens for part in parts):
            tokens, pairs = sum(part.prompt_tokens for part in parts), max(part.prompt_pairs for part in parts)
            self.steps.observe(tokens, pairs, now - max(scheduled, self._last_update))
        self._last_update = now
