#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the composed scheduler costs: its ``schedule()`` over the sum of the vLLM ``schedule()`` calls inside it.

    python benchmarks/schedule_cost.py [--ranks 8] [--requests 64] [--sharded 8] [--steps 300]

Real schedulers, no workers: every scheduled request gets a token back each step. ``--requests`` decode on each rank;
``--sharded`` of all are spread over several ranks. Prints one JSON object; times are wall clock, the ratio is of sums
over all steps (and of medians, which a shared machine disturbs less).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

BLOCK = 32


def make_scheduler(model: str, ranks: int, requests: int, sharded: int) -> Any:
    """A ``NanoCPScheduler`` over ranks that exist only for it."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_nanocp.sched.scheduler import NanoCPScheduler

    args = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        max_num_seqs=requests + sharded,
        block_size=BLOCK,
        enable_prefix_caching=False,
        enable_expert_parallel=True,
        additional_config={"nanocp": {"ranks": ranks, "segment_size": 1024}},
    )
    config = args.create_engine_config()
    blocks = 40 * (requests + sharded)
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    kv_cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
    return NanoCPScheduler(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


def make_request(request_id: str, length: int) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
    return Request(request_id, [(7 * k) % 256 for k in range(length)], params, None)


def answer(part: Any) -> Any:
    """A token for every request that reached the end of what it has; the scheduler drops what it does not want."""
    from vllm.v1.outputs import ModelRunnerOutput

    ids = list(part.num_scheduled_tokens)
    return ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, [[5] for _ in ids])


def run(scheduler: Any, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each ``schedule()``, and of the vLLM calls inside it; async, one step in flight as vLLM runs it."""
    inside = 0.0
    for rank in scheduler.ranks:
        original = rank.schedule

        def timed(*args: Any, _original: Any = original) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return _original(*args)
            finally:
                inside += time.perf_counter() - start

        rank.schedule = timed
    total, inner = [], []
    flying: Any = None
    for _ in range(steps):
        inside = 0.0
        start = time.perf_counter()
        output = scheduler.schedule()
        total.append(time.perf_counter() - start)
        inner.append(inside)
        if flying is not None:
            scheduler.update_from_output(flying, [answer(part) for part in flying.ranks])
        flying = output
    return total, inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64, help="decoding requests a rank")
    parser.add_argument("--sharded", type=int, default=8, help="how many of all are sharded")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, root)
    import vllm

    from tests.tiny_models import make_qwen3_moe

    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(str(make_qwen3_moe(folder)), args.ranks, args.requests, args.sharded)
        short = args.ranks * args.requests - args.sharded
        for i in range(args.sharded):
            scheduler.add_request(make_request(f"long-{i}", 3000 + 100 * i))
        for i in range(short):
            scheduler.add_request(make_request(f"short-{i}", 40 + i % 100))
        warm_up = 60  # all prefilled, every request decoding
        total, inner = run(scheduler, warm_up + args.steps)
        running, waiting = scheduler.get_request_counts()
        assert (running, waiting) == (short + args.sharded, 0), (running, waiting)
        assert {f"long-{i}" for i in range(args.sharded)} <= scheduler.sharded.keys()
        assert all(s.at_home for s in scheduler.sharded.values())
        moves = scheduler.mover.num_moves
    total, inner = total[warm_up:], inner[warm_up:]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "ranks": args.ranks,
        "requests_per_rank": args.requests,
        "sharded": args.sharded,
        "steps": args.steps,
        "moves": moves,
        "schedule_ms_median": round(1e3 * statistics.median(total), 4),
        "vllm_schedule_ms_median": round(1e3 * statistics.median(inner), 4),
        "ratio_of_medians": round(statistics.median(total) / statistics.median(inner), 4),
        "ratio_of_sums": round(sum(total) / sum(inner), 4),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
