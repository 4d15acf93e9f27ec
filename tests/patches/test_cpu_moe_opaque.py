# SPDX-License-Identifier: Apache-2.0
"""`cpu_moe_opaque`: which forward a MoE layer gets."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_moe_opaque

pytest.importorskip("vllm")


@pytest.fixture
def runner(on_cpu: None, stock: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return stock(MoERunner, "_select_forward")


def _selected(runner: Any, *, dp_size: int = 1, use_ep: bool = False, shared: object = None) -> Any:
    parallel = SimpleNamespace(dp_size=dp_size, use_ep=use_ep)
    layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel), _shared_experts=shared)
    return runner._select_forward(layer)


def test_upstream_is_traced(runner: Any) -> None:
    """The defect: a data-parallel layer is a Python function, traced once. If not, the patch can go."""
    assert inspect.isfunction(_selected(runner, dp_size=2))


def test_parallel_layers_are_opaque(runner: Any) -> None:
    plain = _selected(runner)
    assert cpu_moe_opaque.apply() is Outcome.APPLIED
    assert _selected(runner) is plain
    assert _selected(runner, dp_size=2) is torch.ops.vllm.moe_forward
    assert _selected(runner, use_ep=True) is torch.ops.vllm.moe_forward
    assert _selected(runner, dp_size=2, shared=object()) is torch.ops.vllm.moe_forward_shared


def test_apply_is_idempotent(runner: Any) -> None:
    cpu_moe_opaque.apply()
    function = runner._select_forward
    assert cpu_moe_opaque.apply() is Outcome.APPLIED
    assert runner._select_forward is function


def _other(self: Any) -> Any: ...


def test_apply_refuses_another_upstream(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_select_forward", _other)
    with pytest.raises(PatchError, match=r"^cpu_moe_opaque: _other has changed upstream .*vLLM \d"):
        cpu_moe_opaque.apply()
