# SPDX-License-Identifier: Apache-2.0
"""The highest request rate under a latency target: percentiles, bisection, and a record that is added to. No engine."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import write_json
from streams import percentile

# Rate -> TPOT P99 in ms; infinite where too many requests did not end in time.
Seen = Mapping[float, float]


@dataclass(frozen=True)
class Target:
    """Of TPOT P99.

    Attributes:
        text: as it was given.
        factor: times the unloaded TPOT; None: ``ms`` is absolute.
        ms: milliseconds, without a factor.
    """

    text: str
    factor: float | None
    ms: float | None

    @classmethod
    def parse(cls, text: str) -> Target:
        """``1.5x``, or milliseconds.

        Raises:
            ValueError: neither, or not above zero.
        """
        number = float(text.removesuffix("x"))
        if not 0 < number < math.inf:
            raise ValueError(text)
        return cls(text, number, None) if text.endswith("x") else cls(text, None, number)

    def of(self, unloaded: float | None) -> float | None:
        """Milliseconds; None while the unloaded TPOT is not known."""
        if self.factor is None:
            return self.ms
        return None if unloaded is None else self.factor * unloaded


def grid(low: float, high: float, step: float) -> list[float]:
    """Rates from ``low`` to ``high``."""
    return [round(low + i * step, 6) for i in range(int((high - low) / step + 1e-9) + 1)]


def bracket(rates: Sequence[float], seen: Seen, target: float) -> tuple[int, int]:
    """Places in ``rates`` of the highest one that meets the target below all that miss it (-1: none), and of the lowest
    one that misses it (``len(rates)``: none)."""
    high = min((i for i, rate in enumerate(rates) if seen.get(rate, 0.0) > target), default=len(rates))
    low = max((i for i in range(high) if rates[i] in seen), default=-1)
    return low, high


def next_rate(rates: Sequence[float], seen: Seen, target: float) -> float | None:
    """The rate to be tried next; None once two neighbours are known of which one meets the target and one does not."""
    low, high = bracket(rates, seen, target)
    return rates[(low + high) // 2] if high - low > 1 else None


def best_rate(rates: Sequence[float], seen: Seen, target: float) -> float | None:
    """The highest rate that meets the target; 0 if the lowest misses it, None while that is not known."""
    if next_rate(rates, seen, target) is not None:
        return None
    low, _ = bracket(rates, seen, target)
    return rates[low] if low >= 0 else 0.0


def tpot(stream: Mapping[str, Any]) -> float | None:
    """ms an output token after the first; infinite if the stream did not end in time; None if it made one token."""
    if stream["error"] or not stream["times"]:
        return math.inf
    if stream["tokens"] < 2:
        return None
    return 1e3 * (stream["times"][-1] - stream["times"][0]) / (stream["tokens"] - 1)


def _at(values: list[float], q: float) -> float | None:
    return round(percentile(values, q), 3) if values else None


def figures(streams: Sequence[Mapping[str, Any]], settle: float) -> dict[str, Any]:
    """Of the streams that were sent ``settle`` seconds after the first one or later: percentiles over requests, in ms.

    Of fewer than 100 requests P99 is the largest value. Streams that did not end count as infinitely slow.
    """
    first = min(stream["sent"] for stream in streams)
    counted = [stream for stream in streams if stream["sent"] >= first + settle]
    each = sorted(value for stream in counted if (value := tpot(stream)) is not None)
    firsts = sorted(1e3 * (s["times"][0] - s["sent"]) if s["times"] else math.inf for s in counted)
    ends = [stream["times"][-1] for stream in streams if stream["times"]]
    tokens = sum(stream["tokens"] for stream in streams)
    return {
        "sent": len(streams),
        "requests": len(counted),
        "unfinished": sum(bool(stream["error"]) or not stream["times"] for stream in counted),
        "errors": sorted({stream["error"] for stream in counted if stream["error"]})[:3],
        **{f"tpot_p{q}": _at(each, q / 100) for q in (50, 90, 99)},
        **{f"ttft_p{q}": _at(firsts, q / 100) for q in (50, 90, 99)},
        "tokens_per_s": round(tokens / (max(ends) - first), 1) if tokens else 0.0,
    }


def plain(value: Any) -> Any:
    """As JSON has it: without infinity."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(what: Mapping[str, Any]) -> str:
    """Probes of equal digests are of the same server, machine and load."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


class Record:
    """All probes so far, in a file that is written after each.

    Args:
        path: of the file; what is there is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"runs": [], "servers": {}, "probes": []}
        if path.exists():
            self.content |= json.loads(path.read_text())

    def save(self) -> None:
        write_json(self.path, self.content)

    def add(self, of: str, system: str, phase: str, seed: int | None, rate: float, found: Mapping[str, Any]) -> None:
        """Keep a probe; without a seed it is the unloaded one."""
        probe = {"of": of, "system": system, "phase": phase, "seed": seed, "rate": rate, **plain(dict(found))}
        self.content["probes"].append(probe)
        self.save()

    def seen(self, of: str, phase: str, seed: int) -> dict[float, float]:
        """What is known of one search."""
        return {
            probe["rate"]: math.inf if probe["tpot_p99"] is None else probe["tpot_p99"]
            for probe in self.content["probes"]
            if (probe["of"], probe["phase"], probe["seed"]) == (of, phase, seed)
        }

    def probe(self, of: str, phase: str, seed: int, rate: float) -> dict[str, Any]:
        """One that is there."""
        return next(
            probe
            for probe in self.content["probes"]
            if (probe["of"], probe["phase"], probe["seed"], probe["rate"]) == (of, phase, seed, rate)
        )

    def unloaded(self, of: str, phase: str) -> float | None:
        """TPOT of requests that are alone, ms, if it has been measured."""
        found = [
            probe["tpot_p50"]
            for probe in self.content["probes"]
            if (probe["of"], probe["phase"], probe["seed"]) == (of, phase, None)
        ]
        return found[-1] if found else None


def over_seeds(rates: Sequence[float | None]) -> dict[str, Any]:
    """Median and range of what the seeds gave; those whose search has not ended are left out."""
    known = [rate for rate in rates if rate is not None]
    if not known:
        return {"seeds": 0, "rate": None, "least": None, "most": None}
    return {"seeds": len(known), "rate": statistics.median(known), "least": min(known), "most": max(known)}
