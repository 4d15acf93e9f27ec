# SPDX-License-Identifier: Apache-2.0
"""The tables of the FlashAttention backend, with references for its kernels: whole steps over three ranks against
float64, as tables of a step's own size and as the fixed ones of captured graphs. On GPUs: ``tests/gpu``."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.unit.attention_steps import Shape, run_scenarios
from tests.unit.flash_steps import flash_kernel, reference_merge
from tests.unit.processes import run_ranks
from vllm_nanocp.attention import partials
from vllm_nanocp.attention.partials import LOG2_E, NO_KEYS, RowLayout

RANKS = 3
SHAPES = [
    Shape(8, 2, 64, dtype=torch.bfloat16, block_size=16),
    Shape(5, 5, 128, dtype=torch.bfloat16, block_size=16),
    Shape(16, 1, 64, dtype=torch.float16, block_size=32),
]
# Partial outputs are rounded to 2 ** -8 of their size before they are merged.
TOLERANCE = 4e-2
EXACT = {"exact": [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in range(300, 345)]}
FIXED = {"fixed": [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in range(400, 445)]}
Results = list[dict[str, tuple[dict[str, int], list[tuple[int, float]]]]]


def check(results: Results, group: str) -> None:
    for rank, result in enumerate(results):
        wrong = [(seed, error) for seed, error in result[group][1] if not error < TOLERANCE]
        assert not wrong, f"rank {rank}: (seed, error) {wrong}"


def test_tables_of_a_step_s_size() -> None:
    results: Results = run_ranks(RANKS, run_scenarios, EXACT, functools.partial(flash_kernel, "cpu"), seconds=150)
    check(results, "exact")
    for result in results:
        counts = result["exact"][0]
        for kind in ("plain decode", "plain prefill", "sharded decode", "sharded prefill", "guests"):
            assert counts.get(kind, 0) >= 5, f"{kind}: {counts}"


def test_tables_of_fixed_size() -> None:
    """The same tables step after step: what an earlier one left must not show. A rank with guests only, too."""
    results: Results = run_ranks(RANKS, run_scenarios, FIXED, functools.partial(flash_kernel, "cpu", 12), seconds=150)
    check(results, "fixed")
    for result in results:
        counts = result["fixed"][0]
        assert min(counts.get(kind, 0) for kind in ("plain decode", "sharded decode", "guests")) >= 5
        assert set(counts) <= {"plain decode", "sharded decode", "guests", "idle with guests", "no local past"}
    assert sum(result["fixed"][0].get("idle with guests", 0) for result in results) >= 5


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_carry_both_parts(heads: int, dtype: torch.dtype) -> None:
    """Bit for bit, and aligned for wide loads; the parts do not overlap."""
    layout = RowLayout(heads, 64, dtype)
    assert layout.size % 8 == 0
    rows = layout.empty(5, torch.device("cpu"))
    outputs, lses = torch.randn(5, heads, 64).to(dtype), torch.randn(5, heads)
    layout.outputs(rows).copy_(outputs)
    layout.lses(rows).copy_(lses)
    assert torch.equal(layout.outputs(rows), outputs) and torch.equal(layout.lses(rows), lses)
    assert layout.outputs(rows).stride(-1) == 1


def test_merge_picks_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are base 2; a row without keys counts for nothing, alone it gives zero."""
    monkeypatch.setattr(partials, "merge_states", reference_merge)
    layout = RowLayout(2, 64, torch.float16)
    rows = layout.empty(4, torch.device("cpu"))
    layout.outputs(rows).copy_(torch.tensor([1.0, 5.0, 9.0, 0.0]).view(4, 1, 1).expand(4, 2, 64))
    weights = torch.tensor([[1.0, 3.0], [3.0, 1.0], [4.0, 4.0]])
    layout.lses(rows)[:3] = weights.log() * LOG2_E
    layout.lses(rows)[3] = NO_KEYS
    merged = layout.merge(rows, torch.tensor([[0, 1, 3], [2, 3, 3], [3, 0, 2], [3, 3, 3]]))
    expected = [[(1 * 1 + 3 * 5) / 4, (3 * 1 + 1 * 5) / 4], [9, 9], [(1 + 36) / 5, (3 + 36) / 7], [0, 0]]
    torch.testing.assert_close(merged[:, :, 0].float(), torch.tensor(expected), rtol=1e-3, atol=1e-3)
