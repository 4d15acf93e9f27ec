# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend on GPUs. On one GPU: what the library returns; whole attention steps against float64, and
against the error that stock attention itself makes on the same input, with tables of a step's size, with fixed ones,
and replayed from a graph. On two: the same over NCCL and over the routed exchange, and engines next to stock vLLM.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine
from tests.tiny_models import make_qwen3_moe
from tests.unit.flashinfer_steps import FlashInferShape, ReferenceDecode, ReferencePrefill, missing_parameters

from . import FOUR_GPUS, ONE_GPU, TWO_GPUS
from .beside_stock import STEP, answers, partings, requests, with_graphs
from .modes import OF_STOCK, check_error, on_ranks

pytestmark = [pytest.mark.gpu, ONE_GPU]

BF16 = torch.bfloat16
SHAPES = {
    "8x4x128": FlashInferShape(8, 4, 128, BF16, 16),
    "32x4x128": FlashInferShape(32, 4, 128, BF16, 16),
    "8x2x256": FlashInferShape(8, 2, 256, BF16, 16),
    "6x2x64 float16": FlashInferShape(6, 2, 64, torch.float16, 32),
}
# Each head size and type has FlashInfer compile kernels of its own, for minutes.
SHAPES = {name: shape for name, shape in SHAPES.items() if name in os.environ.get("NANOCP_SHAPES", ",".join(SHAPES))}
# Arguments of ``flashinfer_kernel``.
MODES: dict[str, dict[str, Any]] = {
    "exact": dict(),
    "fixed": dict(capacity=8),
    "graph": dict(capacity=8, graphs=True),
    "xqa": dict(capacity=8, xqa=True),
    "xqa graph": dict(capacity=8, xqa=True, graphs=True),
}
ROUTED: dict[str, dict[str, Any]] = {
    "routed": dict(capacity=8, routed=True),
    "routed graph": dict(capacity=8, routed=True, graphs=True),
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def random(*size: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(size, device="cuda", generator=generator).to(dtype)


# -- What the library returns -----------------------------------------------------------------------------------------


def test_calls_fit_the_library() -> None:
    """The references on CPU have its parameters."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    for real, reference in (
        (BatchPrefillWithPagedKVCacheWrapper, ReferencePrefill),
        (BatchDecodeWithPagedKVCacheWrapper, ReferenceDecode),
    ):
        names = ("plan", "run") if reference is ReferencePrefill else ("run",)
        for name in names:
            assert not missing_parameters(getattr(real, name), getattr(reference, name)), (real, name)


@pytest.mark.parametrize("kind", [BF16, torch.float16])
@pytest.mark.parametrize("backend", ["fa2", pytest.param("fa3", marks=pytest.mark.skipif(not HOPPER, reason="Hopper"))])
def test_log_sum_exps(backend: str, kind: torch.dtype) -> None:
    """Their base, and what is said of a query without keys."""
    from .flashinfer_steps import run_wrapper

    if (backend, kind) == ("fa3", torch.float16):
        pytest.skip("stock attention writes its own type")
    q, k, v = random(3, 8, 128), random(300, 4, 128, seed=1), random(300, 4, 128, seed=2)
    scale = 128**-0.5
    out, lse = run_wrapper(q, k, v, scale=scale, causal=False, backend=backend, out_type=kind)
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.double().repeat_interleave(2, 1)) * scale
    natural = scores.logsumexp(-1).float()
    print(json.dumps({"backend": backend, "out": str(kind), "lse over natural": (lse / natural).mean().item()}))
    assert out.dtype == kind and lse.dtype == torch.float32 and lse.shape == (3, 8)
    torch.testing.assert_close(lse * math.log(2), natural, rtol=1e-3, atol=1e-3)
    out, lse = run_wrapper(q, k[:0], v[:0], scale=scale, causal=False, backend=backend, out_type=kind)
    print(json.dumps({"backend": backend, "no keys": lse.unique().tolist(), "output": out.float().unique().tolist()}))
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_the_kernel_keeps_its_promises(cache: str, name: str) -> None:
    from vllm_nanocp.attention.gqa.flashinfer_launches import LaunchShape, self_check

    shape = SHAPES[name]
    kv = torch.float8_e4m3fn if cache == "fp8" else shape.dtype
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size, shape.scale
    self_check(LaunchShape(*sizes, shape.dtype, kv), torch.device("cuda"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (32, 4), (64, 8), (16, 1), (48, 1)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_launches_have_room_for_their_pieces(block_size: int, heads: int, kv_heads: int) -> None:
    """The library says what a plan takes: never more than is set aside, and at worst most of that."""
    from vllm_nanocp.attention.gqa.flashinfer_launches import LaunchShape, Planners, workspace_bytes

    device, host = torch.device("cuda"), functools.partial(torch.tensor, dtype=torch.int32)
    shape = LaunchShape(heads, kv_heads, 128, block_size, 128**-0.5, BF16, BF16)
    wrapper, most = Planners(shape, torch.empty(64, dtype=torch.uint8, device=device))._next(), 0
    for rows in (1, 2, 3, 7, 40, 200):
        for queries in (1, 2, 40, 300):
            for blocks in (1, 9, 100, 700, 5000):
                starts, pages = host(range(0, rows * queries + 1, queries)), host(range(0, rows * blocks + 1, blocks))
                found, tables = wrapper.workspace_size(
                    starts, pages, torch.empty(rows * blocks, dtype=torch.int32, device=device), host([1] * rows),
                    heads, kv_heads, 128, block_size, q_data_type=BF16, kv_data_type=BF16, o_data_type=torch.float16,
                )  # fmt: skip
                most = max(most, found)
                assert tables <= 8 << 20
    need = workspace_bytes(shape, device)
    print(json.dumps({"heads": heads, "kv_heads": kv_heads, "block": block_size, "taken": most, "set aside": need}))
    assert 0.7 * need < most <= need


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("x128")])
def test_error_of_merged_shards(name: str) -> None:
    """Which partial results keep the whole's error within bounds: those that are used must; others are printed."""
    from .flashinfer_steps import by_library, by_rows, merged_by

    shape, ratios = SHAPES[name], {}
    for title, merge, kind in (
        ("bfloat16, rows", by_rows, BF16),
        ("float16, rows", by_rows, torch.float16),
        ("bfloat16, merge_states", by_library, BF16),
        ("float16, merge_states", by_library, torch.float16),
    ):
        try:
            sums = [merged_by(lambda p, m=merge: m(p, BF16), kind, shape, seed) for seed in range(24)]  # type: ignore[misc]
        except Exception as error:
            print(json.dumps({"heads": name, "partial": title, "failed": repr(error)[:300]}))
            assert title != "float16, rows", error
            continue
        ours, stock, norm = (sum(x) for x in zip(*sums, strict=True))
        ratios[title] = math.sqrt(ours / stock)
        found = {"relative_error": math.sqrt(ours / norm), "stock": math.sqrt(stock / norm), "ratio": ratios[title]}
        print(json.dumps({"heads": name, "partial": title, **found}))
    assert ratios["float16, rows"] <= OF_STOCK


def test_plans_of_steps_that_follow_each_other() -> None:
    """The host plans ahead of the device: what a launch reads is its own plan."""
    from vllm_nanocp.attention.gqa.flashinfer_launches import attend

    from .flashinfer_steps import many_rows

    shape = FlashInferShape(8, 4, 128, BF16, 16)
    planners, rows, ids = many_rows(shape, torch.device("cuda"))
    cache = random(4096, 4, 16, 256)
    k, v = cache.transpose(1, 2).split(128, dim=-1)
    query = random(len(rows), 8, 128, seed=3)
    results = []
    for step in range(12):
        torch.cuda._sleep(20_000_000)
        planners.begin()
        launch = planners.plan(rows[: len(rows) - step], False)
        planners.end()
        results.append(attend(query[: len(rows) - step], k, v, launch, None))
    for step, (out, lse) in enumerate(results):
        n = len(rows) - step
        torch.testing.assert_close(out, results[0][0][:n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse, results[0][1][:n], rtol=1e-4, atol=1e-4)
    assert len(ids) == 4096


# -- Steps ----------------------------------------------------------------------------------------------------------


@functools.cache
def steps(ranks: int, staged: bool, modes: tuple[str, ...]) -> list[dict[str, Any]] | str:
    """All modes in one start of the ranks."""
    from .flashinfer_steps import run_modes

    groups = {name: [(shape, seed, seed % 9 != 8) for seed in range(500, 512)] for name, shape in SHAPES.items()}
    all_modes = MODES | ROUTED
    args = {mode: (all_modes[mode], groups) for mode in modes}
    return on_ranks(ranks, run_modes, args, staged, 290)


# Each group is one start of the ranks, so that a kernel that fails takes no other down.
GROUPS = {mode: ("exact", "fixed") if mode in ("exact", "fixed") else (mode,) for mode in MODES | ROUTED}


@pytest.mark.parametrize("mode", ["exact", "fixed", "xqa"])
def test_error_of_three_ranks_on_one_gpu(mode: str) -> None:
    check_error(steps(3, True, GROUPS[mode]), mode, SHAPES, ranks=3, gpus=1)


@pytest.mark.parametrize("mode", MODES)
def test_error_of_a_rank_that_visits_itself(mode: str) -> None:
    """Over NCCL on one GPU, so also from graphs."""
    check_error(steps(1, False, GROUPS[mode]), mode, SHAPES, ranks=1, gpus=1)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=TWO_GPUS), pytest.param(4, marks=FOUR_GPUS)])
@pytest.mark.parametrize("mode", MODES | ROUTED)
def test_error_on_several_gpus(mode: str, ranks: int) -> None:
    check_error(steps(ranks, False, GROUPS[mode]), mode, SHAPES, ranks=ranks, gpus=ranks)


# -- Engines --------------------------------------------------------------------------------------------------------

ENGINES: dict[str, dict[str, Any]] = {
    "eager": dict(enforce_eager=True),
    "graphs": dict(),
    "fp8": dict(kv_cache_dtype="fp8"),
    "tensor parallel": dict(tensor_parallel_size=2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the head size of most shapes above: nothing more is compiled."""
    path = tmp_path_factory.mktemp("models") / "tiny-128"
    make_qwen3_moe(path, dtype="bfloat16", head_dim=128, hidden_size=256, num_heads=8, num_kv_heads=2)
    return str(path)


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, model: str) -> Iterator[tuple[str, str, Engine, Engine]]:
    """Stock and nanocp, run the same way."""
    mode, exchange = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        args: dict[str, Any] = dict(
            dtype="bfloat16", block_size=16, num_gpu_blocks_override=8192, gpu_memory_utilization=0.03,
            kv_cache_memory_bytes=1 << 30, attention_config={"backend": "FLASHINFER"}, **ENGINES[mode],
        )  # fmt: skip
        if mode != "eager":
            args |= with_graphs(tensor_parallel=mode == "tensor parallel")
        stock = Engine(model, 1, **args)
        nanocp = Engine(model, 2, {"segment_size": 600, "exchange": exchange}, **args)
    yield mode, exchange, stock, nanocp
    stock.close()
    nanocp.close()


CASES = [
    pytest.param((mode, exchange), marks=FOUR_GPUS if mode == "tensor parallel" else TWO_GPUS, id=f"{mode} {exchange}")
    for mode in ENGINES
    for exchange in (["collective"] if mode == "eager" else ["collective", "routed"])
]


@pytest.mark.parametrize("engines", CASES, indirect=True)
def test_tokens(engines: tuple[str, str, Engine, Engine]) -> None:
    """Bfloat16 runs part where candidates are close. With FlashInfer stock's own two do not, whatever the batch; but
    two ranks add up what experts make in another order than one. So: as many as with FlashAttention at most, and only
    where candidates are one or two steps of bfloat16 apart."""
    mode, exchange, stock, nanocp = engines
    asks = requests(4)
    together, alone = answers(stock, asks)
    before = nanocp.status()
    ours = nanocp.ask(asks)
    after = nanocp.status()
    assert after["sharded_steps"] > before["sharded_steps"]
    allowed = partings(alone, together)
    gaps = partings(ours, together)
    print(f"{mode}, {exchange}: stock's own {len(allowed)} of {len(asks)} part, ours {len(gaps)}")
    nanocp.check_nothing_left()
    for worker in nanocp.call(nanocp.llm.collective_rpc("nanocp_counters")):
        assert bool(worker["captured_steps"]) == (mode != "eager")
        assert bool(worker["routed_steps"]) == (exchange == "routed")
    assert len(gaps) <= 1.5 * len(allowed) + 0.4 * len(asks)
    assert max(gaps, default=0.0) <= max([0.0, *allowed]) + 2 * STEP + 1e-4
