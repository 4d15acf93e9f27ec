# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper with a reference for FlashAttention: whole steps over several ranks against float64, with
tables of a step's own size and with the fixed ones of captured graphs. On GPUs: ``tests/gpu/test_latent.py``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

from tests.unit.flash_latent_steps import (
    FlashAttnMLAImpl,
    NanoCPFlashAttnMLABackend,
    bare_family,
    make_layer,
    make_prefill,
    run_modes,
    sizes_of,
)
from tests.unit.latent_steps import CPU, LatentShape, bare_layer, latent_shape
from tests.unit.processes import run_ranks
from tests.unit.row_route_steps import stress

from vllm.v1.attention.backends.mla import flashattn_mla  # isort: skip  # importable once there is a reference
from vllm_nanocp.attention import row_routes
from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.flash_launches import ShardLaunch
from vllm_nanocp.attention.mla import flash_latent, flash_mla
from vllm_nanocp.attention.mla.flash_latent import Absorbed, Projected, attend
from vllm_nanocp.attention.mla.latent_fixed import (
    FixedLatentTables,
    empty_block_table,
    parts_of,
    pieces_of,
    places_memory,
    spans_of,
)
from vllm_nanocp.attention.mla.latent_kernel import Latents, Piece
from vllm_nanocp.attention.mla.latent_sizes import LatentSizes
from vllm_nanocp.attention.mla.latent_tables import PROJECTED, heads_together, most_memory, projected_at_once
from vllm_nanocp.attention.partial_rows import RowLayout
from vllm_nanocp.attention.row_routes import RowRoutes
from vllm_nanocp.attention.sharded_step import Guest, OwnRow, ShardedStep
from vllm_nanocp.attention.supported import check_layers
from vllm_nanocp.errors import NanoCPConfigError

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
        "projected": (dict(stock=True), specs(range(9))),
        "absorbed": (dict(threshold=512, few=1000), specs(range(100, 104))),
        "fixed": (dict(capacity=12, stock=True), specs(range(200, 207))),
        "graph": (dict(capacity=12, graph=True), specs(range(500, 505))),
        "groups": (dict(groups=4), [(SHAPES[seed % 2 * 2], seed, True) for seed in range(600, 604)]),
        "128 heads": (dict(), [(WIDE, seed, True) for seed in (301,)]),
    }
    results = run_ranks(3, run_modes, modes, seconds=200)
    for mode in modes:
        counts = check(results, mode)
        print(mode, counts)
        if mode in ("groups", "128 heads"):
            continue
        decodes = ("plain decode", "sharded decode", "guests", "idle with guests")
        chunks = ("plain prefill", "sharded prefill") if mode not in ("fixed", "graph") else ()
        assert all(counts.get(kind, 0) >= 2 for kind in (*decodes, *chunks)), counts


def test_the_routed_exchange(tmp_path: Path) -> None:
    """Over memory that three processes share, in which NaN is where nothing was written; its kernels in Triton's
    interpreter. One launch over places and several; steps as graphs have them."""
    ours = dict(capacity=12, routed=True, shared=str(tmp_path))
    few: dict[str, Any] = dict(ours, shared=str(tmp_path / "few"), capacity=5, pad=0)
    (tmp_path / "few").mkdir()
    modes: dict[str, Any] = {
        # Not next to stock's error: the interpreter cuts off bits where a GPU rounds.
        "routed": (ours, [(SHAPES[seed % 2], seed, seed % 9 != 8) for seed in range(700, 710)]),
        "graph": (dict(ours, graph=True), [(SHAPES[seed % 2], seed, True) for seed in range(710, 714)]),
        "unpadded": (few, [(SHAPES[seed % 2], seed, True) for seed in range(720, 724)]),
        "drafts": (dict(ours, queries=3), [(SHAPES[seed % 2], seed, True) for seed in range(730, 732)]),
        "drafts, graph": (dict(ours, queries=3, graph=True), [(SHAPES[0], 740, True)]),
    }
    results = run_ranks(3, run_modes, modes, seconds=200)
    for mode in modes:
        counts = check(results, mode)
        print(mode, counts)
        assert all(counts.get(kind, 0) >= 1 for kind in ("sharded decode", "guests")), counts
    counts = check(results, "routed")
    assert all(counts.get(kind, 0) >= 2 for kind in ("plain decode", "idle with guests")), counts


def test_random_routes(tmp_path: Path) -> None:
    """Empty, full and one-sided ones, one after another in the same memory, of two capacities; holders without keys;
    ranks that come late."""
    compared = run_ranks(3, stress, 14, "cpu", str(tmp_path), 0.05, seconds=200)
    assert sum(compared) > 30


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_other_numbers_of_ranks(ranks: int) -> None:
    """One visits itself, as a home that holds an earlier run does: how a single GPU runs all of it."""
    modes: dict[str, Any] = {
        "exact": ({}, specs(range(400, 403))),
        "graph": (dict(capacity=12, graph=True), specs(range(3))),
    }
    results = run_ranks(ranks, run_modes, modes, seconds=200)
    for mode in modes:
        assert check(results, mode)["sharded decode"] >= 2


@pytest.mark.parametrize(("ranks", "queries"), [(3, 4), (2, 2), (1, 4)])
def test_rows_that_verify_drafts(ranks: int, queries: int) -> None:
    """Of 1 + k queries each, causal at their homes. The plan counts drafts of the step before that were wrong; what is
    behind the runner's own length is NaN. Beside prompts, and from graphs."""
    modes: dict[str, Any] = {
        "exact": (dict(queries=queries, stock=True), specs(range(700, 707))),
        "absorbed": (dict(queries=queries, threshold=512, few=1000), specs(range(720, 724))),
        "fixed": (dict(queries=queries, capacity=12, stock=True), specs(range(740, 746))),
        "graph": (dict(queries=queries, capacity=12, graph=True), specs(range(760, 765))),
    }
    results = run_ranks(ranks, run_modes, modes, seconds=200)
    for mode in modes:
        counts = check(results, mode)
        print(mode, counts)
        assert counts["sharded decode"] >= 4 and counts["guests"] >= 4
        assert ranks < 3 or counts["idle with guests"]


# -- The parts ------------------------------------------------------------------------------------------------------


def held_here(shape: LatentShape, tokens: int) -> tuple[Latents, torch.Tensor]:
    """A cache whose last blocks hold some latents, in reverse order, and else NaN; and these latents."""
    layer, blocks = make_layer(shape, CPU), -(-tokens // 16)
    latents = torch.randn(tokens, shape.rank + shape.rotated, generator=torch.Generator().manual_seed(tokens))
    latents = latents.to(shape.dtype)
    cache = torch.full(shape.cache_size(blocks + 3), float("nan"), dtype=shape.dtype)
    for at in range(tokens):
        cache[blocks + 2 - at // 16, at % 16] = latents[at]
    return Latents(cache, layer.W_UK_T, layer.W_UV, shape.scale, sizes_of(shape), flash_mla.FLASH_ATTENTION), latents


def queries_of(shape: LatentShape, count: int) -> torch.Tensor:
    made = torch.randn(count, shape.num_heads, shape.head_size, generator=torch.Generator().manual_seed(count))
    return made.to(shape.dtype)


def over(shape: LatentShape, queries: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, every query over all: outputs and log-sum-exps."""
    keys, values = shape.projected(latents[:, None])
    scores = torch.einsum("qhd,khd->qhk", queries.double(), keys) * shape.scale
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def rows_for(shape: LatentShape, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    layout = RowLayout(shape.num_heads, shape.value_size)
    rows = layout.empty(count, CPU).fill_(float("nan"))
    return layout.outputs(rows), layout.lses(rows)


def test_rows_without_keys_weigh_nothing() -> None:
    """Whatever the kernel says of them: it leaves NaN and, by the row, -inf, inf or a number."""
    shape = SHAPES[0]
    held, latents = held_here(shape, 40)
    lengths = torch.tensor([0, 0, 0, 33, 0, 0], dtype=torch.int32)
    launch = ShardLaunch(
        num_queries=6,
        query_starts=torch.arange(7, dtype=torch.int32),
        lengths=lengths,
        block_table=torch.tensor([5, 4, 3], dtype=torch.int32).expand(6, 3),
        max_queries=1,
        max_length=48,
        causal=False,
        max_pieces=1,
    )
    queries, (outputs, lses) = queries_of(shape, 6), rows_for(shape, 6)
    attend(queries, held, Absorbed(slice(0, 6), launch, lengths == 0), outputs, lses)
    expected, lse = over(shape, queries[3:4], latents[:33])
    torch.testing.assert_close(outputs[3:4].double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lses[3:4].double(), lse, rtol=1e-2, atol=1e-2)
    assert (lses[[0, 1, 2, 4, 5]] == float("-inf")).all()


@pytest.mark.parametrize("together", [3, 1024])
def test_projected_in_pieces(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins within a block among them; the result is merged some queries at a time."""
    monkeypatch.setattr(flash_latent, "TOGETHER", together)
    shape, count = SHAPES[0], 10
    held, latents = held_here(shape, 75)
    blocks = torch.tensor([7, 6, 5, 4, 3], dtype=torch.int32)
    spans = [(0, 32), (32, 21), (53, 22)]
    pieces = [
        Piece(blocks[a // 16 :][: -(-(a % 16 + n) // 16)], a % 16, n, torch.tensor([0, n], dtype=torch.int32), False)
        for a, n in spans
    ]
    queries, (outputs, lses) = queries_of(shape, count + 2), rows_for(shape, count + 2)
    work = Projected(slice(1, count + 1), torch.tensor([0, count], dtype=torch.int32), pieces)
    attend(queries, held, work, outputs, lses)
    expected, lse = over(shape, queries[1:-1], latents)
    torch.testing.assert_close(outputs[1:-1].double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lses[1:-1].double(), lse, rtol=1e-2, atol=1e-2)
    assert outputs[[0, -1]].isnan().all(), "those of others are left alone"


def test_what_is_projected() -> None:
    """By multiplications for a key and head; a query's own keys begin where what it has seen before ends."""
    sizes = LatentSizes(16, 128, 64, 512, 128)
    assert sizes.absorbs(170) and not sizes.absorbs(171)
    per_token = 16 * sizes.projected_size * 2
    at_once = projected_at_once(sizes, 16, torch.bfloat16)
    assert at_once % 16 == 0 and at_once * per_token <= PROJECTED < (at_once + 16) * per_token
    assert projected_at_once(LatentSizes(10**6, 128, 64, 512, 128), 16, torch.bfloat16) == 16


def test_pieces_of_a_fixed_launch_fit() -> None:
    """A launch over places has float32 results for each piece, which stay within 1 GiB."""
    for heads in (16, 128):
        sizes = LatentSizes(heads, 128, 64, 512, 128)
        for places in (2, 80, 320, 1280):
            pieces = pieces_of(places, sizes)
            assert 1 <= pieces <= 128 and (pieces == 1 or pieces * places * heads * 512 * 4 <= 1 << 30)
    assert pieces_of(80, LatentSizes(128, 128, 64, 512, 128)) == 51
    assert pieces_of(80, LatentSizes(16, 128, 64, 512, 128)) == 128


@pytest.mark.parametrize("places", [1, 80, 991, 992, 993, 1280, 1984, 1985, 10_000])
def test_launches_over_places_are_few_and_cut_into_pieces(places: int) -> None:
    """FlashAttention cuts no row of a launch of more than 992. Each begins at a multiple of 16, for Triton's sake."""
    parts = parts_of(places, 992)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(places))
    assert len(parts) == -(-places // 992) and max(part.stop - part.start for part in parts) <= 992
    assert all(part.start % 16 == 0 for part in parts)


def test_heads_go_in_groups_where_much_travels() -> None:
    """As many on all ranks, by what the busiest has; and memory is set aside for that much only."""
    sizes = LatentSizes(128, 128, 64, 512, 128)
    row = 128 * 192 * 2 + 4 * RowLayout(128, 128).size
    most = 9 * 8192  # of four ranks, all tokens of a chunk visit all
    assert [heads_together(n, sizes, torch.bfloat16).num_heads for n in (1, most // 4, most // 2, most)] == [
        128, 128, 64, 32,
    ]  # fmt: skip
    assert heads_together(10**9, sizes, torch.bfloat16).num_heads == 16
    assert heads_together(10**9, replace(sizes, num_heads=20), torch.bfloat16).num_heads == 20
    assert 5 << 29 <= most_memory(4, 8192, sizes, torch.bfloat16) < (5 << 29) + 1.3e9 < most * row / 2
    small = replace(sizes, num_heads=16)
    assert most_memory(4, 8192, small, torch.bfloat16) > most * row / 8


def test_memory_of_the_routed_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it runs outside of graphs a layer takes what all places do, also beside small chunks of prompts."""
    family = bare_family(WIDE)
    small, large = (family.most_memory(4, tokens) for tokens in (64, 8192))
    monkeypatch.setattr(context, "routes", {16: None, 64: None})
    found = family.most_memory(4, 64)
    absorbed, result, values = (5 * 64 * 128 * n for n in (2 * 512, 2 * 512, 4 * 128))
    pieces = 5 * 64 * 128 * 4 * 512 * pieces_of(5 * 64, family.sizes)
    assert found == absorbed + result + values + pieces > small
    assert family.most_memory(4, 8192) == large
    # With drafts a launch has a rank's own places or the others', of four queries each.
    monkeypatch.setattr(context, "queries", 4)

    def launch(rows: int) -> int:
        numbers = 2 * 512 + 2 * 512 + 4 * 128 + 4 * 512 * pieces_of(rows, family.sizes)
        return rows * family.sizes.num_heads * numbers

    assert family.most_memory(4, 64) == launch(4 * 4 * 64)
    # Here 2,016 rows are cut into more pieces than a launch of 2,112, and take more.
    monkeypatch.setattr(context, "routes", {344: None})
    spans = spans_of(3 * 344, 4 * 344, 4, family.kernel.most_rows)
    assert {4 * (part.stop - part.start) for part, _ in spans} == {1376, 2016, 2112}
    layers = family.sizes, family.dtype
    needed = {rows: max(launch(rows), family.kernel.memory(rows, *layers)) for rows in (1376, 2016, 2112)}
    assert places_memory(344, 3, 4, *layers, family.kernel) == max(needed.values())
    assert launch(2016) > launch(2112)
    # And the later forwards of a draft model, of one query a place: 32 rows are cut into more pieces than 48.
    monkeypatch.setattr(context, "queries", 3)
    monkeypatch.setattr(context, "routes", {8: None})
    first = family.most_memory(3, 64)
    monkeypatch.setattr(context, "draft_routes", {8: None})
    assert family.most_memory(3, 64) == launch(4 * 8) > first


def test_fixed_tables_begin_at_multiples_of_16_bytes() -> None:
    table = empty_block_table(5, 3, 640, 16, CPU)
    tables = FixedLatentTables(5, 3, 7, table, sizes_of(SHAPES[0]), 16, torch.bfloat16)
    parts = list(tables._at)
    assert all(part.data_ptr() % 16 == 0 for part in parts)
    spans = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(("capacity", "ranks", "queries"), [(4, 3, 2), (4, 2, 3), (16, 3, 4)])
def test_kernels_are_compiled_for_where_launches_begin(
    monkeypatch: pytest.MonkeyPatch, capacity: int, ranks: int, queries: int
) -> None:
    """What says which rows of a launch are empty begins anywhere, with few visits and several queries."""
    layout, seen = RowLayout(4, 128), set[bool]()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: seen.add(args[6].data_ptr() % 16 == 0)

    monkeypatch.setattr(row_routes, "_answer_kernel", Kernel())
    most = capacity * queries
    buffer = torch.zeros(RowRoutes.size(most, ranks, layout, 1536), dtype=torch.uint8)
    pointers = torch.full((ranks,), buffer.data_ptr())
    routes = RowRoutes(most, ranks, 0, layout, 1536, buffer, pointers)
    routes.warm_up(torch.bfloat16, 192)
    table = empty_block_table(capacity, ranks, 640, 16, CPU)
    sizes = LatentSizes(4, 128, 64, 512, 128)
    tables = FixedLatentTables(
        capacity, ranks, 7, table, sizes, 16, torch.bfloat16, queries=queries, routes=routes, ends=True
    )
    begins = {work.empty.data_ptr() % 16 == 0 for work in tables._fixed if work.empty is not None}
    assert (False in begins) == (capacity == 4) and begins <= seen


def a_step(capacity: int, rows: dict[int, int]) -> tuple[ShardedStep, CommonAttentionMetadata]:
    """A batch of five decodes of rank 0 of 2, of which some visit rank 1; by row how many tokens they see here."""
    starts, lengths = torch.arange(6, dtype=torch.int32), torch.tensor([70, 71, 72, 73, 74], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=5,
        num_actual_tokens=5,
        max_query_len=1,
        max_seq_len=80,
        block_table_tensor=torch.arange(25, dtype=torch.int32).view(5, 5) + 1,
        slot_mapping=torch.zeros(5, dtype=torch.int64),
    )
    step = ShardedStep(0, send_counts=[0, len(rows)], recv_counts=[0, 1], capacity=capacity)
    step.own = [OwnRow(lambda r=row: r, 1, 2, seen - 1, [(1, i)]) for i, (row, seen) in enumerate(rows.items())]
    step.guests = [Guest(1, 0, 1, "shard", torch.tensor([9, 8, 7], dtype=torch.int32), 37)]
    return step, common


@pytest.mark.parametrize("most_rows", [992, 4])
def test_fixed_tables_of_a_step_and_of_the_next(most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent, seen and merged where; vLLM's own launch sees nothing of rows that visit. Tables of two capacities
    share the block ids, and nothing is left of the step before. In one launch, and in two or three."""
    monkeypatch.setattr(flash_mla, "MOST_ROWS", most_rows)
    shared = empty_block_table(3, 2, 80, 16, CPU)
    large, small = (FixedLatentTables(c, 2, 8, shared, sizes_of(SHAPES[0]), 16, torch.bfloat16) for c in (3, 2))
    large.fill(*a_step(3, {0: 30, 2: 16, 4: 1}))
    for tables, capacity, rows in ((small, 2, {3: 20, 1: 33}), (large, 3, {2: 17})):
        step, common = a_step(capacity, rows)
        made, lengths = tables.fill(step, common)
        assert len(made.fixed) == (1 if most_rows == 992 else -(-3 * capacity // 4))
        seen_at = torch.cat([work.launch.lengths for work in made.fixed]).tolist()
        held_at = torch.cat([work.launch.block_table for work in made.fixed])
        empty = torch.cat([work.empty for work in made.fixed]).tolist()
        here = [2 * capacity + i for i in range(len(rows))]
        seen = dict(zip(here, rows.values(), strict=True)) | {capacity: 37}  # the guest of rank 1
        assert {place: n for place, n in enumerate(seen_at) if n} == seen
        assert empty == [n == 0 for n in seen_at]
        for place, row in zip(here, rows, strict=True):
            blocks = -(-seen[place] // 16)
            expected = common.block_table_tensor[row, 2 : 2 + blocks]
            assert held_at[place, :blocks].tolist() == expected.tolist()
        assert held_at[capacity, :3].tolist() == [9, 8, 7]
        assert lengths.tolist() == [0 if row in rows else 70 + row for row in range(5)]
        places = [capacity + i for i in range(len(rows))]  # of what comes back from rank 1
        assert made.pick.tolist()[: len(rows)] == [[h, p, -1] for h, p in zip(here, places, strict=True)]
        assert made.tokens.tolist()[: len(rows)] == list(rows) == made.send[here].tolist() == made.send[places].tolist()
        assert (made.tokens[len(rows) :] == -1).all() and (made.pick[len(rows) :] == -1).all()


def test_a_step_that_only_measures_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's dummy step has no metadata; a layer takes up what a sharded step would."""
    taken: list[str] = []
    monkeypatch.setattr(context, "reserve", lambda: taken.append("reserved"))
    layer = bare_layer(SHAPES[0], NanoCPFlashAttnMLABackend, FlashAttnMLAImpl)
    layer.forward_impl = lambda *_, **__: taken.append("stock")
    bare_family(SHAPES[0]).attach({"l": layer})
    layer.forward_impl(None, None, None, None, None, output=torch.zeros(1), q_dcp_replicated=None)
    assert taken == ["reserved", "stock"]


Results = tuple[torch.Tensor, torch.Tensor]


def other_base(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out, lse * 1.4426950408889634


def other_order(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out, lse.T.contiguous()


def narrow(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out, lse.to(out.dtype)


def other_outputs(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out * 1.1, lse


def refuses(out: torch.Tensor, lse: torch.Tensor) -> Results:
    raise RuntimeError("_vllm_fa3_C::fwd() expected at most 36 arguments\nDeclaration: fwd(Tensor q, Tensor k")


SIZES = LatentSizes(4, 128, 64, 512, 128)


def test_a_flash_attention_that_keeps_its_promises() -> None:
    flash_mla.self_check(SIZES, torch.bfloat16, CPU)
    flash_mla.self_check(SIZES, torch.float16, CPU)


@pytest.mark.parametrize("change", [other_base, other_order, narrow, other_outputs, refuses])
def test_another_flash_attention_is_refused_in_one_line(
    change: Callable[[torch.Tensor, torch.Tensor], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = fa_utils.flash_attn_varlen_func
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", lambda **args: change(*attend(**args)))
    with pytest.raises(NanoCPConfigError) as caught:
        flash_mla.self_check(SIZES, torch.bfloat16, CPU)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("nanocp: this FlashAttention does not return")
    assert '"max_degree": 1' in line and len(line) < 500


@pytest.mark.parametrize("what", ["no mask", "a key less"])
def test_several_queries_without_their_mask_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only rows of drafts rely on over pages: each sees what is before it."""
    attend = fa_utils.flash_attn_varlen_func

    def other(**args: Any) -> Any:
        if args.get("block_table") is not None and args["causal"]:
            if what == "no mask":
                args |= dict(causal=False, scheduler_metadata=None)
            else:
                args["seqused_k"] = args["seqused_k"] - (args["seqused_k"] > 8).int()
        return attend(**args)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", other)
    with pytest.raises(NanoCPConfigError, match="this FlashAttention does not return"):
        flash_mla.self_check(SIZES, torch.bfloat16, CPU)


def judge(layer: Any, shape: LatentShape = SHAPES[2]) -> None:
    check_layers({"l": layer}, bare_family(shape))


def test_layers_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an implementation as vLLM's own ``__init__`` builds it on a Hopper GPU."""
    shape = SHAPES[2]
    monkeypatch.setattr(flashattn_mla, "flash_attn_supports_mla", lambda: True)
    layer = bare_layer(shape, NanoCPFlashAttnMLABackend, FlashAttnMLAImpl)
    layer.prefill_backend = make_prefill(shape)
    sizes = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, qk_head_dim=192, v_head_dim=128)
    with set_current_vllm_config(VllmConfig()):
        layer.impl = FlashAttnMLAImpl(
            16, 576, 0.1, 1, None, None, "auto", None, "decoder", None, q_lora_rank=None, kv_b_proj=None, indexer=None,
            **sizes,
        )  # fmt: skip
    judge(layer)
    for name, value, said in (
        ("prefill_backend", None, "prompts attend by NoneType"),
        ("use_sparse", True, "sparse latent attention"),
        ("sliding_window", 128, "sliding-window attention"),
        ("num_heads", 8, "differ in size"),
        ("attn_backend", flashattn_mla.FlashAttnMLABackend, "the attention backend"),
        ("kv_cache_dtype", "fp8", "a KV cache of fp8"),
    ):
        was = getattr(layer, name)
        setattr(layer, name, value)
        with pytest.raises(NanoCPConfigError, match=said):
            judge(layer)
        setattr(layer, name, was)
    layer.prefill_backend.vllm_flash_attn_version = 4
    with pytest.raises(NanoCPConfigError, match="FlashAttention 4"):
        judge(layer)


def test_more_drafts_than_attend_in_the_latents_space_are_refused() -> None:
    """Before the kernels are tried: such rows would be projected, by the plan's lengths."""
    from types import SimpleNamespace

    from vllm_nanocp.attention.mla.flash_backend import LatentOnHopper
    from vllm_nanocp.errors import NanoCPConfigError

    class Tried(Exception):
        pass

    def self_check(*_: object) -> None:
        raise Tried

    family: Any = LatentOnHopper.__new__(LatentOnHopper)
    family.sizes, family.dtype = LatentSizes(128, 128, 64, 512, 128), torch.bfloat16
    family.kernel = SimpleNamespace(self_check=self_check, takes=lambda queries, sizes: sizes.absorbs(queries))
    for drafts, found in ((None, Tried), (3, Tried), (169, Tried), (170, NanoCPConfigError)):
        speculation = None if drafts is None else SimpleNamespace(num_speculative_tokens=drafts)
        family.config = SimpleNamespace(speculative_config=speculation)
        with pytest.raises(found):
            family.prepare(torch.device("cpu"))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_prompt_waits_for_no_compiler(compiled: bool) -> None:
    """With 128 heads vLLM lays out keys by a kernel of FlashInfer's, compiled at its first call; what that sees at
    start is what prompts have: parts of one projection, and one rotated key for all heads."""
    seen: list[tuple[Any, ...]] = []

    def concat(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = MLACommonImpl._concat_k_nope_k_pe(
            SimpleNamespace(_use_flashinfer_concat_mla_k=False), k_nope, k_pe
        )
        seen.append((made.shape, made.dtype, k_nope.stride(), k_pe.stride()))
        return made

    impl = SimpleNamespace(_use_flashinfer_concat_mla_k=compiled, _concat_k_nope_k_pe=concat)
    flash_mla.warm_up_prompts(impl, LatentSizes(128, 128, 64, 512, 128), torch.bfloat16, torch.device("cpu"))
    assert seen == [((1, 128, 192), torch.bfloat16, (128 * 256, 256, 1), (64, 64, 1))] * compiled
