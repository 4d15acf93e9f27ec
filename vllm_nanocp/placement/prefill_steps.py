# SPDX-License-Identifier: Apache-2.0
"""Which steps compute prompts, on all ranks alike, and how much of them: decodes beside them wait a bounded time.

All ranks step together, so the slowest one counts: one rank's chunk deep in a long prompt keeps all others waiting.
Here a step is a decode step on all ranks or a prefill step on all. In a prefill step each rank computes as much as is
predicted to end within a given gap, and so all of them end at about the same time. A prefill step is entered when
prompts would fill a part of it, or have waited long enough, or nobody decodes; so many decode steps at least lie
between two, or as many as a part of the prefill steps' time is enough for. Without a gap prefill steps are as the
ranks' schedulers make them.

A prefill step is taken to last as long as a decode step, and ``token`` for each prompt token of all ranks (experts and
their exchange), and ``pair`` for each (query, key) pair of the rank with most of them (attention). Both are fitted to
the steps that were measured. A bad fit costs longer or shorter steps and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .checks import is_integer, is_number

# Tokens of the first chunk of a rank in a prefill step, however deep: else the end of a long prompt would never come.
LEAST = 64
# Of a step's time for prompts, the part for tokens follows what it was in the last steps, with this gain and between
# these.
_GAIN, _PART_LEAST, _PART_MOST = 0.2, 0.2, 0.9
# Weight of a measured prefill step after each further one, and of the prior in such steps.
_FORGETTING, _PRIOR = 0.95, 0.05
_DECODE_GAIN = 0.1
# An hour: beyond it, what fits into a step may be too much for a number.
_MOST_MS = 3_600_000
# Part of the prior that a coefficient has at least.
_LOW = 0.01


@dataclass(frozen=True)
class PrefillGap:
    """When prompts are computed.

    Attributes:
        ms: that a step with prompts may last, as predicted; None: as long as it takes.
        decode_steps: at least, between two of them.
        decode_share: of the time that prompts have taken, the part that steps without any then get, in whole steps: few
            or none behind short prompts, many behind chunks deep in long ones.
        fill: part of a step that waiting prompts fill at least, if they have not waited for ``late_ms``.
        late_ms: of a step that does not wait to be filled any more.
    """

    ms: float | None = 400.0
    decode_steps: int = 1
    fill: float = 0.5
    late_ms: float = 50.0
    decode_share: float = 0.0

    def __post_init__(self) -> None:
        if self.ms is not None and not (is_number(self.ms) and 0 < self.ms <= _MOST_MS):
            raise ValueError(f"ms must be null or a number above 0, at most {_MOST_MS}, got {self.ms!r}")
        if not (is_number(self.decode_share) and 0 <= self.decode_share <= 1):
            raise ValueError(f"decode_share must be a number from 0 to 1, got {self.decode_share!r}")
        if self.ms is None and not (self.decode_share or self.decode_steps):
            raise ValueError("with ms null, decode_steps 0 and decode_share 0 it has no effect")
        if not (is_integer(self.decode_steps) and self.decode_steps >= 0):
            raise ValueError(f"decode_steps must be an integer of at least 0, got {self.decode_steps!r}")
        if not (is_number(self.fill) and 0 <= self.fill <= 1):
            raise ValueError(f"fill must be a number from 0 to 1, got {self.fill!r}")
        if not (is_number(self.late_ms) and self.late_ms >= 0):
            raise ValueError(f"late_ms must be a number of at least 0, got {self.late_ms!r}")


@dataclass(slots=True)
class Allowance:
    """What a rank may compute of prompts in one step.

    Attributes:
        tokens: at most.
        pairs: of a query and a key, at most.
        first: whether nothing was taken of it.
    """

    tokens: int
    pairs: float
    first: bool = True

    def take(self, at: int, most: int) -> int:
        """Take the largest chunk of a prompt; how many tokens that is.

        Args:
            at: tokens of the prompt that are computed.
            most: tokens that it could be.
        """
        fit = int(math.sqrt(at * at + 2.0 * self.pairs) - at) if self.pairs > 0 else 0
        chunk = min(most, self.tokens, max(fit, LEAST if self.first else 0))
        return self._spend(at, chunk)

    def take_part(self, part: float, at: int, most: int) -> int:
        """The same, of only a part of what is left: the rest is for others."""
        mine = Allowance(int(part * self.tokens), part * self.pairs, self.first)
        return self._spend(at, mine.take(at, most))

    def _spend(self, at: int, chunk: int) -> int:
        if chunk <= 0:
            return 0
        self.first = False
        self.tokens -= chunk
        self.pairs -= pairs_of(at, chunk)
        return chunk


def pairs_of(at: int, tokens: int) -> float:
    """Of a chunk after so many tokens."""
    return tokens * (at + tokens / 2)


class PrefillSteps:
    """Decides, and learns.

    Args:
        config: when.
        ranks: how many.
        budget: tokens of a rank's step at most.
        token, pair, decode: seconds to begin with; see the module. The defaults are H200s with Qwen3-30B-A3B.
    """

    def __init__(
        self,
        config: PrefillGap,
        ranks: int,
        budget: int,
        token: float = 8e-6,
        pair: float = 1.3e-9,
        decode: float = 0.01,
    ) -> None:
        self.config, self.ranks, self.budget = config, ranks, budget
        self.token, self.pair, self.decode = token, pair, decode
        self._prior = (token, pair)
        # Of sums over prefill steps, in units of the prior: x * x, x * y, y * y, x * time, y * time.
        self._sums = [0.0] * 5
        self._part = 0.5
        self._decode_steps = config.decode_steps
        self._since: float | None = None
        # Seconds that decode steps have yet to get.
        self._owed = 0.0

    def allowance(self) -> Allowance | None:
        """What each rank may compute in a prefill step that is to last as long as the gap; None: without one."""
        if self.config.ms is None:
            return None
        left = max(0.0, self.config.ms / 1e3 - self.decode)
        tokens = int(self._part * left / (self.token * self.ranks))
        return Allowance(max(LEAST, min(self.budget, tokens)), (1 - self._part) * left / self.pair)

    def begin(self, backlog: Sequence[int], decodes: bool, now: float) -> Allowance | None:
        """What each rank may compute of prompts in the step that begins; None: as much as fits into it.

        Args:
            backlog: prompt tokens that wait, a rank.
            decodes: whether any rank has something to decode.
            now: seconds.
        """
        if not any(backlog):
            self._since, self._owed = None, 0.0
            self._decode_steps += 1
            return None
        if self._since is None:
            self._since = now
        allowed = self.allowance()
        if not decodes:
            self._owed = 0.0
        elif not self._enters(backlog, allowed, now):
            self._decode_steps += 1
            self._owed = max(0.0, self._owed - self.decode)
            return Allowance(0, 0.0, first=False)
        self._since, self._decode_steps = now, 0
        return allowed

    def _enters(self, backlog: Sequence[int], allowed: Allowance | None, now: float) -> bool:
        assert self._since is not None
        if self._decode_steps < self.config.decode_steps or self._owed >= self.decode:
            return False
        if allowed is None or now - self._since >= self.config.late_ms / 1e3:
            return True
        return sum(min(tokens, allowed.tokens) for tokens in backlog) >= self.config.fill * allowed.tokens * self.ranks

    def observe(self, tokens: int, pairs: float, seconds: float) -> None:
        """Learn from a measured step.

        Args:
            tokens: of prompts, computed on all ranks.
            pairs: of the rank with most of them.
            seconds: what it took.
        """
        if not (math.isfinite(seconds) and 0 < seconds < 3600):
            return
        if not tokens:
            # A stall is not what a step takes.
            self.decode += _DECODE_GAIN * (min(seconds, 4 * self.decode) - self.decode)
            return
        x, y = tokens * self._prior[0], pairs * self._prior[1]
        # Nor is it what prompts take.
        time = min(max(0.0, seconds - self.decode), 4 * (self.token * tokens + self.pair * pairs))
        self._owed += self.config.decode_share * time
        new = (x * x, x * y, y * y, x * time, y * time)
        self._sums = [_FORGETTING * old + one for old, one in zip(self._sums, new, strict=True)]
        self._fit()
        spent = self.token * tokens, self.pair * pairs
        share = spent[0] / sum(spent)
        self._part += _GAIN * (min(max(share, _PART_LEAST), _PART_MOST) - self._part)

    def _fit(self) -> None:
        """Least squares of two coefficients, drawn to the prior, and not below a part of it."""
        xx, xy, yy, xt, yt = self._sums
        # The prior counts as much as a part of a step of the typical size.
        ridge = _PRIOR * (xx + yy) / 2 * (1 - _FORGETTING) + 1e-12
        xx, yy, xt, yt = xx + ridge, yy + ridge, xt + ridge, yt + ridge
        determinant = xx * yy - xy * xy
        a, b = (yy * xt - xy * yt) / determinant, (xx * yt - xy * xt) / determinant
        if a < _LOW:
            a, b = _LOW, max(_LOW, (yt - _LOW * xy) / yy)
        if b < _LOW:
            a, b = max(_LOW, (xt - _LOW * xy) / xx), _LOW
        self.token, self.pair = a * self._prior[0], b * self._prior[1]
