# SPDX-License-Identifier: Apache-2.0
"""Attention over shards against float64: the partial kernels, the merge, and whole steps over three ranks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from tests.unit.attention_steps import (
    Shape,
    Shard,
    empty_cache,
    full_attention,
    make_impl,
    make_layer,
    make_scenario,
    run_scenarios,
    slots,
)
from tests.unit.processes import run_ranks
from vllm_nanocp.attention import cpu_partial
from vllm_nanocp.attention.cpu_partial import attend, attend_causal, attend_shard, gather_shard
from vllm_nanocp.attention.gqa.cpu_backend import NanoCPCPUAttentionMetadataBuilder
from vllm_nanocp.attention.merge import merge_partials

NAN, INF = float("nan"), float("inf")

# (query heads, KV heads, head size, block size, kernel): groups of 1 to 16; "vec16" for odd sizes, as vLLM chooses.
SHAPES = [
    Shape(1, 1, 32),
    Shape(4, 4, 64),
    Shape(4, 2, 128),
    Shape(12, 3, 64),
    Shape(8, 1, 32),
    Shape(16, 1, 128),
    Shape(32, 2, 32, block_size=64),
    Shape(6, 2, 80, isa="vec16"),
    Shape(4, 2, 64, block_size=16, isa="vec16"),
]
BFLOAT16 = [Shape(8, 2, 64, dtype=torch.bfloat16), Shape(4, 4, 128, dtype=torch.bfloat16)]
# Measured: 1.0e-5 and 2.5e-2 at most (in bfloat16 the partial outputs are rounded to 2 ** -8 of their size).
TOLERANCE = {torch.float32: 4e-5, torch.bfloat16: 4e-2}


def shape_id(shape: Shape) -> str:
    return f"{shape.num_heads}x{shape.num_kv_heads}x{shape.head_size}-{shape.isa}-{str(shape.dtype)[6:]}"


def random_qkv(shape: Shape, num_queries: int, num_keys: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((num_queries, shape.num_heads), (num_keys, shape.num_kv_heads), (num_keys, shape.num_kv_heads))
    return [(1.6 * torch.randn(*s, shape.head_size, generator=generator)).to(shape.dtype) for s in sizes]


def reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key; float64 output and log-sum-exp."""
    k = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    lse = (torch.einsum("qhd,khd->qhk", queries.double(), k) * scale).logsumexp(-1)
    return full_attention(queries, keys, values, len(keys), scale), lse


def close(actual: torch.Tensor, expected: torch.Tensor, shape: Shape) -> None:
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# -- the parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_gather_reads_what_vllm_writes(shape: Shape) -> None:
    """Written by vLLM's operation, at blocks in any order; the rest of the cache, of the last block too, is NaN."""
    dice = random.Random(shape.head_size)
    for length in (1, shape.block_size - 1, shape.block_size, shape.block_size + 1, 5 * shape.block_size - 3):
        _, keys, values = random_qkv(shape, 1, length, seed=length)
        blocks = dice.sample(range(12), -(-length // shape.block_size))
        cache = empty_cache(shape, 12)
        mapping = slots(shape, Shard(0, 0, tuple(blocks)), 0, length)
        make_impl(shape).do_kv_cache_update(make_layer(shape), keys, values, cache, mapping)
        # A table may be longer than the shard: blocks of tokens to come.
        spare = [b for b in range(12) if b not in blocks][:2]
        for table in (blocks, blocks + spare):
            got_keys, got_values = gather_shard(cache, torch.tensor(table), length)
            assert torch.equal(got_keys, keys.transpose(0, 1))
            assert torch.equal(got_values, values.transpose(0, 1))
        shorter = max(1, length - 2)  # a guest may see less than is there
        assert torch.equal(gather_shard(cache, torch.tensor(blocks), shorter)[0], keys[:shorter].transpose(0, 1))


@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_attend(shape: Shape) -> None:
    for num_queries, num_keys in ((1, 1), (1, 300), (7, 1), (5, 33), (40, 129)):
        queries, keys, values = random_qkv(shape, num_queries, num_keys, seed=num_keys)
        out, lse = attend(queries, keys.transpose(0, 1), values.transpose(0, 1), shape.scale)
        assert out.dtype == lse.dtype == torch.float32
        expected_out, expected_lse = reference(queries, keys, values, shape.scale)
        close(out, expected_out, shape)
        close(lse, expected_lse, shape)


@pytest.mark.parametrize("piece", [1, cpu_partial._PIECE])
@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_attend_to_a_shard(shape: Shape, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads memory as it lies: a shard of one block, which needs no copy to be one piece, too."""
    monkeypatch.setattr(cpu_partial, "_PIECE", piece)  # 1: a piece is a block
    for length in (1, shape.block_size - 1, shape.block_size, 2 * shape.block_size, 3 * shape.block_size - 1):
        queries, keys, values = random_qkv(shape, 4, length, seed=length)
        blocks = (5, 2, 7)[: -(-length // shape.block_size)]
        cache = empty_cache(shape, 8)
        mapping = slots(shape, Shard(0, 0, blocks), 0, length)
        make_impl(shape).do_kv_cache_update(make_layer(shape), keys, values, cache, mapping)
        out, lse = attend_shard(queries, cache, torch.tensor(blocks), length, shape.scale)
        expected_out, expected_lse = reference(queries, keys, values, shape.scale)
        close(out, expected_out, shape)
        close(lse, expected_lse, shape)


@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_attend_causal(shape: Shape) -> None:
    for rows in (1, 2, 33, 70):
        queries, keys, values = random_qkv(shape, rows, rows, seed=rows)
        out, lse = attend_causal(queries, keys, values, shape.scale)
        assert out.dtype == lse.dtype == torch.float32
        close(out, full_attention(queries, keys, values, 0, shape.scale), shape)
        for i in range(0, rows, 5):
            close(lse[i], reference(queries[i : i + 1], keys[: i + 1], values[: i + 1], shape.scale)[1][0], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_merge_of_uneven_shards_is_attention_over_all(shape: Shape, poison: float) -> None:
    """Any cut of the keys, empty shards among them: what a kernel writes as the output of no keys must not count."""
    dice = random.Random(shape.num_heads)
    for num_keys in (1, 2, 90):
        queries, keys, values = random_qkv(shape, 3, num_keys, seed=num_keys)
        cuts = sorted(dice.choices(range(num_keys + 1), k=4))
        outputs, lses = [], []
        for first, end in zip([0, *cuts], [*cuts, num_keys], strict=True):
            if first == end:
                out, lse = torch.full(queries.shape, poison), torch.full(queries.shape[:2], -INF)
            else:
                part = slice(first, end)
                out, lse = attend(queries, keys[part].transpose(0, 1), values[part].transpose(0, 1), shape.scale)
            outputs.append(out)
            lses.append(lse)
        merged = merge_partials(torch.stack(outputs), torch.stack(lses))
        assert merged.dtype == torch.float32
        close(merged, reference(queries, keys, values, shape.scale)[0], shape)


def test_merge_counts_empty_partials_row_by_row() -> None:
    """A partial may be empty for one row and head, and not for another."""
    outputs = torch.tensor([[[[1.0], [NAN]]], [[[NAN], [5.0]]], [[[3.0], [INF]]]])  # 3 partials, 1 row, 2 heads
    lses = torch.tensor([[[0.5, -INF]], [[-INF, 2.0]], [[0.5, -INF]]])
    assert merge_partials(outputs, lses).tolist() == [[[2.0], [5.0]]]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_merge_is_stable_at_any_magnitude(shift: float) -> None:
    outputs = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    lses = (weights.log() + shift).float().view(3, 1, 1)
    expected = (lses.double().softmax(0).flatten() * outputs.double().flatten()).sum()
    assert merge_partials(outputs, lses).item() == pytest.approx(expected.item(), rel=1e-6)


def test_merge_when_one_partial_outweighs_all() -> None:
    outputs = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert merge_partials(outputs, torch.tensor([0.0, 500.0]).view(2, 1, 1)).item() == 2.0


@pytest.mark.parametrize(("chosen", "used"), [("vec", "vec"), ("vec16", "vec16"), ("amx", "vec"), ("neon", "vec")])
def test_kernels_with_packed_caches_are_not_used(monkeypatch: pytest.MonkeyPatch, chosen: str, used: str) -> None:
    """Writer (the layers) and reader (the metadata) agree on a layout that ``gather_shard`` can read."""
    layers: list[str] = []

    def stock(self: Any) -> None:
        self.isa, self.layer_names, self.kv_cache_dtype = chosen, ["layer"], "auto"
        self._set_isa_to_layers(self.layer_names)

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "__init__", stock)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "_set_isa_to_layers", lambda self, names: layers.append(self.isa))
    builder = NanoCPCPUAttentionMetadataBuilder()
    assert builder.isa == layers[-1] == used


# -- whole steps -----------------------------------------------------------------------------------------------

RANKS = 3
GROUPS = {
    "float32": [(SHAPES[seed % len(SHAPES)], seed, True) for seed in range(45)],
    "bfloat16": [(BFLOAT16[seed % 2], seed, True) for seed in range(100, 112)],
    "plain": [(SHAPES[seed % len(SHAPES)], seed, False) for seed in range(200, 209)],
}
Results = list[dict[str, tuple[dict[str, int], list[tuple[int, float]]]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """All scenarios, run once by three processes."""
    return run_ranks(RANKS, run_scenarios, GROUPS, seconds=200)


@pytest.mark.parametrize("group", GROUPS)
def test_steps_over_three_ranks_are_full_attention(results: Results, group: str) -> None:
    """Plain and sharded rows, decodes and prefill chunks, consecutive chunks in one step, guests of idle ranks."""
    tolerance = TOLERANCE[GROUPS[group][0][0].dtype]
    for rank, result in enumerate(results):
        wrong = [(seed, error) for seed, error in result[group][1] if not error < tolerance]
        assert not wrong, f"rank {rank}: (seed, error) {wrong}"


def test_the_steps_are_worth_running(results: Results) -> None:
    """Every kind of row occurred at every rank, and a rank without rows served guests."""
    for result in results:
        counts = result["float32"][0]
        for kind in ("plain decode", "plain prefill", "sharded decode", "sharded prefill", "guests"):
            assert counts.get(kind, 0) >= 5, f"{kind}: {counts}"
        assert counts.get("no local past", 0) >= 5
        assert set(result["plain"][0]) <= {"plain decode", "plain prefill"}
    assert sum(result["float32"][0].get("idle with guests", 0) for result in results) >= 5


def test_scenarios_are_sound() -> None:
    """What the simulation rests on: each rank would make the same scenario, blocks are used once, degrees vary."""
    degrees = set()
    for shape, seed, sharded in GROUPS["float32"]:
        scenario = make_scenario(shape, seed, RANKS, sharded)
        assert scenario == make_scenario(shape, seed, RANKS, sharded)
        for rank in range(RANKS):
            used = [block for shards in scenario.shards for s in shards if s.rank == rank for block in s.blocks]
            assert len(set(used)) == len(used) and 0 not in used
        degrees |= {len({s.rank for s in shards}) for shards in scenario.shards}
    assert degrees == {1, 2, 3}
