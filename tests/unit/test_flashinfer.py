# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend, with references for the library's kernels: whole steps over three ranks against float64, as
tables of a step's own size and as the fixed ones of captured graphs. On GPUs: ``tests/gpu/test_flashinfer.py``."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.unit import flashinfer_steps
from tests.unit.flashinfer_steps import FlashInferShape, ReferencePrefill
from tests.unit.processes import run_ranks
from tests.unit.test_flash import RANKS, TOLERANCE, Results, check
from vllm_nanocp.attention.families import flashinfer_chosen
from vllm_nanocp.attention.gqa import flashinfer_launches
from vllm_nanocp.attention.gqa.flashinfer_backend import GroupedQueryWithFlashInfer
from vllm_nanocp.attention.gqa.flashinfer_launches import LaunchShape
from vllm_nanocp.errors import NanoCPConfigError

SHAPES = [
    FlashInferShape(8, 2, 64, dtype=torch.bfloat16, block_size=16),
    FlashInferShape(16, 1, 128, dtype=torch.float16, block_size=32),
]


def scenarios(
    first: int, count: int, shapes: list[FlashInferShape] = SHAPES
) -> list[tuple[FlashInferShape, int, bool]]:
    return [(shapes[seed % len(shapes)], seed, seed % 9 != 8) for seed in range(first, first + count)]


def test_steps(tmp_path: Path) -> None:
    """With tables of a step's own size, with fixed ones, and with the routed exchange: what stock attention has nothing
    to do with is planned nowhere then, and where it has, rows that visit are not among its own."""
    small = [FlashInferShape(4, 2, 64, torch.bfloat16, 16)]
    modes: dict[str, Any] = {
        "exact": (dict(), scenarios(300, 10)),
        "fixed": (dict(capacity=12), scenarios(400, 7)),
        "routed": (dict(capacity=5, pad=0, routed=True, shared=str(tmp_path)), scenarios(600, 3, small)),
    }
    results: Results = run_ranks(RANKS, flashinfer_steps.run_modes, modes, seconds=250)
    kinds = {"exact": ("plain prefill", "sharded prefill"), "fixed": (), "routed": ("plain prefill",)}
    for mode, more in kinds.items():
        check(results, mode, 2 * TOLERANCE if mode == "routed" else TOLERANCE)  # the interpreter cuts off bits
        for kind in ("plain decode", "sharded decode", "guests", *more):
            assert sum(result[mode][0].get(kind, 0) for result in results) >= 2, (mode, kind)


SHAPE = LaunchShape(4, 2, 64, 16, 0.125, torch.bfloat16, torch.bfloat16)
Change = Callable[[torch.Tensor, torch.Tensor], None]


def natural(out: torch.Tensor, lse: torch.Tensor) -> None:
    lse.mul_(0.6931471805599453)


def larger(out: torch.Tensor, lse: torch.Tensor) -> None:
    out.mul_(1.1)


def some_number_for_no_keys(out: torch.Tensor, lse: torch.Tensor) -> None:
    lse[lse == float("-inf")] = 7.0


def fails(out: torch.Tensor, lse: torch.Tensor) -> None:
    raise RuntimeError("Ninja build failed. Ninja output:\n[1/11] nvcc: not found")


def self_check(monkeypatch: pytest.MonkeyPatch, change: Change | None, shape: LaunchShape = SHAPE) -> None:
    class Changed(ReferencePrefill):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            out, lse = super().run(*args, **kwargs)
            if change is not None:
                change(out, lse)
            return out, lse

    import flashinfer

    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Changed)
    flashinfer_launches.self_check(shape, torch.device("cpu"))


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_flashinfer_that_keeps_its_promises(kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    self_check(monkeypatch, None, LaunchShape(4, 2, 64, 16, 0.125, torch.bfloat16, kv_dtype))


@pytest.mark.parametrize("change", [natural, larger, some_number_for_no_keys, fails])
def test_another_flashinfer_is_refused_in_one_line(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        self_check(monkeypatch, change)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("nanocp: this FlashInfer does not return")
    assert '"max_degree": 1' in line and len(line) < 500
    assert caught.value.__cause__ is not None, "the log has the whole reason"


def test_float8_caches_are_read_with_their_scales() -> None:
    shape = FlashInferShape(4, 2, 64, torch.bfloat16, 16, cache_dtype="fp8")
    device = torch.device("cpu")
    builder, impl = flashinfer_steps.make_builder(shape, device), flashinfer_steps.make_impl(shape)
    layer = flashinfer_steps.make_layer(shape, device)
    layer._k_scale_float, layer._v_scale_float = 0.5, 1e6  # more than the type of partial results holds
    cache = torch.randn(4, 2, 16, 128).to(torch.float8_e4m3fn)
    blocks = torch.tensor([2, 1], dtype=torch.int32)
    planners = builder._planners
    planners.begin()
    launch = planners.plan([flashinfer_launches.TableRow(1, 20, blocks.data_ptr())], False)
    planners.end()
    query = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    layout = flashinfer_launches.RowLayout(4, 64)
    rows = layout.empty(1, device)
    impl.over_shards(layer, query, cache.view(torch.uint8), launch, rows)
    held = cache[blocks.long()].transpose(1, 2).flatten(0, 1)[:20].float().repeat_interleave(2, 1)
    scores = torch.einsum("hd,khd->hk", query[0].float(), held[..., :64] * 0.5) * shape.scale
    torch.testing.assert_close(layout.lses(rows)[0], scores.logsumexp(-1))
    expected = torch.einsum("hk,khd->hd", scores.softmax(-1), held[..., 64:] * 1e6)
    torch.testing.assert_close(layout.outputs(rows)[0], expected, rtol=2e-3, atol=2e3)


def blocks_of(tokens: int) -> Any:
    return SimpleNamespace(cache_config=SimpleNamespace(block_size=tokens))


def test_a_kernel_that_does_not_fit_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton says when it loads a kernel, at start: shared memory and registers are the device's own."""
    from triton.runtime.errors import OutOfResources

    from vllm_nanocp.attention.gqa.gpu_layer import GroupedQueryOnGPU

    def warm_up(*_: Any) -> None:
        raise OutOfResources(74240, 65536, "shared memory")

    family = object.__new__(GroupedQueryOnGPU)
    family.dtype, family._config = torch.bfloat16, blocks_of(16)
    layer = SimpleNamespace(impl=SimpleNamespace(warm_up=warm_up), kv_cache=torch.empty(1, 2, 16, 128))
    with pytest.raises(NanoCPConfigError, match="Required: 74240, Hardware limit: 65536"):
        family.warm_up(layer)


def test_layers_of_one_scale() -> None:
    family = object.__new__(GroupedQueryWithFlashInfer)
    layers = {name: SimpleNamespace(impl=SimpleNamespace(scale=1.0)) for name in ("first", "second")}
    family.attach(layers)
    assert family._scale == 1.0
    layers["second"].impl.scale = 0.5
    with pytest.raises(NanoCPConfigError, match="layers scale their scores differently"):
        family.attach(layers)


def test_blocks_that_vllm_cuts_for_its_kernels_are_refused() -> None:
    """Block tables are of the pieces then, and a plan's block ids of whole ones."""
    family = object.__new__(GroupedQueryWithFlashInfer)
    family.dtype, family._config = torch.bfloat16, blocks_of(128)
    impl = SimpleNamespace(warm_up=lambda *_: pytest.fail("compiled first"))
    with pytest.raises(NanoCPConfigError) as caught:
        family.warm_up(SimpleNamespace(impl=impl, kv_cache=torch.empty(2, 2, 64, 128)))
    assert "--block-size 128" in str(caught.value) and "use --block-size 64" in str(caught.value)


def test_launches_have_room_for_their_pieces() -> None:
    """vLLM's workspace where it is large enough; what the library takes is compared on GPUs."""
    builder = flashinfer_steps.make_builder(SHAPES[0], torch.device("cpu"))
    shape = builder._planners.shape
    need = flashinfer_launches.workspace_bytes(shape, torch.device("cpu"))
    assert len(builder._workspace_buffer) < need == len(builder._planners._workspace)
    del builder.__dict__["_planners"]
    builder._workspace_buffer = torch.zeros(need, dtype=torch.uint8)
    assert builder._planners._workspace is builder._workspace_buffer


def chosen(backend: Any, major: int | None, monkeypatch: pytest.MonkeyPatch) -> bool:
    capability = None if major is None else DeviceCapability(major, 0)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: capability)
    return flashinfer_chosen(SimpleNamespace(attention_config=SimpleNamespace(backend=backend)))


def vllm_order(major: int) -> list[Any]:
    """Of vLLM's backends on CUDA, from the text of a module that wants its kernels."""
    (path,) = (Path(root) / "platforms" / "cuda.py" for root in vllm.__path__)
    tree = ast.parse(path.read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_get_backend_priorities")
    found.decorator_list, found.returns = [], None
    for argument in found.args.args:
        argument.annotation = None
    space: dict[str, Any] = {"AttentionBackendEnum": AttentionBackendEnum}
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return list(space["_get_backend_priorities"](False, DeviceCapability(major, 0)))


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_it_is_chosen_as_vllm_chooses(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(
        b for b in vllm_order(major) if b in (AttentionBackendEnum.FLASHINFER, AttentionBackendEnum.FLASH_ATTN)
    )
    assert chosen(None, major, monkeypatch) == (first == AttentionBackendEnum.FLASHINFER)
    assert chosen(AttentionBackendEnum.FLASHINFER, major, monkeypatch)
    assert not chosen(AttentionBackendEnum.FLASH_ATTN, major, monkeypatch)


def test_a_step_does_not_write_over_the_tables_of_the_last_one() -> None:
    """FlashInfer writes a plan to host memory that is copied later: the host may be a step ahead."""
    builder = flashinfer_steps.make_builder(SHAPES[0], torch.device("cpu"))
    planners, blocks = builder._planners, torch.tensor([1], dtype=torch.int32)
    used = []
    for _ in range(4):
        planners.begin()
        row = flashinfer_launches.TableRow(1, 3, blocks.data_ptr())
        used.append([planners.plan([row], False).planner for _ in range(2)])
        planners.end()
    assert all(len({id(p) for p in (*a, *b)}) == 4 for a, b in itertools.pairwise(used))
    assert used[0] == used[2] and used[1] == used[3], "and makes none anew"
