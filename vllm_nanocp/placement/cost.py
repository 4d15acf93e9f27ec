# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: a linear model of a rank's work, fitted to the steps that were measured.

A rank's time is taken as ``base + kv_token * KV tokens read + query * queries computed + guest * guests served``, in
a step in which any request is sharded ``exchange`` more, and a step's time as that of the slowest rank, since all ranks
step together. The coefficients are fitted by recursive least
squares with exponential forgetting (Ljung, System Identification, 1999, ch. 11), weighted against outliers as
Huber's estimator does (Robust Statistics, 1981), and kept non-negative: where the fit wants a negative one, it
becomes zero and the others take the best values that this leaves, one step of the active-set method of Lawson and
Hanson (Solving Least Squares Problems, 1974, ch. 23). What is left of the error is followed by a slow factor.

The model only chooses between placements that are all right: a bad fit costs balance and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

_SIZE = 5
# Time is counted in units of this many seconds, so that the fit works with numbers around one.
_UNIT = 0.01
# Variance of a coefficient, in units of its prior, before anything was measured: the prior is soon overruled.
_START_VARIANCE = 10.0
# Errors larger than this many typical ones count less, in inverse proportion.
_HUBER = 2.5
# The typical error is followed with this gain, and grows by at most _SCALE_CLIP times itself for one step: a stall
# hardly moves it, ten slow steps in a row do.
_SCALE_GAIN = 0.05
_SCALE_CLIP = 5.0
_SCALE_LEAST = 1e-4
# Measured times are taken to lie between these, in seconds, so that no number is too large or small to work with.
_LEAST, _MOST = 1e-6, 3600.0
_FEEDBACK_GAIN = 0.02
_FEEDBACK_LIMIT = 2.0


@dataclass(slots=True)
class StepLoad:
    """What a rank does in one step.

    Attributes:
        kv_tokens: KV tokens held here that are read: by its own queries and by guests.
        batch: query tokens computed here.
        guests: queries of other ranks that attend here.
        exchange: whether any rank has guests.
    """

    kv_tokens: int
    batch: int
    guests: int = 0
    exchange: bool = False


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds of a step: ``feedback * (base + kv_token * kv_tokens + query * batch + guest * guests + exchange)``.

    The defaults, the prior, are one H200 with Qwen3-30B-A3B in bfloat16, with the exchange of 48 layers over NCCL. All
    are non-negative.
    """

    base: float = 6e-3
    kv_token: float = 2.25e-8
    query: float = 2e-5
    guest: float = 1e-5
    exchange: float = 1.8e-3
    feedback: float = 1.0


class CostModel:
    """Predicts step times and learns from measured ones. O(1) time a measurement besides finding the slowest rank.

    Args:
        prior: coefficients to begin with; positive, apart from ``feedback``, which starts at one.
        forgetting: weight of a measurement after each further one; the fit remembers ``1 / (1 - forgetting)`` steps.

    Raises:
        ValueError: a prior that is not positive and finite, or forgetting outside (0, 1].
    """

    def __init__(self, prior: Coefficients | None = None, forgetting: float = 0.998) -> None:
        prior = Coefficients() if prior is None else prior
        values = (prior.base, prior.kv_token, prior.query, prior.guest, prior.exchange)
        if not all(math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"the prior must be positive and finite: {prior}")
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting}")
        # Coefficients are fitted in units of the prior's: a machine that is k times slower has all of them at k.
        self._prior = values
        self._forgetting = forgetting
        self._fit = [1.0] * _SIZE
        self._fitted = [1.0] * _SIZE  # the same, without negative ones
        self._variance = _diagonal(_START_VARIANCE)
        self._scale = 0.1
        self._log_feedback = 0.0
        self._seconds = values  # what predictions use: fitted coefficients and feedback, in seconds

    def predict(self, load: StepLoad) -> float:
        """Seconds that a rank with this load would take; non-negative, and monotone in each part of the load."""
        base, kv_token, query, guest, exchange = self._seconds
        return (
            base
            + kv_token * max(0, load.kv_tokens)
            + query * max(0, load.batch)
            + guest * max(0, load.guests)
            + exchange * load.exchange
        )

    def slowest(self, loads: Sequence[StepLoad]) -> int:
        """Index of the rank predicted to take longest; the first of equals.

        Raises:
            ValueError: no loads.
        """
        times = [self.predict(load) for load in loads]
        return times.index(max(times))

    def predict_step(self, loads: Sequence[StepLoad]) -> float:
        """Seconds of a step with these loads, one a rank.

        Raises:
            ValueError: no loads.
        """
        return max(self.predict(load) for load in loads)

    def coefficients(self) -> Coefficients:
        """What the model has learnt, in seconds."""
        base, kv_token, query, guest, exchange = (c * p for c, p in zip(self._fitted, self._prior, strict=True))
        return Coefficients(base, kv_token, query, guest, exchange, math.exp(self._log_feedback))

    def observe(self, loads: Sequence[StepLoad], seconds: float) -> bool:
        """Learn from a measured step, taken as the time of the rank that was predicted slowest.

        Args:
            loads: one a rank.
            seconds: what the step took.

        Returns:
            Whether it was used: times and loads that cannot be right are ignored.
        """
        if not (math.isfinite(seconds) and seconds > 0) or not loads:
            return False
        slowest = loads[self.slowest(loads)]
        if not all(math.isfinite(v) and v >= 0 for v in (slowest.kv_tokens, slowest.batch, slowest.guests)):
            return False
        features = self._features(slowest)
        measured = min(max(seconds, _LEAST), _MOST) / _UNIT
        error = measured - sum(c * x for c, x in zip(self._fit, features, strict=True))
        weight = min(1.0, _HUBER * self._scale / max(abs(error), _SCALE_LEAST))
        self._scale += _SCALE_GAIN * (min(1.25 * abs(error), _SCALE_CLIP * self._scale) - self._scale)
        self._scale = max(self._scale, _SCALE_LEAST)
        self._update(features, error, weight)
        self._feed_back(features, measured, weight)
        feedback = math.exp(self._log_feedback)
        base, kv_token, query, guest, exchange = (
            feedback * c * p for c, p in zip(self._fitted, self._prior, strict=True)
        )
        self._seconds = (base, kv_token, query, guest, exchange)
        return True

    def _features(self, load: StepLoad) -> tuple[float, ...]:
        """What each coefficient of the prior contributes, in units of time."""
        base, kv_token, query, guest, exchange = self._prior
        return (
            base / _UNIT,
            max(0, load.kv_tokens) * kv_token / _UNIT,
            max(0, load.batch) * query / _UNIT,
            max(0, load.guests) * guest / _UNIT,
            load.exchange * exchange / _UNIT,
        )

    def _update(self, x: Sequence[float], error: float, weight: float) -> None:
        """One step of weighted recursive least squares."""
        v = self._variance
        vx = [sum(row[j] * x[j] for j in range(_SIZE)) for row in v]
        # Loads that never change teach nothing new: forgetting then would let the variance grow without bound.
        bounded = sum(v[i][i] for i in range(_SIZE)) < _SIZE * _START_VARIANCE
        forgetting = self._forgetting if bounded else 1.0
        total = forgetting / weight + sum(a * b for a, b in zip(x, vx, strict=True))
        fit = [c + a * error / total for c, a in zip(self._fit, vx, strict=True)]
        if not all(math.isfinite(c) for c in fit):
            self._variance = _diagonal(_START_VARIANCE)
            return
        self._fit = fit
        self._variance = [[(v[i][j] - vx[i] * vx[j] / total) / forgetting for j in range(_SIZE)] for i in range(_SIZE)]
        if min(self._variance[i][i] for i in range(_SIZE)) <= 0:  # rounding
            self._variance = _diagonal(_START_VARIANCE)
        self._fitted = _without_negatives(self._fit, self._variance)

    def _feed_back(self, x: Sequence[float], measured: float, weight: float) -> None:
        linear = sum(c * f for c, f in zip(self._fitted, x, strict=True))
        limit = math.log(_FEEDBACK_LIMIT)
        error = limit if linear <= 0 else max(-limit, min(limit, math.log(measured / linear)))
        self._log_feedback += _FEEDBACK_GAIN * weight * (error - self._log_feedback)


def _diagonal(value: float) -> list[list[float]]:
    return [[value if i == j else 0.0 for j in range(_SIZE)] for i in range(_SIZE)]


def _without_negatives(fit: Sequence[float], variance: Sequence[Sequence[float]]) -> list[float]:
    """The best fit whose most negative coefficient is zero, again until none is negative; others cut off at zero.

    ``variance`` is the inverse of the fit's normal matrix (up to a factor): with it, holding coefficient j at zero
    moves coefficient i by ``-fit[j] * variance[i][j] / variance[j][j]``.
    """
    best = list(fit)
    v = [list(row) for row in variance]
    for _ in range(_SIZE):
        j = min(range(_SIZE), key=lambda i: best[i])
        if best[j] >= 0 or v[j][j] <= 0:
            break
        gain = [v[i][j] / v[j][j] for i in range(_SIZE)]
        held = best[j]
        best = [b - held * g for b, g in zip(best, gain, strict=True)]
        best[j] = 0.0
        v = [[v[i][k] - gain[i] * v[j][k] for k in range(_SIZE)] for i in range(_SIZE)]
    return [max(0.0, b) for b in best]


assert len(fields(Coefficients)) == _SIZE + 1
