# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper with a reference for FlashAttention: whole steps over several ranks against float64, with
tables of a step's own size and with the fixed ones of captured graphs. On GPUs: ``tests/gpu/test_latent.py``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.unit.flash_latent_steps import run_modes
from tests.unit.latent_steps import latent_shape
from tests.unit.processes import run_ranks

SHAPES = [
    latent_shape(4, 32, 32, dtype=torch.bfloat16),
    latent_shape(3, 16, 96, dtype=torch.float16),
    latent_shape(16, 128, 128, dtype=torch.bfloat16),
]
WIDE = latent_shape(128, 128, 128, dtype=torch.bfloat16)
# Of single numbers, the largest of which are about 6; below is the error of all.
TOLERANCE = 8e-2
OF_STOCK = 1.2


def specs(seeds: range) -> list[Any]:
    """Each shape in turn, and now and then a step in which nobody visits."""
    return [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in seeds]


def check(results: list[Any], mode: str) -> dict[str, float]:
    """Counts of all ranks."""
    counts: dict[str, float] = {}
    for rank, result in enumerate(results):
        seen, errors = result[mode]
        wrong = [(seed, error) for seed, error in errors if not error < TOLERANCE]
        assert not wrong, f"{mode}, rank {rank}: (seed, error) {wrong}"
        for kind, n in seen.items():
            counts[kind] = counts.get(kind, 0) + n
    if "norm" in counts:
        ours, stock = (math.sqrt(counts[name] / counts["norm"]) for name in ("ours", "stock"))
        print(f"{mode}: error {ours:.2e}, {ours / stock:.3f} of stock's")
        assert 0 < ours <= OF_STOCK * stock
    return counts


def test_whole_steps_over_three_ranks() -> None:
    modes: dict[str, Any] = {
        # Rows of one query are decodes to vLLM, those of more than 8 are projected; as vLLM has it, and absorbed.
        "projected": (dict(stock=True), specs(range(11))),
        "absorbed": (dict(threshold=512, few=1000), specs(range(100, 106))),
        "fixed": (dict(capacity=12, stock=True), specs(range(200, 211))),
        "128 heads": (dict(), [(WIDE, seed, True) for seed in (301,)]),
    }
    results = run_ranks(3, run_modes, modes, seconds=200)
    for mode in modes:
        counts = check(results, mode)
        print(mode, counts)
        if mode == "128 heads":
            continue
        decodes = ("plain decode", "sharded decode", "guests", "idle with guests")
        chunks = ("plain prefill", "sharded prefill") if mode != "fixed" else ()
        assert all(counts.get(kind, 0) >= 3 for kind in (*decodes, *chunks)), counts


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_numbers_of_ranks(ranks: int) -> None:
    modes: dict[str, Any] = {"exact": ({}, specs(range(400, 404))), "fixed": (dict(capacity=12), specs(range(4)))}
    results = run_ranks(ranks, run_modes, modes, seconds=200)
    for mode in modes:
        assert check(results, mode)["sharded decode"] >= 3
