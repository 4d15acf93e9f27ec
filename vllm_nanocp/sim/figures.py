# SPDX-License-Identifier: Apache-2.0
"""One system under one load: what is run, and the figures of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .machine import Machine
from .nanocp import Plugin, Settings
from .ranks import World
from .setup import Setup
from .stock import Stock
from .trace import InputError, Requests

SYSTEMS = ("nanocp", "stock", "round-robin", "tensor")


@dataclass(frozen=True)
class Run:
    """What is simulated.

    Attributes:
        machine: what steps take.
        ranks: how many GPUs.
        capacity: KV tokens of each; None: the machine's.
        settings: the plugin's.
        frontends: API servers of stock; None: as many as ranks, vLLM's default.
        block_size, slots, budget, decode_only, as_benchmarks, prefix_caching, visits, noise, seed: see ``ranks.Setup``.
        settle, until: requests that arrive between these seconds count; None: to the end.
    """

    machine: Machine
    ranks: int
    capacity: int | None = None
    settings: Settings = field(default_factory=Settings)
    block_size: int = 16
    slots: int = 256
    budget: int = 8192
    decode_only: bool = False
    as_benchmarks: bool = False
    frontends: int | None = None
    prefix_caching: bool = False
    visits: int | None = None
    noise: float = 0.0
    seed: int = 0
    settle: float = 0.0
    until: float | None = None


def make_world(run: Run, system: str, requests: Requests) -> World:
    """A world with the policy of a system.

    Args:
        run: what is simulated.
        system: ``nanocp``; ``stock``, data parallel with vLLM's balancer; ``round-robin``, with ranks in turn;
            ``tensor``, tensor parallel over all GPUs.
        requests: to be served.

    Raises:
        InputError: no such system.
    """
    if system not in SYSTEMS:
        raise InputError(f"there is no system {system!r}; use some of {','.join(SYSTEMS)}")
    machine, ranks = run.machine, run.ranks
    if run.capacity is not None:
        machine = machine.with_capacity(run.capacity)
    if system == "tensor":
        machine, ranks = machine.tensor_parallel(ranks), 1
    elif system == "nanocp":
        machine = machine.split()
    setup = Setup(
        machine=machine,
        ranks=ranks,
        capacity=machine.capacity,
        block_size=run.block_size,
        slots=run.slots,
        budget=run.budget,
        decode_only=run.decode_only,
        as_benchmarks=run.as_benchmarks,
        prefix_caching=run.prefix_caching,
        visits=run.visits,
        noise=run.noise,
        seed=run.seed,
    )
    world = World(setup, requests)
    if system == "nanocp":
        world.policy = Plugin(world, run.settings)
    else:
        world.policy = Stock(world, "round_robin" if system == "round-robin" else "vllm", run.frontends or ranks)
    return world


def at(values: np.ndarray, q: float) -> float | None:
    """The value below which this part of the values is; None if there are none."""
    if not len(values):
        return None
    return round(float(np.sort(values)[min(len(values) - 1, int(q * len(values)))]), 3)


def figures(world: World, settle: float = 0.0, until: float | None = None) -> dict[str, Any]:
    """What clients have seen, and how the ranks stood.

    ``ttft`` and ``tpot`` (time per output token, of requests with two or more) in ms; ``tokens_per_s`` from the first
    arrival to the last token.
    """
    requests, counts = world.requests, world.counts
    counted = ~np.isnan(world.last) & (requests.at >= settle)
    if until is not None:
        counted &= requests.at < until
    long = counted & (requests.output > 1)
    first = 1e3 * (world.first - requests.at)[counted]
    each = 1e3 * (world.last - world.first)[long] / (requests.output[long] - 1)
    served = ~np.isnan(world.last)
    span = float(world.last[served].max() - requests.at.min()) if served.any() else 0.0
    seconds = max(counts.seconds, 1e-9)
    degrees = sum(counts.degrees.values())
    return {
        "requests": int(counted.sum()),
        "refused": len(world.refused),
        "ttft_p50": at(first, 0.5),
        "ttft_p99": at(first, 0.99),
        "tpot_p50": at(each, 0.5),
        "tpot_p99": at(each, 0.99),
        "tokens_per_s": round(float(requests.output[served].sum()) / span, 1) if span else 0.0,
        "preemptions": counts.events["preemptions"],
        "moves": counts.events["moves"],
        "spills": counts.events["spills"],
        "outside": counts.events["outside"],
        "kv_mean": round(counts.kv / seconds, 3),
        "kv_fullest": round(counts.fullest, 3),
        "kv_ratio": round(counts.kv_ratio / seconds, 3),
        "batch_ratio": round(counts.batch_ratio / seconds, 3),
        "sharded": round(1 - counts.degrees[1] / degrees, 3) if degrees else 0.0,
        "steps": counts.steps,
        "step_ms": round(1e3 * seconds / max(1, counts.steps), 3),
    }


def simulate(run: Run, system: str, requests: Requests) -> dict[str, Any]:
    """Figures of one system that serves these requests."""
    return figures(make_world(run, system, requests).run(), run.settle, run.until)
