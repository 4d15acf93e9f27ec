# SPDX-License-Identifier: Apache-2.0
"""Keeps ``vllm serve --nanocp`` busy for a while, and checks that it is then as it was at the start.

    python benchmarks/soak.py --requests 3000 --minutes 30 --ranks 2 --out soak.json

Requests of random lengths come in bursts, a third of them on shared prefixes, some with seeds; clients leave, some send
what makes no sense, and the prefix cache is reset, with and without running requests. The KV cache is so small that
requests are preempted (without ``--model`` also on a model so small that nothing of this takes long). Then:

- ``lost``: every request was sent and got all that it had to;
- ``tokens``: a sample of them gets the same tokens from stock vLLM (one rank). In bfloat16 runs part where tokens are
  nearly as likely: there, stock vLLM scores the tokens that were sampled greedily, and none may be less likely than its
  own choice by more than ``--gap``;
- ``blocks``: no KV block is held, on any rank, and nobody runs or waits;
- ``memory``: no process has grown by 2 % or more after warm-up, by a line through its resident memory;
- ``files``: every process has about as many files and threads as at the start;
- ``left``: no process and no shared memory is left of the server that was told to end;
- ``log``: no traceback, and no warning again and again;
- ``latency``: medians of the first and the last third; judged only with ``--latency-limit``, since other work on the
  machine changes them;
- ``alive``: the server answers, and ends with code 0 when told to.

With ``--kill NAME`` a process with this in its name is killed (SIGKILL) in the middle of the load instead; then only
``ended`` (the server ends with an error, and each client has an end, within seconds) and ``left`` are checked.

The result is one JSON. The exit code is 1 if a check fails. Runs on CPU as is; on GPUs with ``--dtype bfloat16`` (and
``--extra=`` for graphs). Needs this package and vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
from serving import STOP_LIMIT_S, Server, end, environment, free_port, probe, running, write_json
from soak_checks import latencies, memory, nothing_lost, scored, tokens, waits
from soak_kill import kill_under_load
from soak_load import OUTPUTS, Job, give_priorities, make_jobs, run_job, run_jobs
from soak_watch import Watch, files, kinds, left, log

ROOT = Path(__file__).resolve().parents[1]
SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
START_LIMIT_S = 600.0
IDLE_LIMIT_S = 120.0
RESET_EVERY_S = 20.0
MAX_GROWTH = 0.02
# On CPU, oneDNN keeps what it has compiled for each size of a batch, up to 1024 of them: tens of MiB over the first
# tens of minutes, in stock vLLM as well. A small cache is full before the warm-up ends.
# N-grams are looked for by numba, whose threads, one a core, spin when they have nothing to do: with three ranks on two
# cores the second one took as much of each worker's time as the worker.
# With thresholds of its own, glibc gives tensors that are freed back to the system, however large the last ones were.
STEADY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "NUMBA_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}
# Only then does a server let clients reset its prefix cache.
DEVELOPERS = {"VLLM_SERVER_DEV_MODE": "1"}
# Tiny models: grouped-query attention, latent attention, and one whose next token hangs on its last.
TINY = ("qwen3_moe", "deepseek_v2", "first_order")
IDLE_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:nanocp_kv_cache_usage_perc",
    "vllm:nanocp_num_requests_running",
    "vllm:nanocp_num_requests_waiting",
    "vllm:nanocp_shards",
)
COUNTERS = (
    "vllm:nanocp_moves_total",
    "vllm:nanocp_spills_total",
    "vllm:nanocp_prevented_preemptions_total",
    "vllm:nanocp_spec_decode_draft_tokens_total",
    "vllm:nanocp_spec_decode_accepted_tokens_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:nanocp_preemptions_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:nanocp_request_degree_bucket",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000, help="how many are sent")
    parser.add_argument("--minutes", type=float, default=30.0, help="over how long; none is sent later")
    parser.add_argument("--or-fewer", action="store_true", help="requests that the time is too short for are no fault")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=None, help="a MoE model; default: a tiny random one")
    parser.add_argument("--tiny", choices=TINY, default=TINY[0], help="which one; first_order: most n-grams are right")
    parser.add_argument("--nanocp-config", default='{"segment_size": 700}', metavar="JSON")
    parser.add_argument("--blocks", type=int, default=91, help="KV blocks a rank has (one is vLLM's)")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a KV block")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens")
    parser.add_argument("--concurrency", type=int, default=12, help="requests at the same time, at most")
    parser.add_argument("--sample", type=int, default=10, help="one of so many is compared with stock vLLM; 0: none")
    parser.add_argument("--dtype", default="float32", help="float32 is exact; FlashAttention has bfloat16 only")
    parser.add_argument("--gap", type=float, default=0.25, help="logprob that a token may fall behind, not in float32")
    parser.add_argument("--latency-limit", type=float, default=None, help="last third over first; default: not judged")
    parser.add_argument("--extra", default="--enforce-eager", help="more flags of vllm serve, for both servers")
    parser.add_argument("--ours", default="", help="more flags of the plugin's server alone")
    parser.add_argument(
        "--priorities", action="store_true", help="give requests random ones; takes --scheduling-policy priority"
    )
    parser.add_argument("--greedy", action="store_true", help="compare greedy requests alone, as has to be with drafts")
    parser.add_argument("--outputs", default=",".join(map(str, OUTPUTS)), help="tokens that requests ask for")
    parser.add_argument("--kill", default=None, metavar="NAME", help="part of the name of the process that is killed")
    parser.add_argument("--kill-after", type=float, default=30.0, help="seconds of load before that")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument(
        "--logs", type=Path, default=None, help="folder for the servers' logs; default: a temporary one"
    )
    args = parser.parse_args(argv)
    if args.requests < 1 or args.minutes <= 0 or args.ranks < 2:
        parser.error("--requests 1, --minutes above 0, --ranks 2 at least")
    return args


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """By name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return {
        sample.name
        + json.dumps({k: v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")}): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.split("{")[0] in names}


async def reset_now_and_then(url: str, seed: int, counts: dict[str, int]) -> None:
    """Reset the prefix cache, with running requests or without, until cancelled."""
    rng = random.Random(seed)
    async with aiohttp.ClientSession() as session:
        while True:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * RESET_EVERY_S)
            running_too = rng.random() < 0.5
            query = f"reset_running_requests={str(running_too).lower()}"
            async with session.post(f"{url}/reset_prefix_cache?{query}") as answer:
                success = (await answer.json())["success"]
            kind = "with_running" if running_too else "without_running"
            counts[kind] = counts.get(kind, 0) + 1
            counts["refused"] = counts.get("refused", 0) + (not success)


async def wait_idle(url: str) -> dict[str, Any]:
    """Whether nothing is held in the end."""
    async with aiohttp.ClientSession() as session:
        limit = time.monotonic() + IDLE_LIMIT_S
        while True:
            held = of(await metrics(session, url), IDLE_METRICS)
            if held and not any(held.values()):
                return {"pass": True, "held": held}
            if time.monotonic() > limit:
                return {"pass": False, "held": held}
            await asyncio.sleep(0.5)


async def drive(args: argparse.Namespace, url: str, model: str, jobs: list[Job], result: dict[str, Any]) -> None:
    counts: dict[str, int] = {}
    resets = asyncio.create_task(reset_now_and_then(url, args.seed, counts))
    await run_jobs(jobs, url, model, args.concurrency, time.monotonic() + 60 * args.minutes)
    if resets.done():
        raise RuntimeError("a reset of the prefix cache failed") from resets.exception()
    resets.cancel()
    result["resets"] = counts
    result["checks"]["blocks"] = await wait_idle(url)
    async with aiohttp.ClientSession() as session:
        result["counters"] = of(await metrics(session, url), COUNTERS)


async def few_at_a_time(jobs: list[Job], ask: Callable[[Job, aiohttp.ClientSession], Awaitable[Any]]) -> list[Any]:
    room = asyncio.Semaphore(4)
    timeout = aiohttp.ClientTimeout(total=START_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def run(job: Job) -> Any:
            async with room:
                return await ask(job, session)

        return await asyncio.gather(*(run(job) for job in jobs))


async def ask_again(jobs: list[Job], url: str, model: str) -> list[Job]:
    """The same requests, to the end."""
    again = [Job(job.number, 0.0, {k: v for k, v in job.body.items() if k != "priority"}) for job in jobs]
    await few_at_a_time(again, lambda job, session: run_job(job, session, url, model))
    return again


async def score(jobs: list[Job], url: str, model: str) -> list[list[float]]:
    """By how much each token of each job's answer is less likely than the likeliest, given those before it."""

    async def ask(job: Job, session: aiohttp.ClientSession) -> list[float]:
        body = dict(model=model, prompt=job.body["prompt"] + job.tokens, max_tokens=1, prompt_logprobs=1)
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            places = (await answer.json())["choices"][0]["prompt_logprobs"][-len(job.tokens) :]
        return [
            max(entry["logprob"] for entry in place.values()) - place[str(token)]["logprob"]
            for place, token in zip(places, job.tokens, strict=True)
        ]

    return await few_at_a_time(jobs, ask)


def common_flags(args: argparse.Namespace, port: int) -> list[str]:
    flags = [f"--dtype={args.dtype}", f"--max-model-len={args.max_model_len}", f"--block-size={args.block_size}"]
    return [*flags, *shlex.split(args.extra), "--host=127.0.0.1", f"--port={port}"]


def nanocp_command(args: argparse.Namespace, model: str, port: int) -> list[str]:
    flags = [f"--data-parallel-size={args.ranks}", "--enable-expert-parallel"]
    flags += ["--nanocp", "--nanocp-config", args.nanocp_config]
    flags += [f"--num-gpu-blocks-override={args.blocks}", "--max-num-batched-tokens=512", "--enable-prefix-caching"]
    priority = ["--scheduling-policy=priority"] if args.priorities else []
    return [*SERVE, model, *flags, *priority, *shlex.split(args.ours), *common_flags(args, port)]


def stock_command(args: argparse.Namespace, model: str, port: int) -> list[str]:
    # Chunks large enough for all: stock vLLM on CPU dies of a seeded request that takes more than one.
    flags = ["--max-num-batched-tokens=131072"]
    if args.model is None and args.tiny == "deepseek_v2":
        flags.append("--worker-cls=tests.engine.repaired.Worker")  # else its rotary embeddings are wrong on CPU
    return [*SERVE, model, *flags, *common_flags(args, port)]


def commit() -> str:
    """Of the package that is served; empty outside of a clone."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip()


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def make_model(args: argparse.Namespace, folder: Path) -> str:
    """The model's folder or name."""
    if args.model is not None:
        return str(args.model)
    sys.path.insert(0, str(ROOT))
    from tests import tiny_drafts, tiny_models

    module = tiny_drafts if args.tiny == "first_order" else tiny_models
    # FlashAttention has no heads smaller than 64.
    larger = dict(dtype="bfloat16", head_dim=64, hidden_size=256, num_heads=8, num_kv_heads=2)
    return str(getattr(module, f"make_{args.tiny}")(folder, **(larger if args.dtype == "bfloat16" else {})))


def under_load(args: argparse.Namespace, server: Server, model: str, jobs: list[Job], result: dict[str, Any]) -> None:
    """All that is judged of the running server."""
    checks = result["checks"]
    watch = Watch(server)
    watch.start()
    start = time.monotonic()
    try:
        asyncio.run(drive(args, server.url, model, jobs, result))
    finally:
        result["load_s"] = round(time.monotonic() - start, 1)
        watch.stop()
        warm_up = result["load_s"] / 3
        checks["lost"] = nothing_lost(jobs, 1 if args.or_fewer else args.requests)
        checks["memory"] = memory(watch.series, warm_up, MAX_GROWTH)
        checks["files"] = files(watch.files)
        checks["latency"] = latencies(jobs, warm_up, start, args.latency_limit)
        result["first_token_s_by_priority"] = waits(jobs)
        step = max(1, len(next(iter(watch.series.values()))) // 120)
        result["rss_mib"] = {
            label: [[t, round(mib, 2)] for t, mib in points[::step]] for label, points in watch.series.items()
        }
        checks["log"] = log(server.log.read_text(errors="replace"))
    healthy = server.healthy()
    server.process.send_signal(signal.SIGTERM)
    try:
        code: int | None = server.process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        code = None
    checks["alive"] = {"pass": healthy and code == 0, "healthy": healthy, "exit_code": code}
    checks["left"] = left(server, watch.shared, args.temporary)


def until_killed(args: argparse.Namespace, server: Server, model: str, jobs: list[Job], result: dict[str, Any]) -> None:
    """All that is judged of a server of which a process is killed."""
    watch = Watch(server)
    load = run_jobs(jobs, server.url, model, args.concurrency, time.monotonic() + 60 * args.minutes)
    killed = kill_under_load(server, load, jobs, watch.find(args.kill), args.kill_after)
    result["checks"]["ended"] = asyncio.run(killed) | {"victim": args.kill}
    result["checks"]["left"] = left(server, watch.shared, args.temporary)
    result["end_of_log"] = server.tail(12).splitlines()


def soak(args: argparse.Namespace, logs: Path, result: dict[str, Any]) -> None:
    checks = result["checks"]
    model = make_model(args, logs / "model")
    gpu = probe()["gpu"] is not None
    outputs = [int(count) for count in args.outputs.split(",")]
    jobs = make_jobs(
        args.seed, args.requests, 0.97 * 60 * args.minutes, args.max_model_len, args.sample or 1 << 62, outputs
    )
    if args.priorities:
        give_priorities(jobs, args.seed)
    args.temporary = logs / "tmp"
    args.temporary.mkdir(exist_ok=True)
    port = free_port()
    env = {**environment("nanocp", gpu, False), **STEADY, **DEVELOPERS, "TMPDIR": str(args.temporary)}
    with running(nanocp_command(args, model, port), env, port, logs / "nanocp.log") as server:
        result["start_s"] = server.wait(START_LIMIT_S)
        (until_killed if args.kill else under_load)(args, server, model, jobs, result)
    if not args.sample or args.kill:
        return
    sample = [job for job in jobs if job.sampled and job.lost is None and job.sent]
    if args.greedy:
        sample = [job for job in sample if job.body["temperature"] == 0]
    port = free_port()
    env = environment("stock", gpu, False)
    stock_files = logs / "stock-tmp"
    stock_files.mkdir(exist_ok=True)
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), env["PYTHONPATH"]]), "TMPDIR": str(stock_files)}
    with running(stock_command(args, model, port), env, port, logs / "stock.log") as s:
        s.wait(START_LIMIT_S)
        if args.dtype == "float32":
            checks["tokens"] = tokens(sample, asyncio.run(ask_again(sample, s.url, model)))
        else:
            greedy = [job for job in sample if job.body["temperature"] == 0 and job.tokens]
            checks["tokens"] = scored(greedy, asyncio.run(score(greedy, s.url, model)), args.gap)
    result["temporary_files_of_stock"] = kinds(stock_files)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    found = probe()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/soak.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": found["versions"],
        "machine": {**machine(), "gpu": found["gpu"]},
        "environment": {**STEADY, **DEVELOPERS, **environment("nanocp", found["gpu"] is not None, False)},
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "logs")},
        "pass": False,
        "checks": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        logs = args.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            soak(args, logs, result)
            judged = [check["pass"] for check in result["checks"].values() if check["pass"] is not None]
            result["pass"] = bool(judged) and all(judged)
        finally:
            write_json(args.out, result)
    for label, check in result["checks"].items():
        print({True: "passed", False: "FAILED", None: "not judged"}[check["pass"]], label)
    return 0 if result["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
