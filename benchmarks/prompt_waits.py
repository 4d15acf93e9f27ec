#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How late first tokens come where all prompts are computed: the real schedulers, simulated steps.

    python benchmarks/prompt_waits.py --trace TRACE.jsonl [--seeds 24] [--rates 5] [--out FILE]
    python benchmarks/prompt_waits.py --trace TRACE.jsonl --ranks 2 --slots 256 --most 130048 --visit 2 \\
        --coefficients '{"base": 0.02, "spread": 8e-6, "prompt": 5e-7, "pair": 7.5e-10}'

The load is that of ``loads.py computed:5xSEED``: lengths of the conversation trace as they are, Poisson arrivals for 18
seconds, requests that come after 4 count. Seeds 0 to 2 are the ones that were measured on 4 H200s
(``gpu_control_plane_4xH200.json``); each further one takes other requests of the trace. They are served by
``NanoCPScheduler`` (``plugin``) and by as many of vLLM's own schedulers as there are ranks (``stock``), to which as
many API servers send each request as vLLM's data-parallel balancer chooses, whose counts are up to 100 ms old. No
request finds its prefix in a cache. A step's length is that of the simulator's machine (``vllm_nanocp.sim.machine``),
with other coefficients where they are given; ``--visit`` is what a pair of a query and a key costs where the query
visits, 1 at home.
**Times are simulated, not measured.**
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from admission_simulation import Scenario, Service, make_schedulers
from kept_result import about, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_nanocp.sim.machine import PRESETS, Machine
from vllm_nanocp.sim.stock import Balancer

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ROOT / "tests" / "data" / "conversation_lengths.json"
MEASURED, WINDOW, SETTLE = 3, 18.0, 4.0
# Rows of the trace from one seed's first request to the next one's.
APART = 400
SETTINGS: dict[str, Any] = {"moves": False, "parallel_prefill": True, "scheduler_processes": False}
FIGURES = ("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p99", "all_s")


@dataclass(frozen=True)
class Ask:
    """A request: when it is sent and when it is at the scheduler (seconds); its prompt and output tokens."""

    sent: float
    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Served:
    """What serves the requests.

    Attributes:
        machine: what its steps take.
        visit: what a pair costs where its query visits, next to one at home.
        ranks: how many.
        slots: requests of each.
        most: tokens of a prompt; longer ones are cut.
    """

    machine: Machine
    visit: float = 1.0
    ranks: int = 4
    slots: int = 1024
    most: int | None = None

    def scenario(self, rate: float) -> Scenario:
        """Default flags on an H200, KV for as many tokens a rank as 40 GB hold with 48 layers."""
        return Scenario(
            ranks=self.ranks,
            rate=rate,
            clients=0,
            capacity=406_896,
            budget=8192,
            slots=self.slots,
            segment_size=65_536,
        )


def draw(trace: Path, seed: int, rate: float, served: Served) -> list[Ask]:
    """The requests of a seed, in the order in which they come to the scheduler."""
    if seed < MEASURED:
        rows = [(prompt, output) for _, prompt, output, _ in json.loads(LENGTHS.read_text())["requests"]]
        rows = rows[100 * seed :] + rows[: 100 * seed]
    else:
        lines = map(json.loads, trace.read_text().splitlines()[APART * seed :])
        rows = [(line["input_length"], line["output_length"]) for line in lines]
    dice, now = random.Random(f"0{seed}"), 0.0
    asks: list[Ask] = []
    while now < WINDOW:
        now += dice.expovariate(rate)
        prompt, output = rows[len(asks) % len(rows)]
        prompt = min(prompt, served.most or prompt)
        asks.append(Ask(now, now + served.machine.frontend * prompt, prompt, max(2, min(600, output))))
    return sorted(asks, key=lambda ask: ask.at)


class ComputedPrompts(Service):
    """Serves the requests; steps are as long as the machine's.

    Args:
        served: what steps take.
        seed: of the front-ends that requests come through.
    """

    def __init__(self, case: Scenario, schedulers: list[Any], asks: Sequence[Ask], served: Served, seed: int) -> None:
        super().__init__(case, schedulers, [(ask.at, ask.prompt, ask.output) for ask in asks])
        self.requests = asks
        self.machine = served.machine.split() if self.plugin else served.machine
        self.visit = served.visit
        self.balancer = Balancer(case.ranks, case.ranks, seed, self._look)
        self.via: dict[str, int] = {}

    def _look(self) -> list[list[float]]:
        return [
            [waiting, running, rank.kv_cache_manager.usage]
            for rank in self.ranks
            for running, waiting in [rank.get_request_counts()]
        ]

    def choose(self, name: str) -> int:
        self.at[name], self.via[name] = self.balancer.choose(self.clock)
        return self.at[name]

    def left(self, name: str) -> None:
        if not self.plugin:
            self.balancer.left(self.at[name], self.via[name])

    def seconds(self, outputs: Sequence[Any], parts: Sequence[Any]) -> float:
        count = self.s.ranks
        kv, decodes, computed, pairs, guests = (np.zeros(count) for _ in range(5))
        rows = {row.req_id: row for row in outputs[0].plan.rows} if self.plugin else {}
        for home, part in enumerate(parts):
            cached = part.scheduled_cached_reqs
            at = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            at |= {new.req_id: new.num_computed_tokens for new in part.scheduled_new_reqs}
            for request_id, tokens in part.num_scheduled_tokens.items():
                row = rows.get(request_id)
                here = at[request_id] if row is None else row.local_tokens
                if tokens == 1:
                    decodes[home] += 1
                    kv[home] += here
                else:
                    computed[home] += tokens
                    pairs[home] += tokens * (here + tokens / 2)
                for holder in () if row is None else row.holders:
                    if tokens == 1:
                        kv[holder.rank] += holder.length
                        guests[holder.rank] += holder.rank != home
                    else:
                        pairs[holder.rank] += tokens * holder.length * (self.visit if holder.rank != home else 1.0)
        return self.machine.seconds(kv, decodes, computed, pairs, guests, np.zeros(count))

    def figures(self) -> dict[str, float]:
        late = [name for name in self.sent if self.requests[int(name[1:])].sent >= SETTLE]
        waits = sorted(self.first[name] - self.requests[int(name[1:])].sent for name in late)
        each = sorted((self.last[n] - self.first[n]) / (self.made[n] - 1) for n in late if self.made[n] > 1)

        def at(values: list[float], q: float) -> float:
            return round(values[min(len(values) - 1, int(q * len(values)))], 4)

        return {
            **{f"ttft_p{q}": at(waits, q / 100) for q in (50, 90, 99)},
            "tpot_p50": at(each, 0.5),
            "tpot_p99": at(each, 0.99),
            "all_s": round(max(self.last.values()) - min(ask.sent for ask in self.requests), 2),
            "steps": self.steps,
            "preemptions": self.preemptions,
        }


def serve(
    model: str,
    trace: Path,
    served: Served,
    settings: dict[str, Any],
    draws: int,
    point: tuple[float, int, dict[str, Any] | None],
) -> dict[str, Any]:
    """Both systems under a seed's load: the plugin's figures, and the medians of stock's over so many draws of the
    front-ends that requests come through, or those of an earlier result."""
    rate, seed, known = point
    case = served.scenario(rate)
    asks = draw(trace, seed, rate, served)

    def run(system: str, number: int) -> dict[str, float]:
        service = ComputedPrompts(case, make_schedulers(model, case, system, settings), asks, served, number)
        service.run()
        return service.figures()

    if known is None:
        stock = [run("stock", 100 * seed + number) for number in range(draws)]
        middle = {key: round(statistics.median(one[key] for one in stock), 4) for key in stock[0]}
        waits = sorted(one["ttft_p99"] for one in stock)
    else:
        middle, waits = known["stock"], known["stock_ttft_p99"]
    plugin = run("plugin", seed)
    return {
        "rate": rate,
        "seed": seed,
        "prompts": len(asks),
        "tokens": sum(ask.prompt for ask in asks),
        "longest": max(ask.prompt for ask in asks),
        "stock": middle,
        "stock_ttft_p99": waits,
        "plugin": plugin,
        "ratios": {key: round(plugin[key] / middle[key], 3) for key in FIGURES},
    }


def summary(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each ratio the median, the largest, and how many are above 1."""
    found = {}
    for key in FIGURES:
        values = [point["ratios"][key] for point in points]
        found[key] = {
            "median": round(statistics.median(values), 3),
            "largest": max(values),
            "above_1": sum(value > 1 for value in values),
            "of": len(values),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--rates", type=float, nargs="+", default=[5.0], help="requests a second")
    parser.add_argument("--draws", type=int, default=3, help="of the front-ends that stock's requests come through")
    parser.add_argument("--before", type=Path, help="an earlier result with the same seeds: stock's figures are its")
    parser.add_argument("--settings", type=json.loads, default={}, help="more of the plugin's, a JSON object")
    parser.add_argument("--ranks", type=int, default=Served.ranks)
    parser.add_argument("--slots", type=int, default=Served.slots, help="requests of a rank (max_num_seqs)")
    parser.add_argument("--most", type=int, help="tokens of a prompt; longer ones are cut")
    parser.add_argument("--visit", type=float, default=Served.visit, help="cost of a pair whose query visits")
    parser.add_argument("--coefficients", type=json.loads, default={}, help="others of the machine, a JSON object")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.tiny_models import make_qwen3_moe

    machine = replace(PRESETS["h200-qwen3-30b-a3b"], **args.coefficients)
    served = Served(machine, args.visit, args.ranks, args.slots, args.most)
    result: dict[str, Any] = {
        **about(np),
        "what": "real schedulers, simulated steps; ratios are the plugin's over the median of stock's draws",
        "machine": asdict(machine),
        "visit": served.visit,
        "scenario": asdict(served.scenario(args.rates[0])),
        "rates": {},
    }
    seeds = range(args.first, args.first + args.seeds)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, spawn) as pool:
        model = str(make_qwen3_moe(folder))
        work = partial(serve, model, args.trace, served, SETTINGS | args.settings, args.draws)
        for rate in args.rates:
            points = []
            known: dict[int, Any] = {}
            if args.before:
                earlier = json.loads(args.before.read_text())["rates"][f"{rate:g}"]["by_seed"]
                known = {point["seed"]: point for point in earlier}
            for point in pool.map(work, [(rate, seed, known.get(seed)) for seed in seeds]):
                points.append(point)
                print(rate, point["seed"], point["ratios"], file=sys.stderr, flush=True)
            result["rates"][f"{rate:g}"] = {"summary": summary(points), "by_seed": points}
            print(rate, json.dumps(result["rates"][f"{rate:g}"]["summary"], indent=1), file=sys.stderr, flush=True)
    write(result, args.out)


if __name__ == "__main__":
    main()
