# SPDX-License-Identifier: Apache-2.0
"""``--kv-cache-dtype`` on CPU: shards are read as vLLM's kernel keeps them, steps are attention over what is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.unit.attention_steps import (
    CPU_KERNEL,
    Kernel,
    Shape,
    Shard,
    empty_cache,
    full_attention,
    kept,
    make_impl,
    make_layer,
    run_scenarios,
    slots,
)
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.cache_dtypes import CACHE_DTYPES
from vllm_nanocp.attention.cpu_partial import as_stored, gather_shard

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    Shape(*heads, dtype=dtype, cache_dtype=name)
    for (dtype, name), heads in zip(
        itertools.product(MODEL_DTYPES, CACHE_DTYPES[False, False]),
        itertools.cycle([(4, 2, 64), (6, 3, 32), (8, 1, 128)]),
    )
]
# Measured: 6e-6, 2.5e-2 and 3.6e-3 at most. Of a float32 model with a 16-bit cache, rows that visit nobody are computed
# in 16 bits.
TOLERANCE = {torch.float32: 4e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def shape_id(shape: Shape) -> str:
    return f"{str(shape.dtype)[6:]}-{shape.cache_dtype}"


def patched_kernel() -> Kernel:
    from vllm_nanocp.patches import cpu_cache_dtype

    cpu_cache_dtype.apply()
    return CPU_KERNEL


def _write_and_read(rank: int, size: int) -> dict[str, bool]:
    """Whether what is gathered is what a cache keeps: in a process of its own, for vLLM is patched there."""
    patched_kernel()
    found: dict[str, bool] = {}
    for shape in SHAPES:
        same = []
        for length in (1, 31, 32, 33, 157):
            generator = torch.Generator().manual_seed(length)
            wanted = (length, shape.num_kv_heads, shape.head_size)
            keys, values = ((1.6 * torch.randn(*wanted, generator=generator)).to(shape.dtype) for _ in "kv")
            blocks = (7, 2, 5, 1, 4)[: -(-length // shape.block_size)]
            cache = empty_cache(shape, 8)
            mapping = slots(shape, Shard(0, 0, blocks), 0, length)
            make_impl(shape).do_kv_cache_update(make_layer(shape), keys, values, cache, mapping)
            stored = as_stored(cache, shape.cache_dtype, shape.dtype)
            got = gather_shard(stored, torch.tensor(blocks), length, shape.dtype)
            for part, whole, scale in zip(got, (keys, values), shape.cache_scales, strict=True):
                expected = kept(shape, whole, scale).transpose(0, 1).double()
                same.append(torch.allclose(part.double() * scale, expected, rtol=1e-6, atol=0))
                same.append(part.stride(-1) == 1 and part.dtype == shape.dtype)
        found[shape_id(shape)] = all(same)
    return found


@pytest.fixture(scope="module")
def read() -> dict[str, bool]:
    found: dict[str, bool] = run_ranks(1, _write_and_read)[0]
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shards_are_read_as_vllm_keeps_them(shape: Shape, read: dict[str, bool]) -> None:
    assert read[shape_id(shape)]


GROUPS = {shape_id(shape): [(shape, 300 + 4 * i + n, True) for n in range(4)] for i, shape in enumerate(SHAPES)}


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[dict[str, int], list[tuple[int, float]]]]]:
    return run_ranks(3, run_scenarios, GROUPS, patched_kernel, seconds=200)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_steps_over_three_ranks(
    shape: Shape, results: list[dict[str, tuple[dict[str, int], list[tuple[int, float]]]]]
) -> None:
    """Plain and sharded rows, decodes and prefill chunks, are float64 attention over what the cache keeps."""
    narrower = shape.cache_type.is_floating_point and shape.cache_type.itemsize < shape.dtype.itemsize
    tolerance = TOLERANCE[shape.cache_type if narrower else shape.dtype]
    for rank, result in enumerate(results):
        wrong = [(seed, error) for seed, error in result[shape_id(shape)][1] if not error < tolerance]
        assert not wrong, f"rank {rank}: (seed, error) {wrong}"


def test_the_caches_differ_by_more_than_the_tolerance() -> None:
    """What the steps above are compared with is not attention over the numbers before they were kept."""
    for shape in SHAPES:
        if not shape.cache_dtype.startswith("fp8"):
            continue
        generator = torch.Generator().manual_seed(0)
        q, k, v = (1.6 * torch.randn(100, 2, shape.head_size, generator=generator) for _ in "qkv")
        rounded = [kept(shape, x, s) for x, s in zip((k, v), shape.cache_scales, strict=True)]
        difference = full_attention(q, k, v, 0, 0.1) - full_attention(q, *rounded, 0, 0.1)
        assert difference.abs().max() > 3 * TOLERANCE[shape.dtype]
