#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long requests wait for their first token: the real schedulers, workers that only exist for them, assumed times.

    python benchmarks/admission_simulation.py --trace TRACE.jsonl [--out FILE]

Every prompt of a conversation trace is computed, by ``NanoCPScheduler`` (``plugin``) and by as many of vLLM's own
schedulers as there are ranks (``stock``), each request sent to the one that vLLM's data-parallel client would choose.
A step takes as long as its slowest rank: 6 ms, 22.5 ns a KV token of running requests, so much a token computed, 10 us
a guest, and 1.8 ms if any rank has guests. **Times are assumed, not measured.** A seed takes other requests of the
trace, in another order. Scenarios: ``loop`` (so many clients, each with one request at a time, caches that hold all),
``prompts`` (the same where prompts are nearly all of the work, as measured with Qwen3-30B-A3B's shape), ``full``
(caches that do not hold all), ``rate`` (requests come by themselves). No prefix caching; ``moves`` and
``parallel_prefill`` as they are by default on GPUs: off.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kept_result import about, write

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BLOCK = 32  # the smallest that vLLM takes on CPU
SETTINGS = {"moves": False, "parallel_prefill": False}


@dataclass(frozen=True)
class Scenario:
    """Times in seconds, lengths in tokens. ``clients`` 0: requests come ``rate`` a second."""

    ranks: int = 4
    requests: int = 192
    clients: int = 56
    rate: float = 0.0
    capacity: int = 1_092_256
    budget: int = 8192
    slots: int = 64
    segment_size: int = 16_384
    base: float = 6e-3
    kv_token: float = 22.5e-9
    query: float = 20e-6
    guest: float = 10e-6
    exchange: float = 1.8e-3


SCENARIOS = {
    "loop": Scenario(),
    "prompts": Scenario(requests=96, query=100e-6),
    "full": Scenario(capacity=163_840, requests=288, clients=96),
    "rate": Scenario(requests=384, clients=0, rate=3.3, capacity=327_680),
}


def draw(trace: Path, scenario: Scenario, seed: int) -> list[tuple[float, int, int]]:
    """When each request comes, its prompt and output tokens."""
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    dice = random.Random(seed)
    chosen = dice.sample(rows, scenario.requests)
    at = 0.0
    asks = []
    for row in chosen:
        at += dice.expovariate(scenario.rate) if scenario.rate else 0.0
        asks.append((at, min(row["input_length"], scenario.capacity * 3 // 4), max(2, row["output_length"])))
    return asks


def make_schedulers(model: str, scenario: Scenario, system: str, settings: dict[str, Any]) -> list[Any]:
    """One ``NanoCPScheduler``, or vLLM's own, one a rank."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_nanocp.sched.scheduler import NanoCPScheduler

    more = {"nanocp": SETTINGS | {"ranks": scenario.ranks, "segment_size": scenario.segment_size} | settings}
    config = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=scenario.capacity,
        max_num_batched_tokens=scenario.budget,
        max_num_seqs=scenario.slots,
        block_size=BLOCK,
        enable_prefix_caching=False,
        enable_expert_parallel=True,
        additional_config=more if system == "plugin" else {},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = False
    blocks = scenario.capacity // BLOCK + 1
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    kv_cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
    rest = dict(
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    if system == "plugin":
        return [NanoCPScheduler(vllm_config=config, **rest)]
    return [Scheduler(vllm_config=copy(config), log_stats=False, **rest) for _ in range(scenario.ranks)]


class Service:
    """Serves the requests in simulated steps."""

    def __init__(self, scenario: Scenario, schedulers: list[Any], asks: Sequence[tuple[float, int, int]]) -> None:
        self.s, self.schedulers, self.asks = scenario, schedulers, asks
        self.plugin = len(schedulers) == 1 and hasattr(schedulers[0], "ranks")
        self.ranks = schedulers[0].ranks if self.plugin else schedulers
        self.clock = 0.0
        self.steps = self.next = self.busy = self.preemptions = self.computed = 0
        self.last: dict[str, float] = {}
        self.made: dict[str, int] = {}
        self.sent: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.at: dict[str, int] = {}
        self.inflight = [0] * scenario.ranks

    def send(self) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        while self.next < len(self.asks):
            due, prompt, output = self.asks[self.next]
            if self.busy >= self.s.clients if self.s.clients else due > self.clock:
                return
            name = f"r{self.next}"
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
            request = Request(name, [5] * prompt, params, None, arrival_time=float(self.next))
            self.sent[name] = self.clock if self.s.clients else due
            self.next += 1
            self.busy += 1
            self.schedulers[0 if self.plugin else self.choose(name)].add_request(request)

    def choose(self, name: str) -> int:
        """As ``DPLBAsyncMPClient.get_core_engine_for_request`` with one client whose counts are fresh."""

        def score(rank: int) -> tuple[float, int]:
            running, waiting = self.ranks[rank].get_request_counts()
            usage = self.ranks[rank].kv_cache_manager.usage
            penalty = waiting * 6.0 * max(0.0, usage - 0.5)
            return max(self.inflight[rank], waiting + running) + penalty, (rank - self.next) % self.s.ranks

        self.at[name] = rank = min(range(self.s.ranks), key=score)
        self.inflight[rank] += 1
        return rank

    def answer(self, rank: Any, part: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(part.num_scheduled_tokens)
        found = [rank.requests.get(i) for i in ids]
        done = [r is not None and r.num_computed_tokens >= r.num_tokens for r in found]
        return ModelRunnerOutput(ids, {i: n for n, i in enumerate(ids)}, [[5] if d else [] for d in done])

    def seconds(self, outputs: Sequence[Any], parts: Sequence[Any]) -> float:
        """How long a step takes.

        Args:
            outputs: of the schedulers.
            parts: of the ranks.
        """
        guests = [0] * self.s.ranks
        if self.plugin:
            kv = [work.kv_tokens for work in outputs[0].work]
            for row in outputs[0].plan.rows:
                for holder in row.holders:
                    guests[holder.rank] += row.num_queries * (holder.rank != row.home)
        else:
            kv = [sum(request.num_computed_tokens for request in rank.running) for rank in self.ranks]
        s = self.s
        return (
            s.base
            + s.exchange * any(guests)
            + max(
                s.kv_token * k + s.query * part.total_num_scheduled_tokens + s.guest * min(g, s.slots)
                for k, part, g in zip(kv, parts, guests, strict=True)
            )
        )

    def left(self, name: str) -> None:
        """A request has ended."""
        if not self.plugin:
            self.inflight[self.at[name]] -= 1

    def step(self) -> bool:
        """Schedule, wait, take the outputs; whether anything was computed."""
        outputs = [scheduler.schedule() for scheduler in self.schedulers]
        parts = [part.payload for part in outputs[0].parts] if self.plugin else outputs
        self.preemptions += sum(len(part.preempted_req_ids or ()) for part in parts)
        self.computed += sum(part.total_num_scheduled_tokens for part in parts)
        self.clock += self.seconds(outputs, parts)
        answers = [self.answer(rank, part) for rank, part in zip(self.ranks, parts, strict=True)]
        taken = (
            [self.schedulers[0].update_from_output(outputs[0], answers)]
            if self.plugin
            else [r.update_from_output(p, a) for r, p, a in zip(self.ranks, parts, answers, strict=True)]
        )
        for outputs_by_client in taken:
            for outputs_of in outputs_by_client.values():
                for output in outputs_of.outputs:
                    self.first.setdefault(output.request_id, self.clock)
                    self.last[output.request_id] = self.clock
                    self.made[output.request_id] = self.made.get(output.request_id, 0) + len(output.new_token_ids)
                    if output.finish_reason is not None:
                        self.busy -= 1
                        self.left(output.request_id)
        return any(part.total_num_scheduled_tokens for part in parts)

    def run(self) -> dict[str, float]:
        while self.next < len(self.asks) or self.busy:
            self.send()
            if not self.busy:
                self.clock = self.asks[self.next][0]
                continue
            self.steps += 1
            if self.steps > 200_000:
                raise RuntimeError("somebody waits for ever")
            self.step()
        waits = sorted(self.first[name] - sent for name, sent in self.sent.items())

        each = sorted((self.last[n] - self.first[n]) / (made - 1) for n, made in self.made.items() if made > 1)

        def at(q: float, values: list[float] = waits) -> float:
            return round(values[min(len(values) - 1, int(q * len(values)))], 4)

        return {
            "ttft_p50": at(0.5),
            "ttft_p90": at(0.9),
            "ttft_p99": at(0.99),
            "ttft_mean": round(statistics.fmean(waits), 3),
            "tpot_p50": at(0.5, each),
            "tpot_p99": at(0.99, each),
            "computed": self.computed,
            "seconds": round(self.clock, 2),
            "steps": self.steps,
            "preemptions": self.preemptions,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS))
    parser.add_argument("--systems", nargs="+", default=["stock", "plugin"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", type=json.loads, default={}, help="more of the plugin's, a JSON object")
    parser.add_argument("--change", type=json.loads, default={}, help="of the scenarios, a JSON object")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.tiny_models import make_qwen3_moe

    result: dict[str, Any] = {**about(), "scenarios": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_qwen3_moe(folder))
        for name in args.scenarios:
            scenario = replace(SCENARIOS[name], **args.change)
            figures: dict[str, list[Any]] = {system: [] for system in args.systems}
            for seed in args.seeds:
                asks = draw(args.trace, scenario, seed)
                for system in args.systems:
                    schedulers = make_schedulers(model, scenario, system, args.settings)
                    figures[system].append(Service(scenario, schedulers, asks).run())
                    print(name, seed, system, figures[system][-1], file=sys.stderr, flush=True)
            result["scenarios"][name] = {"parameters": asdict(scenario), "by_seed": figures}
    write(result, args.out)


if __name__ == "__main__":
    main()
