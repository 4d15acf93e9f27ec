# SPDX-License-Identifier: Apache-2.0
"""What ``soak.py`` judges: memory that grows, latencies that drift, tokens that differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from soak_load import Job


def growth(series: Sequence[tuple[float, float]]) -> float:
    """By which part a quantity has grown from the first to the last of its (seconds, value) pairs, by a line through
    all of them (least squares). 0 for fewer than three.
    """
    if len(series) < 3:
        return 0.0
    times, values = zip(*series, strict=True)
    slope, intercept = statistics.linear_regression(times, values)
    first = intercept + slope * times[0]
    return slope * (times[-1] - times[0]) / first if first > 0 else 0.0


def memory(rss: Mapping[str, Sequence[tuple[float, float]]], warm_up: float, limit: float) -> dict[str, Any]:
    """Growth of each process's memory after ``warm_up`` seconds, and whether all are below ``limit``."""
    grown = {name: growth([point for point in series if point[0] >= warm_up]) for name, series in rss.items()}
    return {
        "pass": bool(grown) and all(value < limit for value in grown.values()),
        "limit": limit,
        "warm_up_s": round(warm_up, 1),
        "growth": {name: round(value, 5) for name, value in grown.items()},
    }


def latencies(jobs: Sequence[Job], warm_up: float, start: float, limit: float | None) -> dict[str, Any]:
    """Median seconds to the first token, and for each further one, in the first and the last third after warm-up.

    Without a limit they are only reported ("pass" is None).
    """
    done = [job for job in jobs if job.lost is None and job.first is not None and job.sent - start >= warm_up]
    done.sort(key=lambda job: job.sent)
    third = len(done) // 3
    result: dict[str, Any] = {"pass": None, "limit": limit}
    ratios = []
    for name, seconds in (("first_token_s", _first), ("each_token_s", _each)):
        ends = [[s for job in part if (s := seconds(job)) is not None] for part in (done[:third], done[-third:])]
        if third == 0 or not all(ends):
            continue
        early, late = (statistics.median(end) for end in ends)
        result[name] = [round(early, 5), round(late, 5)]
        ratios.append(late / early)
    if limit is not None:
        result["pass"] = bool(ratios) and max(ratios) <= limit
    return result


def waits(jobs: Sequence[Job]) -> dict[str, list[float]]:
    """How many requests of each priority there were, and their median and longest seconds to the first token."""
    found: dict[int, list[float]] = {}
    for job in jobs:
        if job.first is not None:
            found.setdefault(job.body.get("priority", 0), []).append(job.first - job.sent)
    return {
        str(one): [len(all_), round(statistics.median(all_), 3), round(max(all_), 3)]
        for one, all_ in sorted(found.items())
    }


def _first(job: Job) -> float | None:
    return None if job.first is None else job.first - job.sent


def _each(job: Job) -> float | None:
    if job.first is None or job.ended is None or len(job.tokens) < 8:
        return None
    return (job.ended - job.first) / (len(job.tokens) - 1)


def tokens(ours: Sequence[Job], stocks: Sequence[Job]) -> dict[str, Any]:
    """Whether stock vLLM gives the same tokens."""
    differing = [
        {"number": mine.number, "prompt": len(mine.body["prompt"]), "ours": mine.tokens, "stock": other.tokens}
        for mine, other in zip(ours, stocks, strict=True)
        if mine.tokens != other.tokens
    ]
    return {"pass": bool(ours) and not differing, "compared": len(ours), "differing": differing[:10]}


def scored(ours: Sequence[Job], gaps: Sequence[Sequence[float]], limit: float) -> dict[str, Any]:
    """Whether all tokens are stock vLLM's choice, or nearly.

    Args:
        ours: greedy requests.
        gaps: for each token of each, the logprob by which it falls behind stock vLLM's choice.
        limit: of a gap.
    """
    flat = sorted(gap for mine in gaps for gap in mine)
    worst = [
        {"number": job.number, "prompt": len(job.body["prompt"]), "at": mine.index(max(mine)), "gap": max(mine)}
        for job, mine in zip(ours, gaps, strict=True)
        if max(mine) > limit
    ]
    return {
        "pass": bool(flat) and not worst,
        "compared": len(ours),
        "tokens": len(flat),
        "not_the_choice": sum(gap > 0 for gap in flat),
        "largest_gaps": [round(gap, 4) for gap in flat[-10:]],
        "limit": limit,
        "differing": worst[:10],
    }


def nothing_lost(jobs: Sequence[Job], wanted: int) -> dict[str, Any]:
    """Whether each request was sent, and got what it had to."""
    sent = [job for job in jobs if job.sent]
    lost = [{"number": job.number, "why": job.lost} for job in sent if job.lost is not None]
    return {
        "pass": not lost and len(sent) >= wanted,
        "sent": len(sent),
        "answered": sum(job.lost is None and not job.refused and job.leave_after is None for job in sent),
        "left": sum(job.leave_after is not None for job in sent),
        "refused": sum(job.refused for job in sent),
        "lost": lost[:20],
    }
