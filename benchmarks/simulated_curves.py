#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The simulator next to what was measured: request rate against time per output token, and more ranks than that.

    python benchmarks/simulated_curves.py --trace TRACE.jsonl [--out FILE] [--ranks 8 32 128] [--parts computed gap]

``curves``: Qwen3-30B-A3B's shape on 4 H200s, decode only, lengths of the conversation trace from its 2,000th request
on, prompts stretched four times (at most 500,000 tokens), outputs of 2 to 600 tokens, Poisson arrivals for 25 s;
requests that come after 8 s count. Each point is simulated with several seeds (noise of steps and of arrivals,
front-ends that requests come through): the median and the range. A percentile of 70 to 200 requests is one of the two
largest values, which may be one gap of a request of two tokens.

``computed``: as ``loads.py computed:5x0`` to ``5x2``, whose prompts are computed (gpu_scheduler_processes_4xH200.json).
How a prompt token's time is divided between its rank and all ranks was fitted to the plugin's three times for all.

``half``: as ``loads.py computed:5x0`` to ``5x2`` on two H200s with half of the layers (gpu_computed_2xH200.json).
Stock's figures depend on which of its API servers each request comes through: the median and the range of all seeds.

``chats``: short chats beside prompts of 100,000 to 1,000,000 tokens, all computed. Never measured.

``gap``: the same loads with ``prefill_gap``, over simulated stock. Never measured.

``larger``: the same load a rank, on more of them. No step of more than four ranks was measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept_result import about, write
from vllm_nanocp.placement.prefill_steps import PrefillGap
from vllm_nanocp.sim.figures import Run, simulate
from vllm_nanocp.sim.machine import PRESETS
from vllm_nanocp.sim.nanocp import Settings
from vllm_nanocp.sim.trace import Requests, poisson, read_trace, stretched

ROOT = Path(__file__).resolve().parents[1]
# TPOT p99, ms, by requests a second: one run each, 2026-11-27. Which ones coefficients were fitted to.
MEASURED: dict[str, dict[float, float]] = {
    "stock": {4: 23.0, 6: 38.6, 8: 52.7, 12: 48.0},
    "tensor": {4: 13.0, 8: 36.3, 12: 63.0},
    "nanocp 65536": {4: 14.4, 6: 16.0, 8: 18.9, 10: 24.8, 12: 265.0},
    "nanocp 16384": {8: 18.3},
}
FITTED = {("stock", 4), ("stock", 8), ("tensor", 8), ("tensor", 12)}
TOLERANCE = 0.1
WINDOW, SETTLE = 25.0, 8.0
# The load of computed prompts: requests a second, seconds of arrivals, and those after which requests count; KV tokens.
COMPUTED_RATE, COMPUTED_WINDOW, COMPUTED_SETTLE, COMPUTED_CAPACITY = 5.0, 20.0, 4.0, 406_901
# The same on two ranks, with half of the layers: seconds, tokens of a prompt at most, and the systems of that result.
HALF_WINDOW, HALF_MOST = 18.0, 130_048
SHARE = PrefillGap(ms=None, decode_steps=0, decode_share=0.05)
# Chunks as large as fit, which were the default when it was measured.
WHOLE = Settings(chunk_tokens=8192)
HALF = {"stock": Settings(), "nanocp": WHOLE, "chunks of 4096": Settings(chunk_tokens=4096)}
# Never measured.
HALF_OTHERS = {
    "16384": replace(WHOLE, segment_size=16_384),
    "16384, chunks of 4096": Settings(16_384, chunk_tokens=4096),
    "auto, chunks of 4096": Settings("auto", chunk_tokens=4096),
    "chunks of 4096, decode_share 0.05": Settings(chunk_tokens=4096, prefill_gap=SHARE),
    "16384, chunks of 4096, decode_share 0.05": Settings(16_384, chunk_tokens=4096, prefill_gap=SHARE),
    "200 ms, 2 decode steps": replace(WHOLE, prefill_gap=PrefillGap(ms=200.0, decode_steps=2)),
}
# Short chats, by ranks so many a second, of which a hundredth has 100,000 to 1,000,000 tokens.
CHATS, CHATS_PART, CHATS_WINDOW, CHATS_CAPACITY = {4: 10.0, 8: 15.0}, 0.01, 20.0, 1_060_000
BESIDE = ("tpot_p50", "ttft_p50", "ttft_p99", "preemptions")
GAPS = {
    "off": None,
    "on": PrefillGap(),
    "200 ms": PrefillGap(ms=200.0),
    "400 ms, no decode steps": PrefillGap(decode_steps=0),
    "200 ms, 2 decode steps": PrefillGap(ms=200.0, decode_steps=2),
}
PARTS = ("curves", "computed", "half", "chats", "gap", "larger")
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
# A rank's share of these rates on four.
LARGER, LARGER_WINDOW = (4.0, 6.0, 8.0), 60.0


def load(trace: Requests, rate: float, seconds: float = WINDOW) -> Requests:
    """Requests of the load, at so many a second."""
    longer = stretched(trace.pick(range(min(2000, len(trace) // 2), len(trace))), 4.0, 500_000, 600)
    return poisson(replace(longer, output=np.maximum(2, longer.output)), rate, seconds, 17)


def run_of(system: str, ranks: int = 4, seed: int = 0) -> tuple[Run, str]:
    """What is simulated for a system of ``MEASURED``."""
    name, *rest = system.split()
    settings = Settings(segment_size=int(rest[0]) if rest else 65536, moves="moves" in rest)
    machine = PRESETS["h200-qwen3-30b-a3b-few-experts"]
    run = Run(machine, ranks, settings=settings, decode_only=True, as_benchmarks=True, noise=0.05, seed=seed)
    return replace(run, settle=SETTLE), name


def point(trace: Requests, system: str, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Measured and simulated."""
    found = []
    for seed in seeds:
        run, name = run_of(system, seed=seed)
        found.append(simulate(run, name, load(trace, rate)))
    values = [f["tpot_p99"] for f in found]
    measured, simulated = MEASURED[system][rate], statistics.median(values)
    ratio = simulated / measured
    return {
        "system": system,
        "rate": rate,
        "measured_tpot_p99": measured,
        "simulated_tpot_p99": round(simulated, 1),
        "range": [round(min(values), 1), round(max(values), 1)],
        "ratio": round(ratio, 3),
        "fitted": (system, rate) in FITTED,
        "holds": abs(ratio - 1) <= TOLERANCE,
        **{
            key: statistics.median(f[key] for f in found) for key in ("tpot_p50", "ttft_p50", "ttft_p99", "preemptions")
        },
    }


def computed_load(seed: int, window: float = COMPUTED_WINDOW) -> Requests:
    """The requests that ``loads.py`` sends for ``computed:5xSEED`` in so many seconds."""
    rows = json.loads((ROOT / "tests" / "data" / "conversation_lengths.json").read_text())["requests"][:1000]
    rows = rows[100 * seed :] + rows[: 100 * seed]
    dice, at = random.Random(f"0{seed}"), [0.0]
    while at[-1] < window:
        at.append(at[-1] + dice.expovariate(COMPUTED_RATE))
    prompt, output = ([row[i] for row in rows[: len(at) - 1]] for i in (1, 2))
    return Requests(np.array(at[1:]), np.array(prompt), np.clip(output, 2, 600))


def _in_full(run: Run, system: str, requests: Requests, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """By the simulator's own seeds what it finds, and ``all_s``: from the first arrival to the last token."""
    found = [simulate(replace(run, seed=one), system, requests) for one in seeds]
    for one in found:
        one["all_s"] = round(float(requests.output.sum()) / one["tokens_per_s"], 2)
    return found


def _computed(system: str, seed: int, seeds: Sequence[int], settings: Settings) -> dict[str, float]:
    """Medians over the simulator's own seeds."""
    machine, requests = PRESETS["h200-qwen3-30b-a3b"], computed_load(seed)
    run = Run(machine, 4, capacity=COMPUTED_CAPACITY, slots=1024, settle=COMPUTED_SETTLE, noise=0.05, settings=settings)
    found = _in_full(run, system, requests, seeds)
    return {key: statistics.median(one[key] for one in found) for key in (*FIGURES, "all_s")}


def computed(measured: dict[str, Any], system: str, seed: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Measured and simulated, prompts computed."""
    found = _computed(system, seed, seeds, WHOLE)
    (row,) = measured["raw"][system][f"computed:5x{seed}"]
    row = row | {"all_s": COMPUTED_WINDOW + row["drain_s"]}
    figures = {
        key: {"measured": row[key], "simulated": value, "ratio": round(value / row[key], 2)}
        for key, value in found.items()
    }
    return {"system": system, "seed": seed, **figures}


def half(measured: dict[str, Any], seed: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Measured and simulated, prompts computed on two ranks; and settings that were never measured, over stock."""
    machine, requests = PRESETS["h200-qwen3-30b-a3b-24-layers"], computed_load(seed, HALF_WINDOW)
    requests = replace(requests, prompt=np.minimum(requests.prompt, HALF_MOST))
    found: dict[str, Any] = {"seed": seed, "machine": machine.name}
    stock: dict[str, float] = {}
    for name, settings in (HALF | HALF_OTHERS).items():
        run = Run(machine, 2, settings=settings, settle=COMPUTED_SETTLE, noise=0.03)
        runs = _in_full(run, "stock" if name == "stock" else "nanocp", requests, seeds)
        figures = {}
        for key in (*FIGURES, "all_s"):
            values = sorted(one[key] for one in runs)
            value = statistics.median(values)
            stock.setdefault(key, value)
            figures[key] = {"simulated": value, "range": [values[0], values[-1]]}
            figures[key] |= {} if name == "stock" else {"over_stock": round(value / stock[key], 2)}
            if name in HALF:
                (row,) = measured["raw"][name][f"computed:5x{seed}"]
                real = row[key.replace("all_s", "took_s")]
                figures[key] |= {"measured": real, "ratio": round(value / real, 2)}
        found[name] = figures
    return found


def chats_load(seed: int, rate: float) -> Requests:
    """Short chats, and long requests among them: one at least."""
    dice = np.random.default_rng(seed)
    at = np.cumsum(dice.exponential(1 / rate, int(2 * rate * CHATS_WINDOW) + 10))
    at = at[at < CHATS_WINDOW]
    short = np.exp(dice.normal(6.5, 1.0, len(at))).clip(16, 8000).astype(np.int64)
    output = np.exp(dice.normal(5.3, 0.7, len(at))).clip(2, 600).astype(np.int64)
    long = dice.random(len(at)) < CHATS_PART
    long[len(at) // 3] |= not long.any()
    return Requests(at, np.where(long, dice.integers(100_000, 1_000_001, len(at)), short), output)


def chats(ranks: int, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Settings over the median of three draws of stock's API servers: median and largest of the seeds."""
    machine = PRESETS["h200-qwen3-30b-a3b-24-layers"]
    run = Run(machine, ranks, capacity=CHATS_CAPACITY, settle=COMPUTED_SETTLE, noise=0.03)
    ratios: dict[str, dict[str, list[float]]] = {}
    ours = {name: settings for name, settings in (HALF | HALF_OTHERS).items() if name != "stock"}
    for seed in seeds:
        requests = chats_load(seed, rate)
        draws = [simulate(replace(run, seed=100 * seed + one), "stock", requests) for one in range(3)]
        stock = {key: statistics.median(one[key] for one in draws) for key in FIGURES}
        for name, settings in ours.items():
            found = simulate(replace(run, seed=seed, settings=settings), "nanocp", requests)
            for key in FIGURES:
                ratios.setdefault(name, {}).setdefault(key, []).append(found[key] / stock[key])
    middle = {
        name: {key: [round(statistics.median(v), 2), round(max(v), 2)] for key, v in keys.items()}
        for name, keys in ratios.items()
    }
    return {"ranks": ranks, "rate": rate, "machine": machine.name, "over_stock": middle}


def gap(seed: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Simulated only: settings of the plugin's over stock, with and without ``prefill_gap``."""
    stock = _computed("stock", seed, seeds, Settings())
    found: dict[str, Any] = {"seed": seed, "stock": stock}
    for segment in (65536, 16384):
        for name, rule in GAPS.items():
            ours = _computed("nanocp", seed, seeds, replace(WHOLE, segment_size=segment, prefill_gap=rule))
            ratios = {key: round(value / stock[key], 2) for key, value in ours.items()}
            found[f"segment_size {segment}, prefill_gap {name}"] = {"simulated": ours, "over_stock": ratios}
    return found


def larger(trace: Requests, ranks: int, rate: float, system: str) -> dict[str, Any]:
    run, name = run_of(system, ranks)
    began = time.perf_counter()
    # Both compute the prompts of preempted requests again, and neither takes time to fill in KV.
    run = replace(run, until=LARGER_WINDOW, as_benchmarks=False, frontends=8)
    found = simulate(run, name, load(trace, rate * ranks / 4, LARGER_WINDOW))
    return {
        "ranks": ranks,
        "rate": rate * ranks / 4,
        "system": system,
        **found,
        "took_s": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trace = read_trace(args.trace)
    result: dict[str, Any] = {
        **about(np),
        "machine": asdict(run_of("stock")[0].machine),
        **{part: [] for part in args.parts},
    }
    for system, rates in MEASURED.items() if "curves" in args.parts else ():
        for rate in rates:
            result["curves"].append(point(trace, system, rate, range(args.seeds)))
            print(result["curves"][-1], file=sys.stderr, flush=True)
    results = ROOT / "benchmarks" / "results"
    measured = json.loads((results / "gpu_scheduler_processes_4xH200.json").read_text())
    on_two = json.loads((results / "gpu_computed_2xH200.json").read_text())
    for seed in range(3):
        if "half" in args.parts:
            result["half"].append(half(on_two, seed, range(args.seeds)))
            print(result["half"][-1], file=sys.stderr, flush=True)
        for system in ("stock", "nanocp") if "computed" in args.parts else ():
            result["computed"].append(computed(measured, system, seed, range(args.seeds)))
            print(result["computed"][-1], file=sys.stderr, flush=True)
        if "gap" in args.parts:
            result["gap"].append(gap(seed, range(args.seeds)))
            print(result["gap"][-1], file=sys.stderr, flush=True)
    for ranks, rate in CHATS.items() if "chats" in args.parts else ():
        result["chats"].append(chats(ranks, rate, range(min(args.seeds, 10))))
        print(result["chats"][-1], file=sys.stderr, flush=True)
    for ranks in args.ranks if "larger" in args.parts else ():
        for rate in LARGER:
            for system in ("nanocp 65536", "nanocp 65536 moves", "stock", "round-robin"):
                result["larger"].append(larger(trace, ranks, rate, system))
                print(result["larger"][-1], file=sys.stderr, flush=True)
    write(result, args.out)


if __name__ == "__main__":
    main()
