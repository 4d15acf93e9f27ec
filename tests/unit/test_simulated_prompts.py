# SPDX-License-Identifier: Apache-2.0
"""The simulator's computed prompts: a share of the time for decodes, what visits cost, loads that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulated_curves import HALF, HALF_WINDOW, TOLERANCE, computed_load
from vllm_nanocp.placement.prefill_steps import PrefillGap
from vllm_nanocp.sim.figures import Run, simulate
from vllm_nanocp.sim.machine import PRESETS
from vllm_nanocp.sim.nanocp import Settings
from vllm_nanocp.sim.trace import Requests

ROOT = Path(__file__).parents[2]
MACHINE, HALVED = (PRESETS[name] for name in ("h200-qwen3-30b-a3b", "h200-qwen3-30b-a3b-24-layers"))


def test_decodes_have_a_share_of_the_time_of_prompts() -> None:
    """Steps with prompts are as long as without the setting; tokens come sooner, and first tokens little later."""
    requests, gap = computed_load(0, HALF_WINDOW), PrefillGap(ms=None, decode_steps=0, decode_share=0.05)
    without, found = (
        simulate(Run(HALVED, 2, settings=Settings(prefill_gap=one)), "nanocp", requests) for one in (None, gap)
    )
    assert found["requests"] == len(requests)
    assert found["tpot_p99"] < 0.7 * without["tpot_p99"] and found["ttft_p99"] < 1.2 * without["ttft_p99"]


def test_what_visits_and_steps_with_prompts_cost() -> None:
    """Alone on two ranks: each chunk but the first visits; 16 chunks are 8 steps."""
    requests = Requests(np.array([0.0]), np.array([131_072]), np.array([1]))

    def wait(**costs: float) -> float:
        settings = Settings(16_384, chunk_tokens=8192)
        run = Run(replace(MACHINE, **costs), 2, slots=1, budget=8192, settings=settings)
        return float(simulate(run, "nanocp", requests)["ttft_p50"])

    pairs = 131_072**2 / 2 * MACHINE.pair * 1e3
    assert wait(eager=0.1) - wait() == pytest.approx(900, abs=101)
    # Half of nearly all pairs visit, on both ranks at once.
    assert wait(visit=2.0) - wait() == pytest.approx(pairs / 4, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["nanocp", "chunks of 4096"])
def test_measured_loads_of_computed_prompts_with_half_of_the_layers(name: str, seed: int) -> None:
    """Seconds until all had ended, on two H200s. Stock's depend on chance more than this allows, see the results."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "gpu_computed_2xH200.json").read_text())
    (row,) = measured["raw"][name][f"computed:5x{seed}"]
    requests = computed_load(seed, HALF_WINDOW)
    found = simulate(Run(HALVED, 2, settings=HALF[name]), "nanocp", requests)
    assert requests.output.sum() / found["tokens_per_s"] == pytest.approx(row["took_s"], rel=TOLERANCE)
