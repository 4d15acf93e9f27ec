#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a step waits for, copies and runs on the GPU, from the traces that vLLM's workers leave (torch's profiler).

    python benchmarks/step_trace.py FOLDER PREFIX [--step FILE.json.gz]

Steps are told apart by vLLM's own annotation ``execute_...``. Figures are medians over the steps of a trace, of the
first worker: calls that make a CPU wait for a GPU, copies from GPU to CPU, kernels, NCCL's kernels and their time,
milliseconds in which a kernel ran, and the kernels that take longest. ``--step`` writes one step's events as a trace.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuCtxSynchronize",
         "cuStreamSynchronize", "cuEventSynchronize")  # fmt: skip
TOP = 12
Event = dict[str, Any]


def load(folder: Path, prefix: str) -> list[Event]:
    """All events with a duration of the first worker's trace, by their start."""
    paths = sorted(path for path in folder.glob(f"{prefix}*.json*") if "async_llm" not in path.name)
    if not paths:
        raise FileNotFoundError(f"no trace {prefix}*.json in {folder}: {[p.name for p in folder.glob('*')]}")
    opener = gzip.open if paths[0].suffix == ".gz" else open
    with opener(paths[0], "rt") as source:
        events = json.load(source)["traceEvents"]
    return sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])


def steps(events: list[Event]) -> list[tuple[float, float]]:
    """From each annotation to the next, in the trace's time; the first and last, which may be cut, left out."""
    starts = [e["ts"] for e in events if e.get("cat") == "user_annotation" and str(e["name"]).startswith("execute_")]
    return list(itertools.pairwise(starts))[1:-1]


def busy(kernels: list[Event]) -> float:
    """Milliseconds in which at least one of them ran."""
    total, until = 0.0, 0.0
    for e in kernels:
        end = e["ts"] + e["dur"]
        total += max(0.0, end - max(e["ts"], until))
        until = max(until, end)
    return total / 1e3


def of_step(events: list[Event]) -> dict[str, float]:
    """Figures of the events that start in one step."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    nccl = [e for e in kernels if "nccl" in str(e["name"]).lower()]
    runtime = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {
        "waits": sum(e["name"] in WAITS for e in runtime),
        "copies_to_cpu": sum("DtoH" in str(e["name"]) for e in events if e.get("cat") == "gpu_memcpy"),
        "graph_launches": sum("GraphLaunch" in str(e["name"]) for e in runtime),
        "kernels": len(kernels),
        "nccl_kernels": len(nccl),
        "nccl_ms": round(sum(e["dur"] for e in nccl) / 1e3, 3),
        "busy_ms": round(busy(kernels), 3),
    }


def summarise(events: list[Event]) -> dict[str, Any]:
    """Medians over the steps, and the kernels of all of them by time: (name, launches and microseconds a step)."""
    cuts = steps(events)
    inside = [[e for e in events if low <= e["ts"] < high] for low, high in cuts]
    found = [of_step(mine) for mine in inside]
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for e in (e for mine in inside for e in mine if e.get("cat") == "kernel"):
        times[str(e["name"])[:100]] += e["dur"]
        launches[str(e["name"])[:100]] += 1
    waits = Counter(e["name"] for mine in inside for e in mine if e.get("name") in WAITS)
    count = max(1, len(cuts))
    return {
        "steps": len(cuts),
        "per_step": {key: statistics.median(step[key] for step in found) for key in (found[0] if found else {})},
        "waits_per_step": {name: round(n / count, 2) for name, n in waits.items()},
        "kernels": [(name, launches[name] / count, round(t / count, 1)) for name, t in times.most_common(TOP)],
    }


def write_step(events: list[Event], path: Path) -> None:
    """One step in the middle, as a trace that browsers show (chrome://tracing, Perfetto)."""
    cuts = steps(events)
    low, high = cuts[len(cuts) // 2]
    with gzip.open(path, "wt") as sink:
        json.dump({"traceEvents": [e for e in events if low <= e["ts"] < high]}, sink)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("prefix")
    parser.add_argument("--step", type=Path, help="write one step there")
    args = parser.parse_args()
    events = load(args.folder, args.prefix)
    print(json.dumps(summarise(events), indent=1))
    if args.step:
        write_step(events, args.step)


if __name__ == "__main__":
    main()
