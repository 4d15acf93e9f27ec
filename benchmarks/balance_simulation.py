#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How even batches and KV are over the ranks: the real placement and home moves on a real trace, in simulated steps.

    python benchmarks/balance_simulation.py --trace TRACE.jsonl [--out FILE]

The trace has one JSON object a line: ``timestamp`` (ms), ``input_length``, ``output_length`` (tokens). It is replayed
``rate`` times as fast as recorded, as often as ``copies`` says, each copy shifted by a part of the trace, so that
many ranks have work. Each policy serves the same requests:

- ``moves``: ``place`` with KV weighed against batch, ``plan_moves`` and ``spill_target`` at every step;
- ``placed``: the same placement, no moves, no spills;
- ``batch_first``: ``place`` as it is by default, by batch and then room; no moves, no spills;
- ``round_robin``: a request is bound to a rank in turn when it arrives: stock data-parallel serving.

A step takes as long as its slowest rank, by a linear cost with some noise, from which the cost model has to learn.
Prompts are computed in chunks, the runs of a sharded one one after another, in full where a scenario has no prefix
caches. Remaining output is known to moves only as the trace's longest output
less what was made. Ratios are the largest rank's value over the mean of all, averaged over time from ``--warm-up`` of
the arrivals on to the last arrival: ``kv`` of blocks held, ``kv_read`` of the blocks that decoding requests read (one
that several share counts for each), ``batch`` of
requests by the rank that computes them, prompts included, ``decodes`` of those that decode.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated_load import POLICIES, Arrivals, Scenario, read_trace, replay
from benchmarks.simulated_ranks import Simulation

# Ranks, how many times as fast as recorded, copies of the trace. Rates at which about half of the cache is in use.
LOADS = {8: (4.4, 1), 32: (17.5, 2), 128: (70.0, 4)}
# More than the ranks can hold: the cache is full all the time, so that blocks run out while requests grow.
FULL = Scenario(ranks=32, rate=10.0, copies=1, capacity=250_000)
# As the second, with prefix caches: requests are placed around what is cached.
PREFIXES = Scenario(ranks=32, rate=17.5, copies=2, prefixes=True)
TARGETS = {"kv_ratio": 1.15, "batch_ratio": 1.25}


def simulate(name: str, scenario: Scenario, arrivals: Arrivals) -> dict[str, Any]:
    """Figures of all policies."""
    results: dict[str, Any] = {}
    for policy in POLICIES:
        start = time.perf_counter()
        results[policy] = Simulation(scenario, arrivals, policy).run().figures()
        print(f"{name}, {policy}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", help="instead of all scenarios, only these numbers of ranks")
    parser.add_argument("--rate", type=float, help="times as fast as recorded")
    parser.add_argument("--copies", type=int, help="of the trace, each shifted in time")
    for name in ("capacity", "block_size", "segment_size", "max_degree", "chunk", "slots"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {getattr(Scenario, name)}")
    for name in ("kv_weight", "warm_up", "noise"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"default {getattr(Scenario, name)}")
    parser.add_argument("--prefixes", action="store_true", default=None, help="with prefix caches")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def scenarios(args: argparse.Namespace) -> dict[str, Scenario]:
    """Scenarios by name, as the command line asks for them."""
    found: dict[str, Scenario] = {}
    for ranks in args.ranks or LOADS:
        rate, copies = LOADS.get(ranks, (0.55 * ranks, 1))
        found[f"{ranks} ranks"] = Scenario(ranks=ranks, rate=rate, copies=copies)
    if not args.ranks:
        found |= {"32 ranks, prefixes": PREFIXES, "full": FULL}
    given = {
        k: v for k, v in vars(args).items() if k in Scenario.__dataclass_fields__ and k != "ranks" and v is not None
    }
    return {name: replace(scenario, **given) for name, scenario in found.items()}


def main() -> None:
    args = arguments()
    trace = read_trace(args.trace)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "trace": {"name": args.trace.name, "requests": len(trace.at)},
        "targets": {**TARGETS, "of": "moves, in the scenarios named by ranks"},
        "scenarios": {},
    }
    for name, scenario in scenarios(args).items():
        arrivals = replay(trace, scenario.rate, scenario.copies)
        policies = simulate(name, scenario, arrivals)
        result["scenarios"][name] = {"parameters": asdict(scenario), "policies": policies}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
