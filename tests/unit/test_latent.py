# SPDX-License-Identifier: Apache-2.0
"""Latent attention over shards against float64: its partial results, and whole steps over three ranks."""

from __future__ import annotations

import functools
import random
import weakref
from typing import Any

import pytest
import torch

from tests.unit.attention_steps import full_attention, run_scenarios
from tests.unit.latent_steps import LatentShape, cpu_kernel, latent_shape
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.mla import cpu_latent
from vllm_nanocp.attention.mla.cpu_latent import Latents, attend_new, attend_shard

SHAPES = [latent_shape(4, 32, 32), latent_shape(2, 128, 128), latent_shape(3, 16, 96)]
BFLOAT16 = [latent_shape(4, 32, 32, dtype=torch.bfloat16)]
# Measured, of whole steps: 9e-6 and 1.3e-2 at most.
TOLERANCE = {torch.float32: 4e-5, torch.bfloat16: 4e-2}


def shape_id(shape: LatentShape) -> str:
    return f"{shape.num_heads}x{shape.head_size}x{shape.value_size}-{str(shape.dtype)[6:]}"


def close(actual: torch.Tensor, expected: torch.Tensor, shape: LatentShape) -> None:
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def held(shape: LatentShape, blocks: list[int], length: int) -> tuple[Latents, torch.Tensor]:
    """A cache of NaN but for random latents in some blocks; and these latents."""
    latents = torch.randn(length, shape.rank + shape.rotated, generator=torch.Generator().manual_seed(length))
    latents = latents.to(shape.dtype)
    cache = torch.full(shape.cache_size(40), float("nan"), dtype=shape.dtype)
    for i in range(length):
        cache[blocks[i // 16], i % 16] = latents[i]
    return Latents(cache, *shape.projections, shape.scale), latents


@pytest.mark.parametrize("at_once", [1, 0], ids=["a block at a time", "as usual"])
@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_attend_to_a_shard(shape: LatentShape, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed for few queries, projected for many: the same result, and the log-sum-exp of unscaled keys."""
    if at_once:
        monkeypatch.setattr(cpu_latent, "_FEW_BYTES", 1)
        monkeypatch.setattr(cpu_latent, "_PROJECTED", 1)
    seen = set()
    for rows, length in ((1, 1), (1, 300), (3, 16), (17, 33), (250, 100), (600, 5)):
        blocks = random.Random(length).sample(range(40), -(-length // 16) + 1)
        keys, latents = held(shape, blocks, length)
        queries = torch.randn(rows, shape.num_heads, shape.head_size, generator=torch.Generator().manual_seed(rows))
        queries = queries.to(shape.dtype)
        out, lse = attend_shard(queries, keys, torch.tensor(blocks), length)
        assert out.dtype == lse.dtype == torch.float32
        k, v = shape.projected(latents[:, None])
        close(out, full_attention(queries, k, v, length, shape.scale), shape)
        close(lse, (torch.einsum("qhd,khd->qhk", queries.double(), k) * shape.scale).logsumexp(-1), shape)
        seen.add(cpu_latent._absorbs(rows, keys))
    assert seen == {True, False}, "both ways"


@pytest.mark.parametrize(("rows", "over"), [(1, "_over_latents"), (250, "_over_projected")])
def test_a_shard_of_many_pieces_keeps_one_result(rows: int, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as large as the queries' whole result, and a long shard has hundreds."""
    monkeypatch.setattr(cpu_latent, "_FEW_BYTES", 1)
    monkeypatch.setattr(cpu_latent, "_PROJECTED", 1)
    attend, alive, most = getattr(cpu_latent, over), weakref.WeakSet[torch.Tensor](), []

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        part = attend(*args)
        alive.add(part[0])
        most.append(len(alive))
        return part

    monkeypatch.setattr(cpu_latent, over, watched)
    keys, _ = held(SHAPES[0], list(range(20)), 320)
    attend_shard(torch.randn(rows, 4, SHAPES[0].head_size), keys, torch.arange(20), 320)
    assert len(most) == 20 and max(most) <= 3, most


def test_many_absorbed_queries_take_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a shard that ends within a block."""
    over, lengths = cpu_latent._over_latents, []

    def watched(queries: torch.Tensor, latents: torch.Tensor, of: Latents) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(len(latents))
        return over(queries, latents, of)

    monkeypatch.setattr(cpu_latent, "_over_latents", watched)
    keys, _ = held(SHAPES[0], list(range(20)), 301)
    attend_shard(torch.randn(17, 4, SHAPES[0].head_size), keys, torch.arange(20), 301)
    assert lengths == [301]


@pytest.mark.parametrize("shape", [*SHAPES, *BFLOAT16], ids=shape_id)
def test_attend_to_new_tokens(shape: LatentShape) -> None:
    for rows in (2, 33, 70):
        keys, latents = held(shape, list(range(5)), rows)
        queries = torch.randn(rows, shape.num_heads, shape.head_size).to(shape.dtype)
        out, lse = attend_new(queries, latents, keys)
        k, v = shape.projected(latents[:, None])
        close(out, full_attention(queries, k, v, 0, shape.scale), shape)
        last = (torch.einsum("hd,khd->hk", queries[-1].double(), k) * shape.scale).logsumexp(-1)
        close(lse[-1], last, shape)


def test_whole_steps_over_three_ranks() -> None:
    """The layer as vLLM calls it: its own code for plain rows, the exchange for the others, all with one cache."""
    shapes = [*SHAPES, *BFLOAT16]
    groups = {
        shape_id(shape): [(shape, 100 * i + seed, seed % 5 != 4) for seed in range(12)]
        for i, shape in enumerate(shapes)
    }
    results = run_ranks(3, run_scenarios, groups, cpu_kernel)
    counts: dict[str, float] = {}
    for result in results:
        for shape in shapes:
            seen, errors = result[shape_id(shape)]
            for kind, n in seen.items():
                counts[kind] = counts.get(kind, 0) + n
            worst = max(error for _, error in errors)
            assert worst < TOLERANCE[shape.dtype], (shape_id(shape), errors)
    kinds = ("plain decode", "plain prefill", "sharded decode", "sharded prefill", "guests", "idle with guests")
    assert all(counts.get(kind, 0) > 5 for kind in kinds), counts
    assert counts["no local past"]


def test_error_next_to_vllm_s_in_16_bits() -> None:
    """Of all sharded rows, decodes and chunks, over any degree: root mean square of what differs from float64."""
    shape = latent_shape(16, 128, 128, dtype=torch.bfloat16)
    kernel = functools.partial(cpu_kernel, shape)
    results = run_ranks(3, run_scenarios, {"one": [(shape, 900 + seed, True) for seed in range(10)]}, kernel)
    ours, stock, norm = (
        sum(result["one"][0].get(name, 0.0) for result in results) for name in ("ours", "stock", "norm")
    )
    print("ours over stock's", (ours / stock) ** 0.5, "stock's", (stock / norm) ** 0.5)
    assert 0 < ours <= 1.2**2 * stock
