#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The highest request rate with TPOT P99 under a target: stock data parallel, stock tensor parallel and the plugin.

    python benchmarks/slo.py --ranks 2 --out FOLDER
    python benchmarks/slo.py --ranks 2 --out FOLDER --small --model MODEL      (on CPU: a dry run)

TPOT is the time per output token of a request after its first, P99 is over requests. Systems run one after another on
the same machine with the same requests, each server once for all of its probes. First some requests are served one at a
time: targets like 1.5x are times their TPOT with the reference, the first of --systems. Then, for each phase and seed,
rates are tried by bisection between --rates. Phases:

    decode    prompts are taken as computed, as long as in the conversation trace times --stretch
    prefill   prompts are as in the trace, and computed; --prefill-schedule-interval is given to all systems

A request that has not ended --drain seconds after the last arrival counts as infinitely slow. FOLDER/slo.json has each
probe once it is there; a run with the same folder tries only what is missing and would be the same: server, load and
machine. --phase-limit and --until end a run early; it says what is missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import serving
import trace_load
from loads import CLIENTS, Loads
from prometheus_client.parser import text_string_to_metric_families
from slo_report import draw, summary, table
from slo_search import Record, Target, best_rate, digest, figures, grid, next_rate, tpot

PHASES = ("decode", "prefill")
SYSTEMS = ("stock", "tensor", "nanocp")
IDLE_LIMIT_S = 30.0
SMALL = {  # for a tiny model on CPU
    "rates": "0.5:4:0.5", "window": 6.0, "settle": 1.0, "drain": 30.0, "stretch": 0.1, "shrink": 0.05,
    "max_output": 12, "max_model_len": 4096, "unloaded": 2, "settings": {"segment_size": 1024},
}  # fmt: skip


def say(text: str) -> None:
    print(f"{datetime.datetime.now().strftime('%H:%M:%S')} {text}", flush=True)


def phase_lengths(args: argparse.Namespace, phase: str, seed: int) -> list[tuple[int, int]]:
    """Prompt and output tokens of requests in the order in which they come."""
    if args.trace:
        lines = [json.loads(line) for line in args.trace.read_text().splitlines() if line.strip()]
        pairs = [(line["input_length"], line["output_length"]) for line in lines]
    else:
        pairs = trace_load.lengths(10**6)
    random.Random(seed).shuffle(pairs)
    times = args.stretch if phase == "decode" else args.shrink
    most = args.max_model_len - args.max_output - 1
    return [(max(1, min(most, int(p * times))), max(2, min(args.max_output, o))) for p, o in pairs]


def load_of(args: argparse.Namespace, phase: str) -> dict[str, Any]:
    """All that decides what a probe of a phase sends."""
    keys = ("window", "settle", "drain", "max_output", "unloaded", "limit")
    trace = str(args.trace) if args.trace else "tests/data/conversation_lengths.json"
    scale = args.stretch if phase == "decode" else args.shrink
    return {key: getattr(args, key) for key in keys} | {"phase": phase, "trace": trace, "times": scale}


def command(args: argparse.Namespace, system: str, gpu: bool, port: int) -> list[str]:
    """A server's whole command line."""
    spread = [f"--data-parallel-size={args.ranks}", "--enable-expert-parallel"]
    if system == "nanocp":
        flags = [*spread, "--nanocp", "--nanocp-config", json.dumps({"decode_bench": True, **args.settings})]
    else:
        # Data-parallel experts do not exist in stock vLLM for CPU: there it is one rank.
        parallel = spread if gpu else ["--data-parallel-size=1"]
        if system == "tensor":
            parallel = [f"--tensor-parallel-size={args.ranks}", *(["--enable-expert-parallel"] if gpu else [])]
        flags = [*parallel, "--kv-transfer-config", serving.connector(args.fill)]
    flags += ["--load-format=dummy", f"--max-model-len={args.max_model_len}", "--no-enable-prefix-caching"]
    flags += [f"--prefill-schedule-interval={args.prefill_schedule_interval}"]
    flags += [] if gpu else ["--enforce-eager"]
    flags += [*shlex.split(args.extra), *shlex.split(args.extra_of.get(system, ""))]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(args.model)]
    return [*vllm, *flags, "--host", "127.0.0.1", f"--port={port}"]


class Search:
    """All systems, phases and seeds over one record.

    Args:
        args: of the command.
        machine: ``serving.probe``'s.
    """

    def __init__(self, args: argparse.Namespace, machine: dict[str, Any]) -> None:
        self.args, self.machine, self.gpu = args, machine, machine["gpus"] > 0
        self.record = Record(args.out / "slo.json")
        self.rates = grid(*args.rates)
        self.reference = args.systems[0] if args.reference is None else args.reference
        self.began = time.monotonic()
        env = {system: self.environment(system) for system in SYSTEMS}
        self.of = {
            (system, phase): digest(
                {"command": command(args, system, self.gpu, 0), "env": env[system], "machine": machine}
                | {"load": load_of(args, phase)}
            )
            for system in SYSTEMS
            for phase in PHASES
        }

    def environment(self, system: str) -> dict[str, str]:
        return serving.environment("nanocp" if system == "nanocp" else "stock", self.gpu, True, self.args.fill)

    def targets(self, phase: str) -> list[float | None]:
        """ms; None where the reference has not been measured unloaded."""
        unloaded = self.record.unloaded(self.of[self.reference, phase], phase)
        return [target.of(unloaded) for target in self.args.targets]

    def seen(self, system: str, phase: str, seed: int) -> dict[float, float]:
        return self.record.seen(self.of[system, phase], phase, seed)

    def best(self, system: str, phase: str, seed: int, target: float | None) -> float | None:
        return None if target is None else best_rate(self.rates, self.seen(system, phase, seed), target)

    def next(self, system: str, phase: str, seed: int) -> float | None:
        """The rate that a system is to be tried at next; None: this search has ended, or has no target."""
        seen, targets = self.seen(system, phase, seed), self.targets(phase)
        for target in targets:
            if target is not None and (rate := next_rate(self.rates, seen, target)) is not None:
                return rate
        if self.args.compare and system != self.reference:  # how fast it is where the reference is at its limit
            for target in targets:
                rate = self.best(self.reference, phase, seed, target)
                if rate and rate not in seen:
                    return rate
        return None

    def missing(self, system: str) -> list[str]:
        """What of a system has yet to be measured."""
        found = []
        for phase in self.args.phases:
            if self.record.unloaded(self.of[system, phase], phase) is None:
                found.append(f"{phase} unloaded")
            unknown = None in self.targets(phase)
            seeds = [seed for seed in self.args.seeds if unknown or self.next(system, phase, seed) is not None]
            found += [f"{phase} seed {seed}" for seed in seeds]
        return found

    # -- probes ----------------------------------------------------------------------------------------------------

    def out_of_time(self, phase_began: float) -> bool:
        """Whether another probe might end after a limit."""
        now, needs = time.monotonic(), self.args.window + self.args.drain
        return now + needs > min(phase_began + self.args.phase_limit, self.began + self.args.until)

    def unloaded(self, driver: Loads, system: str, phase: str) -> None:
        """A few requests, each when the one before it has ended."""
        found = []
        for prompt, output in phase_lengths(self.args, phase, 0)[: self.args.unloaded]:
            spec = driver.spec("alone", prompt, output, phase == "prefill")
            found += driver.play([(0.0, spec)], lead=0.3, end=self.args.limit)
        failed = [stream["error"] for stream in found if stream["error"]]
        if failed:
            raise serving.ServerError(f"a request that was alone failed: {failed[0]}")
        each = sorted(value for stream in found if (value := tpot(stream)) is not None)
        result = figures(found, 0.0) | {"tpot_p50": round(each[len(each) // 2], 3)}
        self.record.add(self.of[system, phase], system, phase, None, 0.0, result)
        say(f"{system} {phase}: unloaded TPOT {result['tpot_p50']} ms, TTFT {result['ttft_p50']} ms")

    def probe(self, driver: Loads, system: str, phase: str, seed: int, rate: float) -> None:
        """Poisson arrivals; the same ones for each system."""
        args, dice, at = self.args, random.Random(seed), 0.0
        lengths = phase_lengths(args, phase, seed)
        specs: list[tuple[float, tuple[Any, ...]]] = []
        while (at := at + dice.expovariate(rate)) < args.window or not specs:
            prompt, output = lengths[len(specs) % len(lengths)]
            specs.append((at, driver.spec("r", prompt, output, phase == "prefill")))
        start = time.monotonic()
        found = driver.play(specs, end=args.window + args.drain)
        sent = sorted(stream["sent"] for stream in found)
        late = max(mine - sent[0] - (at - specs[0][0]) for mine, (at, _) in zip(sent, specs, strict=True))
        settle = min(args.settle, sent[-1] - sent[0])
        idle = self.wait_until_idle(driver.url)
        result = figures(found, settle) | {"client_late_ms": round(1e3 * late, 1), "idle_after_s": round(idle, 1)}
        result["took_s"] = round(time.monotonic() - start, 1)
        self.record.add(self.of[system, phase], system, phase, seed, rate, result)
        shown = {k: result[k] for k in ("requests", "unfinished", "tpot_p50", "tpot_p99", "ttft_p99", "took_s")}
        say(
            f"{system} {phase} seed {seed} at {rate:g}/s: {json.dumps(shown)}"
            + (f" {result['errors']}" * bool(result["errors"]))
        )

    def wait_until_idle(self, url: str) -> float:
        """Seconds until nothing runs or waits there: what was given up is aborted."""
        start = time.monotonic()
        while time.monotonic() - start < IDLE_LIMIT_S:
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting")
            families = [family for family in text_string_to_metric_families(text) if family.name in gauges]
            if not sum(sample.value for family in families for sample in family.samples):
                break
            time.sleep(0.2)
        return time.monotonic() - start

    # -- systems ---------------------------------------------------------------------------------------------------

    def phase(self, driver: Loads, system: str, phase: str, server: serving.Server) -> None:
        began = time.monotonic()
        if self.record.unloaded(self.of[system, phase], phase) is None:
            self.unloaded(driver, system, phase)
        shown = [
            f"{t.text} = {ms:.2f} ms" if ms else f"{t.text} unknown"
            for t, ms in zip(self.args.targets, self.targets(phase), strict=True)
        ]
        say(f"{system} {phase}: targets {', '.join(shown)}")
        for seed in self.args.seeds:
            while (rate := self.next(system, phase, seed)) is not None:
                if self.out_of_time(began):
                    say(f"{system} {phase}: no time for seed {seed} at {rate:g}/s")
                    return
                self.probe(driver, system, phase, seed, rate)
                if server.process.poll() is not None:
                    raise serving.ServerError(f"the server ended:\n{server.tail()}")

    def run(self, system: str, pool: concurrent.futures.Executor) -> bool:
        """Measure what is missing of a system; whether its server did not fail."""
        args, missing = self.args, self.missing(system)
        if not missing:
            say(f"{system}: all is there")
            return True
        if self.began + args.until < time.monotonic() + args.window:
            say(f"{system}: no time; missing: {', '.join(missing)}")
            return True
        port, env = serving.free_port(), self.environment(system)
        line = command(args, system, self.gpu, port)
        log = args.out / f"{system}.log"
        say(f"{system}: missing: {', '.join(missing)}; starts: {shlex.join(line)}   (log: {log})")
        about: dict[str, Any] = {"system": system, "command": shlex.join(line), "env": env}
        for phase in args.phases:
            self.record.content["servers"][self.of[system, phase]] = about | {"load": load_of(args, phase)}
        left = self.began + args.until - time.monotonic()
        try:
            with serving.running(line, env, port, log) as server:
                about["start_s"] = server.wait(min(args.start_timeout, left))
                say(f"{system}: healthy after {about['start_s']} s")
                driver = Loads(args, server.url, pool)
                warm = [(0.0, driver.spec("warm", 64, 8, compute)) for compute in (False, True) for _ in range(4)]
                driver.play(warm, lead=0.3, end=args.limit)
                for phase in args.phases:
                    self.phase(driver, system, phase, server)
                for phase in args.phases:
                    self.record.content["servers"][self.of[system, phase]] |= about | {"log": server.notes()}
                self.record.save()
        except (serving.ServerError, OSError) as error:
            say(f"{system}: FAILED: {error}")
            return False
        return True

    def results(self) -> list[dict[str, Any]]:
        """The rates found, by phase, target and system."""
        return [
            summary(self, phase, target, system)
            for phase in self.args.phases
            for target in range(len(self.args.targets))
            for system in self.args.systems
        ]


def _rates(text: str) -> tuple[float, float, float]:
    low, high, step = map(float, text.split(":"))
    if not 0 < low <= high or not 0 < step < math.inf:
        raise ValueError(text)
    return low, high, step


def _targets(text: str) -> list[Target]:
    return [Target.parse(one) for one in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _of_system(text: str) -> tuple[str, str]:
    system, _, flags = text.partition("=")
    if system not in SYSTEMS:
        raise ValueError(text)
    return system, flags


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of slo.json, plots and logs; a rerun goes on there")
    add("--systems", type=serving.names(SYSTEMS), default=list(SYSTEMS), help=f"of {','.join(SYSTEMS)}")
    add("--reference", choices=SYSTEMS, help="whose unloaded TPOT targets are times of (default: the first system)")
    add("--phases", type=serving.names(PHASES), default=list(PHASES), help=f"of {','.join(PHASES)}")
    add("--ranks", type=int, default=4, help="GPUs")
    add("--targets", type=_targets, default=_targets("1.5x,2x"), help="1.5x: times the unloaded TPOT; or ms")
    add("--rates", type=_rates, default=_rates("1:16:1"), help="lowest:highest:step, requests a second")
    add("--seeds", type=_numbers, default=[0], help="several with commas")
    add("--compare", action="store_true", help="try all systems at the reference's highest rate, too")
    add("--settings", type=json.loads, default={}, help="the plugin's settings, a JSON object (default: its defaults)")
    add("--model", type=Path, help="model folder; if it is not there, one of Qwen3-30B-A3B's shape is written")
    add("--max-model-len", type=int, default=520_000)
    add("--trace", type=Path, help="JSON lines with input_length and output_length (default: the tests' part of one)")
    add("--stretch", type=float, default=4.0, help="times a prompt's length in the trace, decode")
    add("--shrink", type=float, default=1.0, help="the same, prefill")
    add("--max-output", type=int, default=600)
    add("--prefill-schedule-interval", type=int, default=1)
    add("--window", type=float, default=25.0, help="seconds of arrivals")
    add("--settle", type=float, default=8.0, help="requests of the first seconds do not count")
    add("--drain", type=float, default=20.0, help="seconds after the window until requests are given up")
    add("--unloaded", type=int, default=4, help="requests that are served alone")
    add("--fill", type=float, default=0.0, help="KV of prompts that are not computed; 0: tokens take more experts")
    add("--extra", default="", help="more vllm serve flags, for every system")
    add("--extra-of", type=_of_system, action="append", default=[], help="SYSTEM=FLAGS, for one of them")
    add("--start-timeout", type=float, default=420.0)
    add("--phase-limit", type=float, default=1e9, help="seconds of a phase of a system")
    add("--until", type=float, default=1e9, help="seconds of the run")
    add("--limit", type=float, default=300.0, help="seconds until a single request is given up")
    add("--small", action="store_true", help="sizes for a tiny model on CPU, where these are not given")
    add("--report", action="store_true", help="start nothing, report what is there")
    small, _ = parser.parse_known_args()
    if small.small:
        parser.set_defaults(**SMALL | {"rates": _rates(SMALL["rates"])})
    args = parser.parse_args()
    args.extra_of, args.seed = dict(args.extra_of), "slo"
    return args


def main() -> int:
    args = parse_args()
    for number in serving.ENDINGS:
        signal.signal(number, serving.end)
    args.out.mkdir(parents=True, exist_ok=True)
    args.model = args.model or args.out / "model"
    if not (args.model / "config.json").exists():
        serving.write_model(args.model)
    search = Search(args, serving.probe())
    if not search.gpu:
        say("no GPU: a dry run; stock is one rank, and its figures mean nothing")
    content = search.record.content
    shown = {key: str(value) for key, value in vars(args).items()}
    run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": search.machine}
    content["runs"].append(run | {"command": shlex.join(["python", *sys.argv]), "settings": shown})
    spawn = multiprocessing.get_context("spawn")
    passed = []
    if not args.report:
        with concurrent.futures.ProcessPoolExecutor(CLIENTS, mp_context=spawn) as pool:
            passed = [search.run(system, pool) for system in args.systems]
    content["results"] = results = search.results()
    search.record.save()
    print(table(results))
    draw(search, args.out)
    for system in args.systems:
        if missing := search.missing(system):
            say(f"{system}: still missing: {', '.join(missing)}; the same command goes on")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
