# SPDX-License-Identifier: Apache-2.0
"""What simulated ranks are and have to do; averages over time. See balance_simulation.py."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllm_nanocp.placement.cost import Coefficients
from vllm_nanocp.placement.moves import MoveConfig

POLICIES = ("moves", "placed", "batch_first", "round_robin")
RATIOS = ("kv", "batch", "kv_read", "decodes")
COUNTS = ("moves", "spills", "preemptions")


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times in seconds, lengths in tokens."""

    ranks: int
    rate: float
    copies: int = 1
    capacity: int = 1_130_656
    block_size: int = 16
    segment_size: int = 32_768
    max_degree: int = 8
    kv_weight: float = 0.8
    chunk: int = 2048
    slots: int = 256
    warm_up: float = 0.25
    noise: float = 0.02
    prefixes: bool = False
    cost: Coefficients = field(default_factory=Coefficients)
    moves: MoveConfig = field(default_factory=MoveConfig)


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival: seconds, prompt tokens, output tokens, hashes of the prompt's blocks."""

    at: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    hashes: tuple[tuple[int, ...], ...] = ()


class Averages:
    """Averages over the time of the measured window."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def add(self, seconds: float, values: dict[str, float]) -> None:
        self.seconds += seconds
        self.steps += 1
        for name, value in values.items():
            self.sums[name] += value * seconds

    def mean(self, name: str) -> float:
        return self.sums[name] / self.seconds if self.seconds else 0.0


def read_trace(path: Path) -> Arrivals:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return Arrivals(
        np.array([r["timestamp"] / 1e3 for r in rows], dtype=float),
        np.array([r["input_length"] for r in rows], dtype=np.int64),
        np.array([max(1, r["output_length"]) for r in rows], dtype=np.int64),
        tuple(tuple(r.get("hash_ids", ())) for r in rows),
    )


def replay(trace: Arrivals, rate: float, copies: int) -> Arrivals:
    """The trace ``rate`` times as fast as recorded, made of ``copies`` copies that start at different places of it."""
    span = float(trace.at.max()) + 1.0
    at = np.concatenate([(trace.at + k * span / copies) % span for k in range(copies)]) * copies / rate
    order = np.argsort(at, kind="stable")
    most = max((max(ids, default=0) for ids in trace.hashes), default=0) + 1
    # No two copies have a prefix in common, apart from the first block, which nearly all requests share.
    hashes = [tuple(i and i + k * most for i in ids) for k in range(copies) for ids in trace.hashes]
    return Arrivals(
        at[order],
        np.tile(trace.prompt, copies)[order],
        np.tile(trace.output, copies)[order],
        tuple(hashes[i] for i in order.tolist()) if hashes else (),
    )
