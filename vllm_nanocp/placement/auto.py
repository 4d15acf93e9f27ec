# SPDX-License-Identifier: Apache-2.0
"""``segment_size`` "auto": how long a shard should be, from the cost model, within bounds that no model moves.

Ranks wait for the one that reads most KV. Requests come and go at random, so what the fullest reads beyond the mean
grows with the spread of the ranks' loads: with n shards of s tokens on a rank it is about ``sqrt(n) * s``, which for K
tokens a rank is ``sqrt(K * s)``. Shorter shards take a part of that away, and each shard more is a guest that a rank
serves. The time of both together is least where

    ``s ** 1.5 = 2 * guest / (SPREAD * kv_token) * sqrt(K)``

Nothing is gained by cutting a request that a rank reads in less time than the exchange takes, for which all ranks wait.
The curve is flat around its lowest point, so the model may be wrong by a factor of a few; and however wrong it is, the
length stays within a part of a rank's cache at both ends (``Bounds``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cost import Coefficients
from .place import cdiv

AUTO = "auto"

# What the fullest rank has beyond the mean, in such spreads: with placement by least load, fewer than at random.
SPREAD = 0.5
# A request is cut for the first exchange if a rank reads it in so many times the exchange's time; where others pay for
# the exchange anyway, in this part of it.
FIRST, FURTHER = 2.0, 0.5
# A shard is at least and at most such parts of a rank's cache, and at least so many tokens where the cache is small,
# but no more than this part of that.
LEAST_PART, MOST_PART = 128, 20
LEAST_TOKENS, LEAST_TOKENS_PART = 4096, 16

# What is expected before anything was measured: one H200 with Qwen3-30B-A3B, guests and the exchange over NVLink as in
# ``sim.machine``. Where an exchange costs more, the first requests that are cut show it.
PRIOR = Coefficients(base=5.5e-3, kv_token=2.29e-8, query=1.8e-5, guest=3.7e-5, exchange=2.5e-4)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a shard's length stays within, whatever the model says.

    Attributes:
        least: tokens; no request is cut into shards that are shorter, unless it has room in no other way.
        most: tokens; a request of twice as many is always cut.
    """

    least: int
    most: int

    @classmethod
    def of(cls, capacity: int) -> Bounds:
        """For ranks whose cache has room for so many tokens."""
        least = max(1, capacity // LEAST_PART, min(LEAST_TOKENS, capacity // LEAST_TOKENS_PART))
        return cls(least, max(capacity // MOST_PART, 2 * least))

    def clip(self, tokens: float, most: int | None = None) -> int:
        """The nearest length within; the largest for what is no number."""
        most = self.most if most is None else most
        return int(min(max(tokens, self.least), most)) if math.isfinite(tokens) else most


@dataclass(frozen=True, slots=True)
class Segments:
    """How requests are cut at the moment.

    Attributes:
        size: tokens a shard should hold.
        whole: tokens up to which a request stays whole.
        least: tokens a shard must hold where a request is cut only because no rank has room for all of it.
    """

    size: int
    whole: int
    least: int

    def of(self, num_tokens: int) -> int:
        """The ``segment_size`` of a request of so many tokens."""
        if num_tokens <= self.whole:
            return num_tokens
        if not self.least:
            return self.size
        pieces = max(1, min(cdiv(num_tokens, self.size), num_tokens // self.least))
        return cdiv(num_tokens, pieces)


def fixed(size: int) -> Segments:
    """As the user says; a request of one segment is never cut because of room."""
    return Segments(size, size, 0)


def choose(coefficients: Coefficients, bounds: Bounds, kv_tokens: float, sharded: bool) -> Segments:
    """How to cut requests now.

    Args:
        coefficients: what the model has learnt.
        bounds: of the ranks.
        kv_tokens: that a rank holds now, in the mean.
        sharded: whether any request is sharded, so that steps have an exchange already.
    """
    kv_token = coefficients.kv_token
    if not kv_token > 0:  # KV costs nothing: nothing is to be gained
        return Segments(bounds.most, 2 * bounds.most, bounds.least)
    guest, exchange = (max(0.0, seconds) / kv_token for seconds in (coefficients.guest, coefficients.exchange))
    size = bounds.clip((2 * guest / SPREAD * math.sqrt(max(0.0, kv_tokens))) ** (2 / 3))
    whole = bounds.clip((FURTHER if sharded else FIRST) * exchange, 2 * bounds.most)
    return Segments(size, max(size, whole), bounds.least)
