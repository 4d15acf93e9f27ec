#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One system, started once with the flags its users would type, under several loads one after another.

    python benchmarks/loads.py --system stock --ranks 4 --out FOLDER flat:16 flat:512 prefill:131072
    python benchmarks/loads.py --system nanocp --ranks 4 --out FOLDER --settings '{"segment_size": 16384}' rate:8x40000

Loads (only the prompts of ``prefill``, ``mixed`` and ``computed`` are computed; the KV of others is taken as there, see
decode_interference.py):

    flat:N           N requests of --short tokens at once: the gap between their tokens, tokens a second
    long:NxT         N requests of T tokens at once
    beside:NxT       N short ones beside one request of T tokens
    prefill:T        while 16 short ones decode, a prompt of T tokens is computed: its time to the first token, the gaps
                     of the short ones until then
    mixed:NxTxP      while N requests of T tokens decode, prompts of P tokens are computed one after another
    rate:RxT         requests of T tokens arrive at R a second (Poisson) for --window seconds
    trace:R          the same with the lengths of a conversation trace, prompts stretched by --stretch
    computed:RxS     the same with seed S, prompts as long as in the trace, and computed

Gaps in ms; the first 5 of a stream do not count. FOLDER gets SYSTEM.json after each load, and the server's log.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import serving
import trace_load
from streams import Stream, make_stream, percentile

SKIP = 5
OUTPUT = 150
FEW = 32  # streams whose first tokens are listed: which of them came with the same step
CLIENTS = 4  # processes: one would be late with the chunks of hundreds of streams
Gaps = list[tuple[float, float]]


async def _play(
    url: str, streams: Sequence[Stream], starts: Sequence[float], limit: float, end: float | None = None
) -> None:
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=limit)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(stream: Stream, start: float) -> None:
            await asyncio.sleep(max(0.0, start - time.perf_counter()))
            left = None if end is None else max(0.0, end - time.perf_counter())
            with contextlib.suppress(TimeoutError):  # the stream says itself that it is not complete
                async with asyncio.timeout(left):
                    await stream.run(session, f"{url}/v1/completions")

        await asyncio.gather(*map(one, streams, starts))


def play(
    url: str, specs: list[tuple[float, tuple[Any, ...]]], begin: float, limit: float, end: float | None = None
) -> list[dict[str, Any]]:
    """Play some streams of a load, in a process of its own; clocks are the machine's.

    Args:
        url: of the server.
        specs: of each stream, the second at which it is sent, and ``make_stream``'s arguments.
        begin: second 0.
        limit: seconds until a stream is given up.
        end: second at which all that have not ended are given up.
    """
    streams = [make_stream(*spec) for _, spec in specs]
    at_last = None if end is None else begin + end
    asyncio.run(_play(url, streams, [begin + at for at, _ in specs], limit, at_last))
    return [{"name": s.name, "sent": s.sent, "times": s.times, "error": s.error, "tokens": s.tokens} for s in streams]


def gaps(streams: Sequence[dict[str, Any]]) -> Gaps:
    return [gap for s in streams for gap in list(zip(s["times"], s["times"][1:], strict=False))[SKIP:]]


def figures(streams: Sequence[dict[str, Any]], window: tuple[float, float], touch: bool = False) -> dict[str, Any]:
    """Of the gaps inside a window, or, with ``touch``, of those that touch it; of all streams that ended well."""
    fine = [s for s in streams if not s["error"] and s["times"]]
    low, high = window
    values = sorted(
        1e3 * (end - start)
        for start, end in gaps(fine)
        if (end > low and start < high if touch else start >= low and end <= high)
    )
    firsts = sorted(1e3 * (s["times"][0] - s["sent"]) for s in fine)
    each = sorted(1e3 * (s["times"][-1] - s["times"][0]) / max(1, s["tokens"] - 1) for s in fine)

    def at(numbers: list[float], q: float) -> float | None:
        return round(percentile(numbers, q), 3) if numbers else None

    return {
        "streams": len(streams),
        "errors": sorted({s["error"] for s in streams if s["error"]})[:3],
        "gaps": len(values),
        **{f"gap_p{q}": at(values, q / 100) for q in (50, 90, 99)},
        "gap_max": at(values, 1.0),
        **{f"ttft_p{q}": at(firsts, q / 100) for q in (50, 90, 99)},
        **({"ttfts": [round(first, 1) for first in firsts]} if len(firsts) <= FEW else {}),
        **{f"tpot_p{q}": at(each, q / 100) for q in (50, 90, 99)},
    }


class Loads:
    """Plays loads on one server."""

    def __init__(self, args: argparse.Namespace, url: str, pool: concurrent.futures.Executor) -> None:
        self.args, self.url, self.pool = args, url, pool
        self.vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
        self.number = 0

    def spec(self, name: str, prompt: int, tokens: int, compute: bool = False) -> tuple[Any, ...]:
        self.number += 1
        return (name, self.number, prompt, tokens, str(self.args.model), self.vocab, self.args.seed, 1, compute)

    def play(
        self, specs: list[tuple[float, tuple[Any, ...]]], lead: float = 1.0, end: float | None = None
    ) -> list[dict[str, Any]]:
        """All streams, over several processes, ``lead`` seconds from now; those that have not ended ``end`` seconds
        later are given up."""
        # Bodies are made before any clock runs.
        begin = time.perf_counter() + lead + sum(prompt for _, (_, _, prompt, *_) in specs) / CLIENTS / 1e6
        parts = [specs[i::CLIENTS] for i in range(CLIENTS)]
        asked = [self.pool.submit(play, self.url, part, begin, self.args.limit, end) for part in parts if part]
        return [stream for future in asked for stream in future.result()]

    def decode(self, n: int, tokens: int, beside: int = 0) -> dict[str, Any]:
        """While all decode."""
        long = [(0.0, self.spec("long", beside, 6 * OUTPUT))] if beside else []
        later = 3.0 if beside else 0.0
        found = self.play([*long, *((later, self.spec("short", tokens, OUTPUT)) for _ in range(n))])
        shorts = [s for s in found if s["name"] == "short"]
        alive = [s["times"] for s in found if s["times"]]
        window = max(t[0] for t in alive), min(t[-1] for t in alive)
        took = max(s["times"][-1] for s in shorts if s["times"]) - min(s["sent"] for s in shorts)
        rate = sum(s["tokens"] for s in shorts) / took
        return figures(shorts, window) | {"tokens_per_s": round(rate, 1)}

    def prefill(self, tokens: int) -> dict[str, Any]:
        shorts = [(0.0, self.spec("short", self.args.short, self.args.decode_tokens or 1500)) for _ in range(16)]
        found = self.play([*shorts, (self.args.first or 3.0, self.spec("long", tokens, 8, True))])
        (long,) = (s for s in found if s["name"] == "long")
        others = [s for s in found if s["name"] == "short"]
        if long["error"] or not long["times"]:
            return {"failed": long["error"]}
        window = long["sent"], long["times"][0]
        of_one = [pair for pair in gaps(others[:1]) if pair[1] > window[0] and pair[0] < window[1]]
        return {
            "ttft_ms": round(1e3 * (window[1] - window[0]), 1),
            "gaps_of_one": [round(1e3 * (end - start), 1) for start, end in of_one],  # steps, as it saw them
            "before": figures(others, (0.0, window[0])),
            "during": figures(others, window, touch=True),
        }

    def mixed(self, n: int, tokens: int, prompt: int) -> dict[str, Any]:
        """Gaps that touch a prompt's time to its first token, and all others."""
        decoding = [(0.0, self.spec("short", tokens, self.args.decode_tokens or 600)) for _ in range(n)]
        first = self.args.first or 4.0
        prompts = [(first + self.args.every * i, self.spec("prompt", prompt, 2, True)) for i in range(6)]
        found = self.play([*decoding, *prompts])
        others = [s for s in found if s["name"] == "short"]
        asked = [s for s in found if s["name"] == "prompt" and s["times"]]
        spans = [(s["sent"], s["times"][0]) for s in asked]
        values = sorted(
            1e3 * (end - start) for start, end in gaps(others) if any(end > low and start < high for low, high in spans)
        )
        longest = sorted(  # of a prompt, the step with its chunk: the longest gap that touches it
            max((1e3 * (end - start) for start, end in gaps(others) if end > low and start < high), default=0.0)
            for low, high in spans
        )
        return {
            "decode": figures(others, (0.0, min(low for low, _ in spans))),
            **{f"touching_p{q}": round(percentile(values, q / 100), 3) for q in (50, 90, 99)},
            "longest_of_a_prompt_p50": round(percentile(longest, 0.5), 3),
            "longest": [round(x, 1) for x in longest],
            "ttft_ms": [round(1e3 * (high - low), 1) for low, high in spans],
        }

    def arrivals(
        self, rate: float, lengths: Sequence[tuple[int, int]], seed: str = "", compute: bool = False
    ) -> dict[str, Any]:
        """Of those that arrive after --settle seconds, until no more arrive."""
        dice, at = random.Random(self.args.seed + seed), 0.0
        specs: list[tuple[float, tuple[Any, ...]]] = []
        while at < self.args.window:
            at += dice.expovariate(rate)
            prompt, output = lengths[len(specs) % len(lengths)]
            specs.append((at, self.spec("r", prompt, output, compute)))
        begin = time.perf_counter()
        found = self.play(specs)
        first = min(s["sent"] for s in found)
        late = [s for s in found if s["sent"] >= first + self.args.settle]
        end = max((s["times"][-1] for s in found if s["times"]), default=first)
        low, high = first + self.args.settle, first + self.args.window
        return figures(late, (low, high)) | {"drain_s": round(end - high, 2), "took_s": round(end - begin, 1)}

    def run(self, load: str) -> dict[str, Any]:
        kind, _, rest = load.partition(":")
        numbers = [float(x) if "." in x else int(x) for x in rest.split("x")]
        if kind == "flat":
            return self.decode(int(numbers[0]), self.args.short)
        if kind == "long":
            return self.decode(int(numbers[0]), int(numbers[1]))
        if kind == "beside":
            return self.decode(int(numbers[0]), self.args.short, int(numbers[1]))
        if kind == "prefill":
            return self.prefill(int(numbers[0]))
        if kind == "mixed":
            return self.mixed(*map(int, numbers))
        if kind == "rate":
            return self.arrivals(numbers[0], [(int(numbers[1]), self.args.output)])
        if kind == "trace":
            pairs = trace_load.lengths(1000)
            most = self.args.max_model_len - 1024
            return self.arrivals(
                numbers[0], [(min(most, int(p * self.args.stretch)), max(2, min(600, o))) for p, o in pairs]
            )
        if kind == "computed":
            seed = int(numbers[1])
            pairs = trace_load.lengths(1000)
            pairs = pairs[100 * seed % len(pairs) :] + pairs[: 100 * seed % len(pairs)]
            lengths = [(min(self.args.max_model_len - 1024, p), max(2, min(600, o))) for p, o in pairs]
            return self.arrivals(numbers[0], lengths, str(seed), compute=True)
        raise SystemExit(f"loads: unknown load {load!r}")


def command(args: argparse.Namespace, port: int, gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Default flags, but for what the loads need: no weights, KV that is taken as there."""
    flags = [f"--data-parallel-size={args.ranks}", "--enable-expert-parallel"] if gpu or args.system != "stock" else []
    if args.system == "stock":
        flags += ["--kv-transfer-config", serving.connector(args.fill)]
    else:
        flags += ["--nanocp", "--nanocp-config", json.dumps({"decode_bench": True, **args.settings})]
    flags += ["--load-format=dummy", f"--max-model-len={args.max_model_len}", "--no-enable-prefix-caching"]
    flags += [] if gpu else ["--enforce-eager"]
    where = ["--host", "127.0.0.1", f"--port={port}"]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(args.model)]
    kind = "stock" if args.system == "stock" else "nanocp"
    return [*vllm, *flags, *shlex.split(args.extra), *where], serving.environment(kind, gpu, True, args.fill)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("loads", nargs="+")
    add("--system", choices=["stock", "nanocp"], required=True)
    add("--name", help="of the result's file (default: the system's)")
    add("--out", type=Path, required=True)
    add("--model", type=Path, help="model folder (default: one of --shape is written)")
    add("--shape", choices=serving.SHAPES, default=serving.SHAPES[0])
    add("--ranks", type=int, default=4)
    add("--settings", type=json.loads, default={}, help="the plugin's settings, a JSON object")
    add("--max-model-len", type=int, default=520_000)
    add("--short", type=int, default=1000, help="prompt tokens of a short request")
    add("--output", type=int, default=200, help="output tokens of a request of rate:")
    add("--decode-tokens", type=int, help="of those beside prompts (prefill: 1500, mixed: 600)")
    add("--first", type=float, help="second at which the first prompt beside them comes (prefill: 3, mixed: 4)")
    add("--every", type=float, default=0.7, help="seconds from one prompt of mixed: to the next")
    add("--window", type=float, default=25.0)
    add("--settle", type=float, default=8.0)
    add("--stretch", type=float, default=4.0)
    add("--fill", type=float, default=0.0, help="KV of prompts that are not computed; 0: tokens take more experts")
    add("--extra", default="", help="more vllm serve flags")
    add("--seed", default="0")
    add("--start-timeout", type=float, default=420.0)
    add("--gate", type=Path, help="no load begins before this file is there: until then others may use the machine")
    add("--until", type=float, default=1e9, help="seconds after which no load is begun")
    add("--limit", type=float, default=120.0, help="seconds until a stream is given up")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    began = time.monotonic()
    for number in serving.ENDINGS:
        signal.signal(number, serving.end)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        args.model = args.out / "model"
        serving.write_model(args.model, args.shape)
    name = args.name or args.system
    machine, port = serving.probe(), serving.free_port()
    line, env = command(args, port, machine["gpus"] > 0)
    record: dict[str, Any] = {"system": name, "command": shlex.join(line), "env": env, "machine": machine, "loads": {}}
    path = args.out / f"{name}.json"
    spawn = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(CLIENTS, mp_context=spawn) as pool,
        serving.running(line, env, port, args.out / f"{name}.log") as server,
    ):
        record["start_s"] = server.wait(args.start_timeout)
        print(name, "healthy after", record["start_s"], flush=True)
        while args.gate is not None and not args.gate.exists():
            time.sleep(0.1)
        loads = Loads(args, server.url, pool)
        loads.run("flat:16")  # warm
        for load in args.loads:
            if time.monotonic() - began > args.until:
                record["loads"][load] = {"left out": "no time"}
                continue
            start = time.monotonic()
            try:
                result = loads.run(load)
            except Exception as error:
                result = {"failed": repr(error)[:300]}
            record["loads"].setdefault(load, []).append(result | {"took_s": round(time.monotonic() - start, 1)})
            print(name, load, json.dumps(result), flush=True)
            record["log"] = server.notes()
            serving.write_json(path, record)
            if server.process.poll() is not None:
                print(server.tail(), flush=True)
                return 1
        print(name, "is done", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
