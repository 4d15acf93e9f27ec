# SPDX-License-Identifier: Apache-2.0
"""Whole attention steps in several modes, in one start of the ranks, and their error next to stock attention's."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests.unit.attention_steps import Kernel, run_scenarios
from tests.unit.processes import run_ranks

# Arguments of a mode's kernel, and groups of scenarios, by the mode's name.
Modes = dict[str, tuple[dict[str, Any], Any]]
RELATIVE = 1e-2
OF_STOCK = 1.2


def each_mode(rank: int, size: int, modes: Modes, make_kernel: Callable[[dict[str, Any]], Kernel]) -> dict[str, Any]:
    """``run_scenarios`` by mode; of one that fails the traceback."""
    results: dict[str, Any] = {}
    for name, (args, groups) in modes.items():
        try:
            results[name] = run_scenarios(rank, size, groups, lambda a=args: make_kernel(a))  # type: ignore[misc]
        except Exception:  # the others are to be seen as well
            results[name] = traceback.format_exc()[-3000:]
            # Now, for the other ranks may wait for this one until all are killed, and nobody answers.
            print(f"rank {rank}, {name}: {results[name]}", file=sys.stderr, flush=True)
            torch.cuda.synchronize()  # raises where the device is lost
    return results


def on_ranks(
    ranks: int, run_modes: Callable[..., dict[str, Any]], modes: Modes, staged: bool, seconds: float
) -> list[dict[str, Any]] | str:
    """What ``run_modes(rank, size, modes, staged)`` finds on each rank, each of which imports vLLM. What went wrong,
    rather than a second try."""
    try:
        return run_ranks(ranks, run_modes, modes, staged, seconds=seconds, backend="gloo" if staged else "nccl")
    except AssertionError as error:
        return str(error)


def of_mode(results: list[dict[str, Any]] | str, mode: str) -> list[Any]:
    """Of each rank what a mode has found; that it has found something."""
    assert not isinstance(results, str), results
    for rank, result in enumerate(results):
        assert not isinstance(result[mode], str), f"rank {rank}: {result[mode]}"
    return [result[mode] for result in results]


def check_error(results: list[dict[str, Any]] | str, mode: str, shapes: Iterable[str], **case: Any) -> None:
    """Errors of a mode are small, and not much larger than stock's; rows were sharded."""
    ranks = of_mode(results, mode)
    for name in shapes:
        kinds = ("norm", "ours", "stock", "sharded decode", "sharded prefill")
        totals = {kind: sum(rank[name][0].get(kind, 0.0) for rank in ranks) for kind in kinds}
        assert all(error < math.inf for rank in ranks for _, error in rank[name][1]), (mode, name)
        ours, stock = (math.sqrt(totals[kind] / totals["norm"]) for kind in ("ours", "stock"))
        found = {"mode": mode, **case, "heads": name, "relative_error": ours, "stock": stock, "ratio": ours / stock}
        print(json.dumps(found))
        assert ours < RELATIVE and ours <= OF_STOCK * stock, found
        assert totals["sharded decode"] >= 2, found
