#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""``segment_size`` "auto" next to explicit settings, all simulated: time per output token p99 under several loads.

    python benchmarks/simulated_auto.py --trace TRACE.jsonl --out FILE

``trace``: the load of ``simulated_curves.py`` (decode only, the conversation trace stretched four times) at rates up to
and beyond what the caches hold, on 4, 8 and 32 ranks; rates are those of four ranks. ``mix``: short chats, of which a
part has prompts of 100,000 to 1,000,000 tokens. Preempted requests are computed again. Each value is the median of
``--seeds`` seeds. Explicit settings have moves off and on; "auto" has what it brings: spills, no moves.

``full``: rates of 12, 16 and 20, stock vLLM's two systems beside the plugin's.

``wrong``: the same with a cost model that is wrong, and stays so: coefficients ten times too large or small, or zero.

``visits``: steps with more visits between two ranks than graphs have room for take 80 ms longer (assumed); with room
for four, and for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept_result import about, write
from benchmarks.simulated_curves import load as trace_load
from benchmarks.simulated_curves import run_of
from vllm_nanocp.placement.auto import AUTO, PRIOR
from vllm_nanocp.placement.cost import Coefficients
from vllm_nanocp.sim.figures import simulate
from vllm_nanocp.sim.nanocp import Settings
from vllm_nanocp.sim.trace import Requests, read_trace

EXPLICIT = (8192, 16384, 32768, 65536, 131072)
MIX_SECONDS, SECONDS = 20.0, 25.0
# Parts of long requests, and requests a second of four ranks.
MIXES = {0.0: 40, 0.01: 30, 0.05: 10, 1.0: 0.8}
FIGURES = ("tpot_p50", "tpot_p99", "ttft_p99", "tokens_per_s", "preemptions", "spills", "sharded", "kv_mean")


def mix(part: float, rate: float) -> Requests:
    """Short chats, and a part of long requests."""
    dice = np.random.default_rng([17, int(1000 * part)])
    at = np.cumsum(dice.exponential(1 / rate, int(2 * rate * MIX_SECONDS) + 10))
    at = at[at < MIX_SECONDS]
    short = np.exp(dice.normal(6.5, 1.0, len(at))).clip(16, 8000).astype(np.int64)
    long = dice.integers(100_000, 1_000_001, len(at))
    output = np.exp(dice.normal(5.3, 0.7, len(at))).clip(2, 600).astype(np.int64)
    return Requests(at, np.where(dice.random(len(at)) < part, long, short), output)


def loads(trace: Requests) -> Iterator[tuple[str, int, Requests]]:
    for rate in (4, 6, 8, 10, 12, 16):
        yield f"trace {rate}/s", 4, trace_load(trace, rate)
    for ranks in (8, 32):
        for rate in (4, 8, 12) if ranks == 8 else (8, 12):
            yield f"trace {rate}/s", ranks, trace_load(trace, rate * ranks / 4, SECONDS)
    for ranks in (4, 8, 32):
        for part, rate in MIXES.items():
            yield f"mix {part:g} {rate:g}/s", ranks, mix(part, rate * ranks / 4)


def figures(settings: Settings, ranks: int, requests: Requests, seeds: int, **others: Any) -> dict[str, Any]:
    found = []
    for seed in range(seeds):
        run = replace(run_of("nanocp 65536", ranks, seed)[0], settings=settings, as_benchmarks=False, **others)
        found.append(simulate(run, "nanocp", requests))
    return {key: round(statistics.median(one[key] for one in found), 3) for key in FIGURES}


def compared(load: tuple[str, int, Requests], seeds: int) -> dict[str, Any]:
    """Auto, and the best of the explicit settings."""
    name, ranks, requests = load
    auto = figures(Settings(AUTO), ranks, requests, seeds)
    explicit = {
        f"{segment}{' moves' if moves else ''}": figures(Settings(segment, moves=moves), ranks, requests, seeds)
        for segment in EXPLICIT
        for moves in (False, True)
    }
    best = min(explicit, key=lambda key: explicit[key]["tpot_p99"])
    ratio = round(auto["tpot_p99"] / explicit[best]["tpot_p99"], 3)
    shown = {key: one["tpot_p99"] for key, one in explicit.items()}
    ttft = round(auto["ttft_p99"] / min(one["ttft_p99"] for one in explicit.values()), 3)
    return {
        "load": name,
        "ranks": ranks,
        "requests": len(requests),
        "auto": auto,
        "best": best,
        "best_figures": explicit[best],
        "tpot_p99_over_best": ratio,
        "ttft_p99_over_least": ttft,
        "explicit_tpot_p99": shown,
    }


def wrong(trace: Requests, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for rate in (4, 8, 12):
        requests = trace_load(trace, rate)
        usual = figures(Settings(AUTO), 4, requests, seeds)["tpot_p99"]
        for name in ("kv_token", "guest", "exchange"):
            for factor in (10.0, 0.1, 0.0):
                model: Coefficients = replace(PRIOR, **{name: factor * getattr(PRIOR, name)})
                value = figures(Settings(AUTO, believed=model), 4, requests, seeds)["tpot_p99"]
                rows.append({"rate": rate, "wrong": f"{name} x {factor:g}", "tpot_p99": value, "over": value / usual})
    return rows


def visits(trace: Requests, seeds: int) -> list[dict[str, Any]]:
    rows = []
    machine = replace(run_of("nanocp 65536")[0].machine, outside=0.08)
    for rate in (4, 8, 12):
        for settings in (Settings(AUTO), Settings(16384, moves=True)):
            for room in (4, None):
                found = figures(settings, 4, trace_load(trace, rate), seeds, machine=machine, visits=room)
                rows.append({"rate": rate, "segment_size": settings.segment_size, "room": room, **found})
    return rows


def full(trace: Requests, seeds: int) -> list[dict[str, Any]]:
    """At and beyond what the caches hold, with stock vLLM's two systems. Nobody's prompts take time to fill in."""
    rows = []
    for rate in (12, 16, 20):
        for system, settings in (
            ("stock", Settings()),
            ("tensor", Settings()),
            ("nanocp", Settings(65536)),
            ("nanocp", Settings(65536, moves=True)),
            ("nanocp", Settings(AUTO)),
        ):
            found = []
            for seed in range(seeds):
                run = replace(run_of("nanocp 65536", 4, seed)[0], settings=settings, as_benchmarks=False)
                found.append(simulate(run, system, trace_load(trace, rate)))
            figures_of = {key: round(statistics.median(one[key] for one in found), 3) for key in FIGURES}
            name = f"nanocp {settings.segment_size}{' moves' * settings.moves}" if system == "nanocp" else system
            rows.append({"rate": rate, "system": name, **figures_of})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 32])
    parser.add_argument("--out", type=Path, required=True, help="what is in it already is not simulated again")
    args = parser.parse_args()
    trace = read_trace(args.trace)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    result: dict[str, Any] = {
        "what": "simulated: nothing here was timed on GPUs",
        **about(np),
    }
    for part, of in (("wrong", wrong), ("visits", visits), ("full", full)):
        result[part] = before.get(part) or of(trace, args.seeds)
    result["loads"] = before.get("loads", [])
    done = {(row["ranks"], row["load"]) for row in result["loads"]}
    left = [one for one in loads(trace) if one[1] in args.ranks and (one[1], one[0]) not in done]
    with ProcessPoolExecutor(args.processes) as pool:
        for row in pool.map(partial(compared, seeds=args.seeds), left):
            result["loads"].append(row)
            print(row["ranks"], row["load"], row["best"], row["tpot_p99_over_best"], file=sys.stderr, flush=True)
            write(result, args.out)


if __name__ == "__main__":
    main()
