# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper GPUs. On one GPU: the vendor's kernels keep their promises; whole attention steps against
float64, and against the error that stock attention itself makes on the same input, with tables of a step's size, with
fixed ones, and replayed from a graph; memory. On two: the same over NCCL, and engines next to stock vLLM."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine
from tests.unit.latent_steps import latent_shape
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.mla.latent_sizes import LatentSizes

from . import FOUR_GPUS, GPUS, ONE_GPU, SHARED, TWO_GPUS
from .beside_stock import all_partings, answers, check_partings, common, requests, with_graphs
from .modes import check_error, on_ranks

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    ONE_GPU,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]

BF16 = torch.bfloat16
SHAPES = {
    "16": latent_shape(16, 128, 128, dtype=BF16),
    "64": latent_shape(64, 128, 128, dtype=BF16),
    "128": latent_shape(128, 128, 128, dtype=BF16),
    "8, float16": latent_shape(8, 128, 128, dtype=torch.float16),
}
# Arguments of ``kernel_of``. Rows of more than ``few`` queries are projected.
MODES: dict[str, dict[str, Any]] = {
    "projected": dict(),
    "absorbed": dict(few=1000),
    "groups": dict(groups=2),
    "fixed": dict(capacity=8),
    "graph": dict(capacity=8, graph=True),
}
# Over the routed exchange: eager, and from graphs. Ranks that share a GPU take turns, so each wait may take some ms.
ROUTED: dict[str, dict[str, Any]] = {
    "routed": dict(capacity=8, routed=True),
    "routed graph": dict(capacity=8, routed=True, graph=True),
}
# Requests that are decoded with three drafts: rows of four queries, in most steps fewer keys than the plan has.
DRAFTED: dict[str, dict[str, Any]] = {
    "drafts": dict(queries=4),
    "drafts, fixed": dict(queries=4, capacity=8),
    "drafts, graph": dict(queries=4, capacity=8, graph=True),
}
ROUTED_DRAFTS: dict[str, dict[str, Any]] = {
    "drafts, routed": dict(queries=4, capacity=8, routed=True),
    "drafts, routed graph": dict(queries=4, capacity=8, routed=True, graph=True),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("heads", [2, 16, 64, 128])
def test_the_kernels_keep_their_promises(heads: int, dtype: torch.dtype) -> None:
    from vllm_nanocp.attention.mla import flash_mla

    flash_mla.self_check(LatentSizes(heads, 128, 64, 512, 128), dtype, torch.device("cuda"))


@pytest.mark.parametrize("places", [4, 1280, 4096])
def test_a_launch_over_places(places: int, device: str = "cuda") -> None:
    """As graphs have it: most places are unused, or all are, as while a graph is captured; more rows than the 992 that
    FlashAttention schedules in one block, and none cut into pieces where they are many; the schedule is made anew in
    the same memory, and serves several layers."""
    from vllm_nanocp.attention.flash_launches import ShardLaunch
    from vllm_nanocp.attention.mla import flash_mla
    from vllm_nanocp.attention.mla.latent_fixed import pieces_of

    sizes, random = LatentSizes(128, 128, 64, 512, 128), torch.Generator(device).manual_seed(places)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=BF16, device=device, generator=random)

    cache, absorbed, rotated = normal(64, 16, 576), normal(places, 128, 512), normal(places, 128, 64)
    blocks = torch.randperm(64, device=device, generator=random)[:40]
    launch = ShardLaunch(
        num_queries=places,
        query_starts=torch.arange(places + 1, dtype=torch.int32, device=device),
        lengths=torch.zeros(places, dtype=torch.int32, device=device),
        block_table=blocks.to(torch.int32).repeat(places, 1),
        max_queries=1,
        max_length=640,
        causal=False,
        max_pieces=pieces_of(places, sizes),
    )
    held, scale = cache[blocks].flatten(0, 1).double(), 512**-0.5
    steps: list[dict[int, int]] = [{}, {0: 640, places // 2: 37, places - 1: 1}, {1: 500}, {}]
    for used in steps:
        launch.lengths.zero_()
        for place, length in used.items():
            launch.lengths[place] = length
        flash_mla.make_schedule(launch, sizes, 16, BF16)
        for _ in range(3):
            out, lse = flash_mla.attend_latents(absorbed, rotated, cache, launch, scale)
            for place, length in used.items():
                keys = held[:length]
                scores = torch.cat([absorbed[place], rotated[place]], dim=-1).double() @ keys.T * scale
                torch.testing.assert_close(lse[place], scores.logsumexp(-1).float(), rtol=1e-3, atol=1e-3)
                expected = (scores.softmax(-1) @ keys[:, :512]).float()
                torch.testing.assert_close(out[place].float(), expected, rtol=2e-2, atol=1e-2)


def all_groups() -> dict[str, list[Any]]:
    # Float64 on the host takes its time with many heads.
    counts = {"16": 12, "64": 4, "128": 4, "8, float16": 6}
    return {name: [(SHAPES[name], seed, seed % 9 != 8) for seed in range(500, 500 + n)] for name, n in counts.items()}


@functools.cache
def steps(ranks: int, staged: bool, drafted: bool = False) -> list[dict[str, Any]] | str:
    """All modes in one start of the ranks, without drafts or with."""
    from .latent_steps import run_modes

    groups, chosen = all_groups(), DRAFTED if drafted else MODES
    modes = {mode: (args, groups) for mode, args in chosen.items() if not (staged and "graph" in args)}
    return on_ranks(ranks, run_modes, modes, staged, 280)


@functools.cache
def routed_steps(ranks: int, staged: bool) -> list[dict[str, Any]] | str:
    """The same over the routed exchange, which runs from graphs also where ranks share a GPU."""
    from .latent_steps import run_modes

    return on_ranks(
        ranks, run_modes, {mode: (args, all_groups()) for mode, args in (ROUTED | ROUTED_DRAFTS).items()}, staged, 280
    )


@pytest.mark.parametrize("mode", [mode for mode, args in MODES.items() if "graph" not in args])
def test_error_of_three_ranks_on_one_gpu(mode: str) -> None:
    check_error(steps(3, True), mode, SHAPES, ranks=3, gpus=1)


@pytest.mark.parametrize("mode", MODES)
def test_error_of_a_rank_that_visits_itself(mode: str) -> None:
    """Over NCCL on one GPU, so also from graphs."""
    check_error(steps(1, False), mode, SHAPES, ranks=1, gpus=1)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=TWO_GPUS), pytest.param(4, marks=FOUR_GPUS)])
@pytest.mark.parametrize("mode", MODES)
def test_error_over_nccl(mode: str, ranks: int) -> None:
    check_error(steps(ranks, False), mode, SHAPES, ranks=ranks, gpus=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", [*ROUTED, *ROUTED_DRAFTS])
def test_error_over_the_routed_exchange_on_one_gpu(mode: str, ranks: int) -> None:
    """One rank visits itself; two share the GPU, over gloo but for what the routed exchange carries."""
    check_error(routed_steps(ranks, True), mode, SHAPES, ranks=ranks, gpus=1)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", [*ROUTED, *ROUTED_DRAFTS])
def test_error_over_the_routed_exchange(mode: str) -> None:
    check_error(routed_steps(2, False), mode, SHAPES, ranks=2, gpus=2)


def routes_on_a_gpu(rank: int, size: int, steps: int) -> int:
    from tests.unit.row_route_steps import stress

    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    return stress(rank, size, steps, "cuda", None, 0.002)


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_routes(ranks: int) -> None:
    """Step after step over the same memory, of two capacities; a rank that is late in some. Ranks share a GPU where
    there is one, and are slow then."""
    number = int(os.environ.get("NANOCP_ROUTE_STEPS", "1000" if ranks <= GPUS else "60"))
    assert sum(run_ranks(ranks, routes_on_a_gpu, number, seconds=240)) > number


@pytest.mark.parametrize("mode", [mode for mode, args in DRAFTED.items() if "graph" not in args])
def test_error_with_drafts_of_three_ranks_on_one_gpu(mode: str) -> None:
    check_error(steps(3, True, True), mode, SHAPES, ranks=3, gpus=1)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=TWO_GPUS)])
@pytest.mark.parametrize("mode", DRAFTED)
def test_error_with_drafts(mode: str, ranks: int) -> None:
    """Over NCCL: of a rank that visits itself, and of two."""
    check_error(steps(ranks, False, True), mode, SHAPES, ranks=ranks, gpus=ranks)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=TWO_GPUS)])
@pytest.mark.parametrize("heads", ["16", "128"])
def test_memory(heads: str, ranks: int) -> None:
    """What the fullest step takes is within what was reserved, and a good part of it: more heads in a step with fewer
    rows may take more."""
    from .latent_steps import fullest_step

    for peak, reserved in run_ranks(ranks, fullest_step, SHAPES[heads], 8192, seconds=100, backend="nccl"):
        print(f"{ranks} ranks, {heads} heads: {peak / 2**20:.0f} MiB of {reserved / 2**20:.0f}")
        assert 0.4 * reserved < peak <= reserved


# -- Engines --------------------------------------------------------------------------------------------------------

# Names as in ``test_exact.py``, so that one variable chooses in both.
ENGINES = ("v2", "v1", "graphs", "collective", "moves", "fp8", "tensor parallel")
GRAPHS = ("graphs", "collective", "moves", "fp8", "tensor parallel")
chosen = [mode for mode in ENGINES if mode in os.environ.get("NANOCP_RUNNERS", ",".join(ENGINES)).split(",")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=FOUR_GPUS if mode == "tensor parallel" else TWO_GPUS) for mode in chosen],
)
def engines(request: pytest.FixtureRequest, deepseek: str) -> Iterator[tuple[str, Engine, Engine]]:
    """Stock and nanocp, run the same way: compiled code rounds otherwise than eager code."""
    mode = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if mode == "v1" else "1")
        graphs = mode in GRAPHS
        args = common() | dict(attention_config={"backend": "FLASH_ATTN_MLA"}, enforce_eager=not graphs)
        if graphs:
            args |= with_graphs(tensor_parallel=mode == "tensor parallel")
        if mode == "tensor parallel":
            args |= dict(tensor_parallel_size=2, disable_custom_all_reduce=SHARED)
        if mode == "fp8":  # which vLLM serves by FLASHMLA, and in blocks of 64 tokens
            del args["attention_config"]
            args |= dict(kv_cache_dtype="fp8", block_size=None, num_gpu_blocks_override=2048)
        stock = Engine(deepseek, 1, **args)
        if graphs:  # vLLM's own check of its workers' steps
            patch.setenv("VLLM_GPU_SYNC_CHECK", "error")
        config: dict[str, Any] = {"segment_size": 600, "exchange": "collective" if mode == "collective" else "auto"}
        if mode == "moves":
            config |= {"moves": {"batch_margin": 0.0, "kv_margin": 0.0, "min_steps_between": 0, "spare_blocks": 0}}
        nanocp = Engine(deepseek, 2, config, **args)
    yield mode, stock, nanocp
    stock.close()
    nanocp.close()


def test_tokens(engines: tuple[str, Engine, Engine]) -> None:
    """As ``test_exact.py`` has it: bfloat16 runs part where candidates are close, also stock's own two."""
    mode, stock, nanocp = engines
    asks = requests()
    theirs = answers(stock, asks)
    before = nanocp.status()
    ours = answers(nanocp, asks)
    after = nanocp.status()
    assert after["sharded_steps"] > before["sharded_steps"]
    assert mode != "moves" or after["moves"] > before["moves"]
    found = all_partings(mode, theirs, ours)
    nanocp.check_nothing_left()
    counters = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters"))
    print(f"{mode}: {counters}")
    for worker in counters:
        captured = worker["captured_steps"] > worker["sharded_steps"] / 4
        assert captured == (mode in GRAPHS)
        assert (worker["routed_steps"] > worker["sharded_steps"] / 4) == (mode not in ("collective", "fp8"))
    check_partings(found)
