#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much a long request slows the short ones: stock vLLM and the plugin, one after the other on one machine.

    python benchmarks/decode_interference.py --ranks 4 --out FOLDER        # serve, measure, print the table
    python benchmarks/decode_interference.py --report FOLDER               # only print it again

Each system is started with the same flags and gets the same streams over the OpenAI API. Scenarios:

    A          --shorts requests alone
    B          the same beside one request of --long tokens, which decodes before they start
    C          the same beside two requests of half as many, sent --stagger seconds apart
    capacity   one request of --capacity tokens: is it admitted, does it decode
    prefill    while the shorts decode, a prompt of --prefill tokens is computed
    load       --load-requests of a conversation trace, --load-concurrency at once, all prompts computed
    trace      some steps of A and of B under torch's profiler; what they wait for and run on GPUs (step_trace.py)

Only the prompts of ``load`` and the long one of ``prefill`` are computed: the KV of others is taken as there (vLLM's
DecodeBenchConnector for stock, the key ``decode_bench`` for the plugin), so that long contexts cost no prefill time.
Figures are gaps between the chunks of a stream, in ms; the first 10 of each stream do not count, those of the shorts
only while every long request decodes.
FOLDER gets SYSTEM.json (after each scenario, so a run that is killed keeps what it has), logs, and report.json.

On a machine without a GPU this is a smoke test: eager, and stock with one rank. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import serving
import step_trace
import trace_load
from interference_report import SYSTEMS, failures, report
from serving import Server, ServerError, write_json
from streams import Stream, StreamError, make_stream, percentile, play, post

SCENARIOS = ("A", "B", "C", "capacity", "prefill", "load", "trace")
ONCE = ("capacity", "load", "trace")  # repeats would say the same
SKIP = 10  # gaps at the start of a stream, while others start
BUNCHED_MS = 0.1  # no model steps so fast: client or API server was late, and read several tokens at once
CAPACITY_TOKENS, PREFILL_OUTPUT, TRACED_STEPS = 500, 16, 10
Window = tuple[float, float]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def long_tokens(args: argparse.Namespace, count: int) -> int:
    """Long requests must outlast the shorts, also the first of two, which waits for the second."""
    return max(int(args.long_output), args.tokens + 80 * count)


def model_length(args: argparse.Namespace, system: str) -> int:
    """What the user said for this system, or what the longest request of the scenarios needs."""
    if system == "stock" and args.stock_max_model_len is not None:
        return int(args.stock_max_model_len)
    if args.max_model_len is not None:
        return int(args.max_model_len)
    needs = [args.short_prompt + args.tokens]
    if {"B", "C", "trace"} & set(args.scenarios):
        needs.append(args.long + long_tokens(args, 2))
    if "capacity" in args.scenarios:
        needs.append(args.capacity + CAPACITY_TOKENS)
    if "prefill" in args.scenarios:
        needs.append(args.prefill + PREFILL_OUTPUT)
    if "load" in args.scenarios:
        needs.append(max(map(sum, trace_load.lengths(args.load_requests))))
    return max(needs) + 16


def summary(gaps: Sequence[float], streams: Sequence[Stream], of: int | None = None) -> dict[str, Any]:
    """Figures in ms; ``of`` is how many gaps there were before the window was applied."""
    values = sorted(1e3 * gap for gap in gaps)
    firsts = [1e3 * (stream.times[0] - stream.sent) for stream in streams if stream.times]

    def at(q: float) -> float | None:
        return round(percentile(values, q), 3) if values else None

    return {
        "streams": len(streams),
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "mean": round(statistics.fmean(values), 3) if values else None,
        "ttft": round(statistics.median(firsts), 1) if firsts else None,
        "gaps": len(values),
        "bunched": sum(value < BUNCHED_MS for value in values),
        "gaps_before_window": len(values) if of is None else of,
        "chunks": sum(len(stream.times) for stream in streams),
        "tokens": sum(stream.tokens for stream in streams),
    }


def within(streams: Sequence[Stream], window: Window, skip: int, overlap: bool = False) -> dict[str, Any]:
    """Figures of the gaps inside a window; with ``overlap``, of those that touch it."""
    low, high = window
    gaps = [gap for stream in streams for gap in stream.gaps(skip)]
    if overlap:
        kept = [end - start for start, end in gaps if end > low and start < high]
    else:
        kept = [end - start for start, end in gaps if start >= low and end <= high]
    return summary(kept, streams, len(gaps))


def common(streams: Sequence[Stream]) -> Window:
    """From when all of them decode to when the first one ends."""
    return max(s.times[0] for s in streams), min(s.times[-1] for s in streams)


class Driver:
    """Plays scenarios on one server."""

    def __init__(self, args: argparse.Namespace, server: Server, system: str) -> None:
        self.args, self.system = args, system
        self.url = server.url
        config = json.loads((Path(args.model) / "config.json").read_text())
        self.vocab = int(config["vocab_size"])

    def _streams(
        self, name: str, count: int, prompt: int, tokens: int, seed: str, ready_after: int = 1, compute: bool = False
    ) -> list[Stream]:
        rest = (prompt, tokens, str(self.args.model), self.vocab, seed, ready_after, compute)
        return [make_stream(name, number, *rest) for number in range(count)]

    def _play(self, phases: list[list[Stream]], result: dict[str, Any], meanwhile: Any = None) -> None:
        """Play the phases; the raw streams are kept also if they fail."""
        streams = [stream for phase in phases for stream in phase]
        try:
            playing = play(self.url, phases, self.args.stagger, self.args.scenario_timeout, meanwhile)
            late = asyncio.run(playing)
            result["client_late_ms"] = round(1e3 * late, 1)
        finally:
            origin = streams[0].sent
            result["streams"] = [stream.raw(origin) for stream in streams if stream.sent]

    def warm_up(self) -> None:
        self._play([self._streams("short", 16, self.args.short_prompt, 32, "warm-up")], {})

    def interference(self, scenario: str, seed: str, result: dict[str, Any]) -> None:
        """A, B and C."""
        args, count = self.args, {"A": 0, "B": 1, "C": 2}[scenario]
        longs: list[Stream] = []
        if count:
            longs = self._streams("long", count, args.long // count, long_tokens(args, count), seed)
        shorts = self._streams("short", args.shorts, args.short_prompt, args.tokens, seed)
        self._play([longs, shorts] if longs else [shorts], result)
        if not longs:
            result["short"] = within(shorts, (-math.inf, math.inf), SKIP)
            return
        result["short"] = within(shorts, common(longs), SKIP)
        result["long"] = within(longs, common(shorts), SKIP)
        if result["short"]["gaps"] < result["short"]["gaps_before_window"] / 2:
            raise StreamError("the long request ended before most tokens of the shorts: raise --long-output")

    def capacity(self, seed: str, result: dict[str, Any]) -> None:
        """A refusal is a result here, not a failure."""
        streams = self._streams("long", 1, self.args.capacity, CAPACITY_TOKENS, seed)
        try:
            self._play([streams], result)
        except StreamError as error:
            result["error"] = str(error)[:400]
        result["status"] = streams[0].status
        result["admitted"] = bool(streams[0].times)
        result["long"] = within(streams, (-math.inf, math.inf), SKIP)

    def prefill(self, seed: str, result: dict[str, Any]) -> None:
        """The shorts' gaps before the long prompt is sent, and until its first token."""
        args = self.args
        steps = math.ceil(args.prefill / args.max_num_batched_tokens)
        tokens = max(args.tokens, 100 + 3 * steps)
        shorts = self._streams("short", args.shorts, args.short_prompt, tokens, seed, ready_after=2 * SKIP)
        longs = self._streams("long", 1, args.prefill, PREFILL_OUTPUT, seed, compute=True)
        self._play([shorts, longs], result)
        sent, first = longs[0].sent, longs[0].times[0]
        result["before"] = within(shorts, (-math.inf, sent), SKIP)
        result["short"] = within(shorts, (sent, first), SKIP, overlap=True)
        result["long"] = within(longs, (-math.inf, math.inf), 0)

    def load(self, seed: str, result: dict[str, Any]) -> None:
        args, model = self.args, str(self.args.model)
        streams = [
            make_stream("load", i, prompt, output, model, self.vocab, seed, compute=True)
            for i, (prompt, output) in enumerate(trace_load.lengths(args.load_requests))
        ]
        before = trace_load.counters(self.url)
        playing = trace_load.closed_loop(self.url, streams, args.load_concurrency, args.scenario_timeout)
        result["load"] = trace_load.figures(streams, asyncio.run(playing))
        after = trace_load.counters(self.url)
        result["counters"] = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def trace(self, seed: str, result: dict[str, Any]) -> None:
        """Under the profiler while the shorts decode, then while a long one does too."""
        args, folder = self.args, Path(serving.trace_folder(self.args, self.system))
        for scenario in ("A", "B"):
            shorts = self._streams("short", args.shorts, args.short_prompt, args.tokens, seed, ready_after=2 * SKIP)
            longs = self._streams("long", scenario == "B", args.long, long_tokens(args, 1), seed)

            async def profile(prefix: str = scenario) -> None:
                body = {"profile_prefix": prefix, "max_iterations": TRACED_STEPS}
                await post(f"{self.url}/start_profile", body)
                await asyncio.sleep(2.0)
                await post(f"{self.url}/stop_profile", {})

            self._play([longs, shorts] if longs else [shorts], {}, profile)
            events = step_trace.load(folder, scenario)
            result[scenario] = step_trace.summarise(events)
            step_trace.write_step(events, args.out / f"{self.system}-{scenario}-step.json.gz")

    def run(self, scenario: str, seed: str) -> dict[str, Any]:
        """One repeat's figures; ``failed`` says why there are none."""
        result: dict[str, Any] = {}
        try:
            if scenario in ("A", "B", "C"):
                self.interference(scenario, seed, result)
            elif scenario == "capacity":
                self.capacity(seed, result)
            elif scenario == "prefill":
                self.prefill(seed, result)
            elif scenario == "load":
                self.load(seed, result)
            else:
                self.trace(seed, result)
        except StreamError as error:
            result["failed"] = str(error)
        return result


@contextlib.contextmanager
def healthy(args: argparse.Namespace, system: str, machine: dict[str, Any], record: dict[str, Any]) -> Iterator[Server]:
    """A server that answers; its command, seconds to health and what its log says of capacity go into ``record``."""
    bench, gpu, port = not args.no_decode_bench, machine["gpus"] > 0, args.port or serving.free_port()
    line = serving.serve_command(args, system, gpu, bench, model_length(args, system), port)
    env = serving.environment(system, gpu, bench, args.fill)
    start: dict[str, Any] = {"decode_bench": bench, "command": shlex.join(line), "env": env, "seconds": None}
    record["starts"].append(start)
    log = args.out / (
        f"{system}.log" if len(record["starts"]) == args.starts else f"{system}-{len(record['starts'])}.log"
    )
    say(f"{system}: {' '.join(f'{k}={v}' for k, v in env.items())} {shlex.join(line)}   (log: {log})")
    with serving.running(line, env, port, log) as server:
        try:
            start["seconds"] = server.wait(args.start_timeout)
            say(f"{system}: healthy after {start['seconds']} s")
            yield server
        finally:
            start["log"] = server.notes()


def play_all(args: argparse.Namespace, system: str, server: Server, record: dict[str, Any]) -> None:
    """Play the scenarios into ``record``, written after each."""
    while args.gate is not None and not args.gate.exists():
        time.sleep(0.2)
    driver = Driver(args, server, system)
    driver.warm_up()
    for scenario in args.scenarios:
        runs = record["scenarios"].setdefault(scenario, [])
        for repeat in range(args.repeats if scenario not in ONCE else 1):
            runs.append(driver.run(scenario, f"{args.seed} {scenario} {repeat}"))
            shown = {key: value for key, value in runs[-1].items() if key != "streams"}
            say(f"{system} {scenario}: {json.dumps(shown)}")
            write_json(args.out / f"{system}.json", record)
            if server.process.poll() is not None:
                raise ServerError(f"the server ended during {scenario}:\n{server.tail()}")


def measure(args: argparse.Namespace, system: str, machine: dict[str, Any]) -> bool:
    """All scenarios of one system; whether none failed. A failure is in its file, with the reason."""
    record: dict[str, Any] = {
        "system": system,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "starts": [],
        "scenarios": {},
        "errors": [],
    }
    if not machine["gpus"]:
        record["note"] = "smoke test on CPU, eager" + (": one rank, no expert parallel" if system == "stock" else "")
    try:
        for _ in range(args.starts - 1):
            with healthy(args, system, machine, record):
                pass
        with healthy(args, system, machine, record) as server:
            play_all(args, system, server, record)
    except (ServerError, StreamError) as error:
        record["errors"].append(str(error))
    except BaseException as error:
        record["errors"].append(repr(error))
        raise
    finally:
        write_json(args.out / f"{system}.json", record)
    failed = failures(record)
    for failure in failed:
        say(f"{system}: FAILED: {failure}")
    return not failed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--systems", type=serving.names(SYSTEMS), default=["stock", "collective"], help=f"of {','.join(SYSTEMS)}")
    add("--scenarios", type=serving.names(SCENARIOS), default=["A", "B", "C"], help=f"of {','.join(SCENARIOS)}")
    add("--out", type=Path, help="folder for raw results and logs")
    add("--report", type=Path, help="start nothing, report what is in this folder")
    add("--model", type=Path, help="model folder (default: one of --shape is written)")
    add("--shape", choices=serving.SHAPES, default=serving.SHAPES[0])
    add("--ranks", type=int, default=4)
    add("--long", type=int, default=400_000, help="prompt tokens of the long request")
    add("--long-output", type=int, default=200, help="raised where needed to outlast the shorts")
    add("--shorts", type=int, default=16, help="how many short requests")
    add("--short-prompt", type=int, default=1000)
    add("--tokens", type=int, default=150, help="output tokens of a short request")
    add("--capacity", type=int, default=2_000_000, help="prompt tokens of the capacity scenario")
    add("--prefill", type=int, default=65536, help="prompt tokens of the prefill scenario")
    add("--load-requests", type=int, default=96)
    add("--load-concurrency", type=int, default=56)
    add("--stagger", type=float, default=0.3, help="seconds between the two long requests of C")
    add("--repeats", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--no-decode-bench", action="store_true", help="compute every prompt")
    add("--fill", type=float, default=0.015, help="KV of prompts that are not computed; 0: tokens take more experts")
    add("--segment-size", type=int, default=16384, help="the plugin's segment_size")
    add("--settings", type=json.loads, default={}, help="more of the plugin's settings, a JSON object")
    add("--max-model-len", type=int, help="default: what the scenarios need")
    add("--stock-max-model-len", type=int, help="for stock, where one rank must hold it; -1: what fits")
    add("--max-num-seqs", type=int, default=64)
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--capture-sizes", default="1,2,4,8,16,24,32,64", help="CUDA graph sizes; 'default': vLLM's")
    add("--gpu-memory-utilization", type=float, default=0.88)
    add("--extra", default="", help="more vllm serve flags, for every system")
    add("--starts", type=int, default=1, help="start each server so often; the last one counts, with warm caches")
    add("--gate", type=Path, help="measure once this file is there: until then others may use the machine")
    add("--port", type=int, default=0, help="default: a free one")
    add("--start-timeout", type=float, default=420.0, help="seconds until a server must be healthy")
    add("--scenario-timeout", type=float, default=300.0, help="seconds")
    args = parser.parse_args()
    if (args.out is None) == (args.report is None):
        parser.error("give one of --out and --report")
    if "prefill" in args.scenarios and args.prefill <= args.segment_size and args.systems != ["stock"]:
        parser.error(
            f"a prompt of --prefill {args.prefill} tokens is one shard with --segment-size {args.segment_size}"
        )
    return args


def main() -> int:
    args = parse_args()
    if args.report:
        report(args.report)
        return 0
    for number in serving.ENDINGS:
        signal.signal(number, serving.end)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = serving.probe()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = Path(folder) / "model"
            serving.write_model(args.model, args.shape)
        passed = [measure(args, system, machine) for system in args.systems]
    report(args.out)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
