# SPDX-License-Identifier: Apache-2.0
"""Policy: which ranks hold which blocks of a request. Pure Python over plain numbers: no torch, no vLLM."""

from .place import RankedLoads, RankLoad, cdiv, place, queue_at
from .prefix import Prefix, place_after_prefix
from .queue import Want
from .shard_map import Run, ShardMap

__all__ = [
    "Prefix",
    "RankLoad",
    "RankedLoads",
    "Run",
    "ShardMap",
    "Want",
    "cdiv",
    "place",
    "place_after_prefix",
    "queue_at",
]
