# SPDX-License-Identifier: Apache-2.0
"""A load as production has it: lengths of a conversation trace, prompts computed, so many requests at once."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from streams import Stream, StreamError, percentile

LENGTHS = Path(__file__).resolve().parents[1] / "tests" / "data" / "conversation_lengths.json"
COUNTERS = ("vllm:num_preemptions", "vllm:nanocp_moves", "vllm:nanocp_spills", "vllm:nanocp_prevented_preemptions")


def lengths(count: int) -> list[tuple[int, int]]:
    """Prompt and output tokens of the first requests of the trace."""
    requests = json.loads(LENGTHS.read_text())["requests"]
    return [(prompt, output) for _, prompt, output, _ in requests[:count]]


def counters(url: str) -> dict[str, float]:
    """What the server has counted so far, over all engines; those it does not have are left out."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name in COUNTERS:
            found[family.name] = sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    return found


async def closed_loop(url: str, streams: Sequence[Stream], concurrency: int, limit: float) -> float:
    """Send the streams in order, a new one whenever one of ``concurrency`` ends. Returns the seconds it took.

    Raises:
        StreamError: one failed, or time ran out.
    """
    waiting = iter(streams)
    timeout = aiohttp.ClientTimeout(total=limit)

    async def client(session: aiohttp.ClientSession) -> None:
        for stream in waiting:
            await stream.run(session, f"{url}/v1/completions")

    start = time.perf_counter()
    try:
        async with (
            asyncio.timeout(limit),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
        ):
            await asyncio.gather(*(client(session) for _ in range(concurrency)))
    except TimeoutError:
        raise StreamError(f"not complete after {limit:.0f} s") from None
    failed = [stream.error for stream in streams if stream.error]
    if failed:
        raise StreamError("; ".join(failed[:3]))
    return time.perf_counter() - start


def figures(streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    """Times to first tokens in s, gaps between tokens and each request's mean of them in ms, and throughput."""

    def percentiles(values: list[float]) -> dict[str, float]:
        values.sort()
        at = {f"p{q}": percentile(values, q / 100) for q in (50, 90, 99)}
        return {name: round(value, 3) for name, value in (at | {"mean": statistics.fmean(values)}).items()}

    gaps = [[1e3 * (end - start) for start, end in stream.gaps(0)] for stream in streams]
    return {
        "requests": len(streams),
        "seconds": round(seconds, 1),
        "output_tokens_per_s": round(sum(stream.tokens for stream in streams) / seconds, 1),
        "ttft_s": percentiles([stream.times[0] - stream.sent for stream in streams]),
        "gap_ms": percentiles([gap for mine in gaps for gap in mine]),
        "request_mean_gap_ms": percentiles([statistics.fmean(mine) for mine in gaps if mine]),
    }
