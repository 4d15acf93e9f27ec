# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper GPUs with an fp8 cache, on one GPU: FlashMLA keeps its promises; whole attention steps
against float64, and against the error that stock attention itself makes with the same cache, also from graphs; memory.
``test_latent.py`` has the engines."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
import torch

from tests.unit.fp8_latent_steps import Q_SCALE, fp8_shape, make_layer
from tests.unit.latent_steps import write
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.flash_launches import ShardLaunch
from vllm_nanocp.attention.mla.fp8_latents import FLASH_MLA
from vllm_nanocp.attention.mla.latent_kernel import Float8Scales, Latents, Piece
from vllm_nanocp.attention.mla.latent_sizes import LatentSizes

from . import ONE_GPU, TWO_GPUS
from .modes import OF_STOCK, of_mode, on_ranks
from .test_latent import HOPPER

pytestmark = [
    pytest.mark.gpu,
    ONE_GPU,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]

FLOAT8 = torch.float8_e4m3fn
SHAPES = {"16": fp8_shape(16, 128, 128), "64": fp8_shape(64, 128, 128), "128": fp8_shape(128, 128, 128)}
SCENARIOS = {"16": 10, "64": 3, "128": 3}
# Arguments of ``kernel_of``. Rows of more than ``few`` queries are projected.
MODES: dict[str, dict[str, Any]] = {
    "projected": dict(),
    "absorbed": dict(few=1000),
    "groups": dict(groups=2),
    "fixed": dict(capacity=8),
    "graph": dict(capacity=8, graph=True),
}
# Of the whole: queries and weights of a decode have 8 bits.
RELATIVE = {"decode": 8e-2, "prefill": 1e-2}


@pytest.mark.parametrize("heads", [2, 16, 64, 128])
def test_the_kernels_keep_their_promises(heads: int) -> None:
    FLASH_MLA.self_check(LatentSizes(heads, 128, 64, 512, 128), torch.bfloat16, torch.device("cuda"))


def test_what_the_cache_keeps() -> None:
    """vLLM's own operation writes; what is read for prompts is that: the nearest number of 8 bits, by one scale."""
    shape, device = SHAPES["16"], torch.device("cuda")
    layer, scale = make_layer(shape, device), shape.cache_scales[0]
    keys = 3 * torch.randn(100, 1, 576, generator=torch.Generator().manual_seed(1)).to(shape.dtype)
    keys[0, 0, :2] = torch.tensor([1000.0, -1000.0])  # does not fit
    cache = torch.full(shape.cache_size(5), 0x7F, dtype=torch.uint8, device=device)
    slots = torch.cat([torch.arange(64) + 3 * 64, torch.arange(36) + 64])
    write(None, layer, keys.to(device), keys.to(device), cache, slots.to(device))
    sizes = LatentSizes(16, 128, 64, 512, 128)
    held = Latents(cache, layer.W_UK_T, layer.W_UV, 1.0, sizes, FLASH_MLA, FLASH_MLA.scales(layer))
    blocks = torch.tensor([3, 1], dtype=torch.int32, device=device)
    found = held.read(Piece(blocks, 0, 100, torch.tensor([0, 100], dtype=torch.int32, device=device), False))
    expected = (keys[:, 0].float() / scale).clamp(-448, 448).to(FLOAT8).float() * scale
    torch.testing.assert_close(found.cpu().float(), expected.to(shape.dtype).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("places", [4, 1280, 2048])
def test_a_launch_over_places(places: int, device: str = "cuda") -> None:
    """As graphs have it: most places are unused and see one key of a block that may be NaN, or all do, as while a graph
    is captured; the plan is made anew in the same memory, and serves several layers; the launch is replayed."""
    sizes, random = LatentSizes(128, 128, 64, 512, 128), torch.Generator(device).manual_seed(places)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, generator=random)

    scales = Float8Scales(torch.tensor([Q_SCALE], device=device), torch.tensor([0.05], device=device), 0.05)
    numbers = (normal(42, 64, 576) / 0.05).to(FLOAT8)
    cache = numbers.view(torch.uint8)
    cache[0] = 0x7F
    absorbed, rotated = normal(places, 128, 512).bfloat16(), normal(places, 128, 64).bfloat16()
    blocks = torch.randperm(41, device=device, generator=random)[:40] + 1
    launch = ShardLaunch(
        num_queries=places,
        query_starts=torch.arange(places + 1, dtype=torch.int32, device=device),
        lengths=torch.ones(places, dtype=torch.int32, device=device),
        block_table=torch.zeros((places, 40), dtype=torch.int32, device=device),
        max_queries=1,
        max_length=2560,
        causal=False,
        max_pieces=1,
    )
    none = absorbed.new_empty(0)
    held = Latents(cache, none, none, 512**-0.5, sizes, FLASH_MLA, scales)
    known = numbers[blocks].flatten(0, 1).double() * 0.05
    graph: Any = None
    steps: list[dict[int, int]] = [{}, {0: 2560, places // 2: 37, places - 1: 1}, {1: 500, 2: 64}, {}]
    for used in steps:
        launch.lengths.fill_(1)
        launch.block_table.zero_()
        for place, length in used.items():
            launch.lengths[place], launch.block_table[place] = length, blocks.to(torch.int32)
        FLASH_MLA.schedule(launch, sizes, 64, torch.bfloat16)
        if graph is None:
            FLASH_MLA.attend(absorbed, rotated, held, launch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = FLASH_MLA.attend(absorbed, rotated, held, launch)
        graph.replay()
        for out, lse in (FLASH_MLA.attend(absorbed, rotated, held, launch), replayed):
            for place, length in used.items():
                keys = known[:length]
                query = torch.cat([absorbed[place], rotated[place]], dim=-1).float() / Q_SCALE
                scores = query.to(FLOAT8).double() * Q_SCALE @ keys.T * held.scale
                torch.testing.assert_close(lse[place], scores.logsumexp(-1).float(), rtol=1e-2, atol=3e-2)
                expected = scores.softmax(-1) @ keys[:, :512]
                assert (out[place].double() - expected).norm() < 0.08 * expected.norm()


@functools.cache
def steps(ranks: int, staged: bool) -> list[dict[str, Any]] | str:
    """All modes in one start of the ranks."""
    from .latent_steps import run_modes

    groups = {name: [(SHAPES[name], seed, True) for seed in range(300, 300 + n)] for name, n in SCENARIOS.items()}
    modes = {mode: (args | {"fp8": True}, groups) for mode, args in MODES.items() if not (staged and "graph" in args)}
    return on_ranks(ranks, run_modes, modes, staged, 280)


def check_error(results: list[dict[str, Any]] | str, mode: str, **case: Any) -> None:
    ranks, wrong = of_mode(results, mode), []
    for name in SHAPES:
        assert all(error < math.inf for rank in ranks for _, error in rank[name][1]), (mode, name)
        counts = [rank[name][0] for rank in ranks]
        for kind, bound in RELATIVE.items():
            norm, ours, stock = (sum(c.get(f"{of} {kind}", 0.0) for c in counts) for of in ("norm", "ours", "stock"))
            if not norm:
                continue
            ours, stock = math.sqrt(ours / norm), math.sqrt(stock / norm)
            found = {"mode": mode, **case, "heads": name, "rows": kind, "relative_error": ours, "ratio": ours / stock}
            print(json.dumps(found))
            if not (ours < bound and ours <= OF_STOCK * stock):
                wrong.append(found)
        assert sum(c.get("sharded decode", 0) for c in counts) >= 2
    assert not wrong


@pytest.mark.parametrize("mode", [mode for mode, args in MODES.items() if "graph" not in args])
def test_error_of_two_ranks_on_one_gpu(mode: str) -> None:
    check_error(steps(2, True), mode, ranks=2, gpus=1)


@pytest.mark.parametrize("mode", MODES)
def test_error_of_a_rank_that_visits_itself(mode: str) -> None:
    """Over NCCL on one GPU, so also from graphs."""
    check_error(steps(1, False), mode, ranks=1, gpus=1)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=TWO_GPUS)])
@pytest.mark.parametrize("mode", MODES)
def test_error_over_nccl(mode: str, ranks: int) -> None:
    check_error(steps(ranks, False), mode, ranks=ranks, gpus=ranks)


@pytest.mark.parametrize("heads", ["16", "128"])
def test_memory(heads: str) -> None:
    """What the fullest step takes is within what was reserved, and a good part of it."""
    from .latent_steps import fullest_step

    for peak, reserved in run_ranks(1, fullest_step, SHAPES[heads], 8192, seconds=100, backend="nccl"):
        print(f"{heads} heads: {peak / 2**20:.0f} MiB of {reserved / 2**20:.0f}")
        assert 0.4 * reserved < peak <= reserved
