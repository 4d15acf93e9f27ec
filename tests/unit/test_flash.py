# SPDX-License-Identifier: Apache-2.0
"""The tables of the FlashAttention backend, with references for its kernels: whole steps over three ranks against
float64, as tables of a step's own size and as the fixed ones of captured graphs. On GPUs: ``tests/gpu``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.attention_steps import Shape, run_scenarios
from tests.unit.flash_steps import flash_kernel, make_impl, reference_pieces, reference_schedule
from tests.unit.processes import run_ranks
from tests.unit.route_steps import stress
from vllm_nanocp.attention.gqa import flash_splits
from vllm_nanocp.attention.gqa.fixed_tables import CapturedTables
from vllm_nanocp.attention.gqa.gpu_layer import ShardedAttention
from vllm_nanocp.attention.gqa.routed_layer import MAX_LAYERS
from vllm_nanocp.attention.partial_rows import RowLayout, merge_rows, pack_pieces
from vllm_nanocp.errors import NanoCPConfigError

RANKS = 3
SHAPES = [
    Shape(8, 2, 64, dtype=torch.bfloat16, block_size=16),
    Shape(5, 5, 128, dtype=torch.bfloat16, block_size=16),
    Shape(16, 1, 64, dtype=torch.float16, block_size=32),
]
# Outputs are rounded to 2 ** -8 of their size.
TOLERANCE = 2e-2
EXACT = {"exact": [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in range(300, 345)]}
FIXED = {"fixed": [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in range(400, 445)]}
Results = list[dict[str, tuple[dict[str, int], list[tuple[int, float]]]]]


def check(results: Results, group: str, tolerance: float = TOLERANCE) -> None:
    for rank, result in enumerate(results):
        wrong = [(seed, error) for seed, error in result[group][1] if not error < tolerance]
        assert not wrong, f"rank {rank}: (seed, error) {wrong}"


def test_tables_of_a_step_s_size() -> None:
    results: Results = run_ranks(RANKS, run_scenarios, EXACT, functools.partial(flash_kernel, "cpu"), seconds=150)
    check(results, "exact")
    for result in results:
        counts = result["exact"][0]
        for kind in ("plain decode", "plain prefill", "sharded decode", "sharded prefill", "guests"):
            assert counts.get(kind, 0) >= 5, f"{kind}: {counts}"


@pytest.mark.parametrize("max_tokens", [7, 64])
@pytest.mark.parametrize("num_kv_heads", [1, 4, 16])
def test_fixed_tables_are_where_the_kernels_expect_them(max_tokens: int, num_kv_heads: int) -> None:
    """At multiples of 16 bytes, as those that the kernels were warmed up with; and none reaches into the next."""
    tables = CapturedTables(5, 3, max_tokens, RowLayout(16, 64), num_kv_heads, torch.device("cpu"), None)
    route, visits = tables._route, tables._visits
    found = [*vars(route).values(), visits.tables, visits.pieces, visits.starts, visits.first, visits.count]
    assert all(table.data_ptr() % 16 == 0 for table in found)
    spans = sorted((table.data_ptr(), table.data_ptr() + table.nbytes) for table in found)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_tables_of_fixed_size() -> None:
    """The same tables step after step: what an earlier one left must not show. A rank with guests only, too."""
    results: Results = run_ranks(RANKS, run_scenarios, FIXED, functools.partial(flash_kernel, "cpu", 12), seconds=150)
    check(results, "fixed")
    for result in results:
        counts = result["fixed"][0]
        assert min(counts.get(kind, 0) for kind in ("plain decode", "sharded decode", "guests")) >= 5
        assert set(counts) <= {"plain decode", "sharded decode", "guests", "idle with guests", "no local past"}
    assert sum(result["fixed"][0].get("idle with guests", 0) for result in results) >= 5


@pytest.mark.parametrize("capacity", [0, 12])
def test_rows_with_drafts(capacity: int) -> None:
    """Four queries a row; in every other step the plan counts drafts of the step before that were wrong."""
    groups = {"drafts": [(SHAPES[seed % 3], seed, seed % 9 != 8) for seed in range(700, 715)]}
    kernel = functools.partial(flash_kernel, "cpu", capacity, queries=4)
    results: Results = run_ranks(RANKS, run_scenarios, groups, kernel, seconds=150)
    check(results, "drafts")
    for kind in ("plain decode", "sharded decode", "guests", "idle with guests"):
        assert sum(result["drafts"][0].get(kind, 0) for result in results) >= 3, kind


@pytest.mark.parametrize("queries", [1, 3])
def test_the_routed_exchange(tmp_path: Path, queries: int) -> None:
    """Over memory that three processes share; its kernels in Triton's interpreter."""
    shapes = [Shape(4, 2, 64, torch.bfloat16, 16), Shape(3, 3, 80, torch.bfloat16, 16)]
    groups = {"routed": [(shapes[seed % 2], seed, seed % 9 != 8) for seed in range(600, 610 if queries == 1 else 604)]}
    kernel = functools.partial(flash_kernel, "cpu", 5, 0, True, str(tmp_path), queries)
    results: Results = run_ranks(RANKS, run_scenarios, groups, kernel, seconds=150)
    check(results, "routed", 2 * TOLERANCE)  # the interpreter cuts off bits where a GPU rounds
    for kind in ("plain decode", "plain prefill", "sharded decode", "guests"):
        assert sum(result["routed"][0].get(kind, 0) for result in results) >= (3 if queries == 1 else 1), kind
    assert sum(result["routed"][0].get("idle with guests", 0) for result in results) >= (2 if queries == 1 else 1)


def test_a_draft_model_s_layers_come_behind_the_target_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever run first: vLLM captures the draft model's graphs first, where it foresees the memory of all. Flags of
    a step's places grow from layer to layer."""
    monkeypatch.setattr(ShardedAttention, "kv", lambda *_: None)
    impls, seen, none = [make_impl(SHAPES[0]) for _ in range(4)], [], torch.empty(0)
    routes = SimpleNamespace(attend=lambda *args: seen.append(args[-1]))
    rows = SimpleNamespace(routed=(routes, None), plain=False, visits=0)
    metadata = SimpleNamespace(sharded=rows, block_table=None, seq_lens=None)
    for number in (3, 0, 1, 2, 3, 0, 1, 2, 3):
        layer = SimpleNamespace(is_draft_layer=number == 3)
        impls[number].forward(layer, none, none, none, none, metadata, none)  # type: ignore[arg-type]
    step = seen[1:5]
    assert step == sorted(set(step)) and seen[0] == step[-1] < MAX_LAYERS and seen[5:] == step


def test_random_routes(tmp_path: Path) -> None:
    """Empty, full and one-sided ones, one after another in the same memory, with ranks that come late."""
    compared = run_ranks(RANKS, stress, 7, "cpu", str(tmp_path), 0.2, seconds=200)
    assert sum(compared) > 30


def random_rows(layout: RowLayout, rows: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    made = layout.empty(rows, torch.device("cpu"))
    layout.outputs(made).copy_(torch.randn(rows, layout.num_heads, layout.head_size))
    layout.lses(made).copy_(3 * torch.randn(rows, layout.num_heads))
    return made


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 80), (8, 128)])
@pytest.mark.parametrize("many", [1, 7, 600])
def test_merge(heads: int, size: int, many: int) -> None:
    """Any number of rows to a result, none among them; unused results write nothing; NaN outside is never read."""
    layout = RowLayout(heads, size)
    assert layout.size % 4 == 0
    rows = torch.cat([random_rows(layout, 9, many), torch.full((1, layout.size), float("nan"))])
    layout.lses(rows)[3] = float("-inf")  # no keys, and so any output
    layout.outputs(rows)[3] = float("nan")
    pick = torch.randint(-1, 9, (many, 4))
    pick[:, 0] = torch.randint(4, 9, (many,))
    tokens = torch.where(torch.arange(many) % 5 == 4, -1, torch.randperm(many))
    output = torch.full((many, heads, size), 7.0, dtype=torch.bfloat16)
    merge_rows(rows, layout, pick, tokens, output)
    for result, token in enumerate(tokens.tolist()):
        if token < 0:
            continue
        chosen = [p for p in pick[result].tolist() if p >= 0 and p != 3]
        weights = layout.lses(rows)[chosen].double().softmax(0)
        expected = (weights.unsqueeze(-1) * layout.outputs(rows)[chosen].double()).sum(0)
        torch.testing.assert_close(output[token].double(), expected, rtol=8e-3, atol=8e-3)
    untouched = set(range(many)) - set(tokens.tolist())
    assert all((output[token] == 7.0).all() for token in untouched)


@pytest.mark.parametrize("rows", [1, 5, 530])
def test_pack(rows: int) -> None:
    """Pieces of each row of a launch, more queries than rows; pieces past a row's number are not read."""
    layout = RowLayout(2, 64)
    torch.manual_seed(rows)
    launch_row = torch.arange(rows) // 3
    pieces = torch.randint(2, 5, (rows,), dtype=torch.int32)
    outputs, lses = torch.randn(5, 2, rows, 64), 3 * torch.randn(5, 2, rows)
    lses[1, 1] = float("inf")  # no keys
    outputs[1, 1] = float("nan")
    for i in range(rows):
        outputs[pieces[launch_row[i]] :, :, i] = lses[pieces[launch_row[i]] :, :, i] = float("nan")
    packed = torch.full((rows, layout.size), float("nan"))
    pack_pieces(packed, layout, outputs, lses, pieces, launch_row)
    for i in range(rows):
        n = int(pieces[launch_row[i]])
        lse = lses[:n, :, i].double().masked_fill(lses[:n, :, i] == float("inf"), float("-inf"))
        out = (lse.softmax(0).unsqueeze(-1) * outputs[:n, :, i].double().nan_to_num(0)).sum(0)
        torch.testing.assert_close(layout.outputs(packed)[i].double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layout.lses(packed)[i].double(), lse.logsumexp(0), rtol=1e-5, atol=1e-5)


def test_a_row_without_keys_is_empty() -> None:
    layout = RowLayout(1, 64)
    packed = torch.full((1, layout.size), float("nan"))
    none = torch.full((2, 1, 1), float("-inf"))
    pack_pieces(packed, layout, torch.full((2, 1, 1, 64), float("nan")), none, torch.tensor([2], dtype=torch.int32))
    assert layout.lses(packed).item() == float("-inf") and (layout.outputs(packed) == 0).all()


Pieces = tuple[torch.Tensor, torch.Tensor]


def other_base(outputs: torch.Tensor, lses: torch.Tensor) -> Pieces:
    return outputs, lses * 1.4426950408889634


def other_outputs(outputs: torch.Tensor, lses: torch.Tensor) -> Pieces:
    return 1.1 * outputs, lses


def unwritten(outputs: torch.Tensor, lses: torch.Tensor) -> Pieces:
    """As for a row of one piece, which FlashAttention writes to its 16-bit output only."""
    return torch.full_like(outputs, float("nan")), torch.full_like(lses, float("nan"))


def refuses(outputs: torch.Tensor, lses: torch.Tensor) -> Pieces:
    raise RuntimeError("_vllm_fa3_C::fwd() expected at most 36 arguments\nDeclaration: fwd(Tensor q, Tensor k")


def check_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor], Pieces] | None) -> None:
    def attend(*args: Any) -> Pieces:
        pieces = reference_pieces(*args)
        return pieces if change is None else change(*pieces)

    monkeypatch.setattr(flash_splits, "make_schedule", reference_schedule)
    monkeypatch.setattr(flash_splits, "attend_pieces", attend)
    flash_splits.self_check(4, 2, 64, torch.bfloat16, torch.device("cpu"))


def test_a_flash_attention_that_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    check_with(monkeypatch, None)


@pytest.mark.parametrize("change", [other_base, other_outputs, unwritten, refuses])
def test_another_flash_attention_is_refused_in_one_line(
    change: Callable[[torch.Tensor, torch.Tensor], Pieces], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        check_with(monkeypatch, change)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("nanocp: this FlashAttention does not return")
    assert '"max_degree": 1' in line and len(line) < 500
    assert caught.value.__cause__ is not None, "the log has the whole reason"
