# SPDX-License-Identifier: Apache-2.0
"""`cpu_lora_moe`: which experts a MoE layer has on CPU with LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_lora_moe

pytest.importorskip("vllm")


@pytest.fixture
def method(stock: Any, on_cpu: None) -> Any:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method

    return stock(unquantized_fused_moe_method, "select_unquantized_moe_backend")


def chosen(method: Any, lora: bool) -> str:
    """The name of what a layer of this kind is given."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    config = FusedMoEConfig(
        num_experts=8,
        experts_per_token=2,
        hidden_dim=128,
        intermediate_size=64,
        num_local_experts=8,
        num_logical_experts=8,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
        is_lora_enabled=lora,
    )
    name: str = method.select_unquantized_moe_backend(config)[0].name
    return name


def test_upstream_takes_triton(method: Any) -> None:
    """The defect. If not, the patch can go."""
    assert chosen(method, lora=True) == "TRITON" != chosen(method, lora=False)


def test_experts_are_those_without_lora(method: Any) -> None:
    without = chosen(method, lora=False)
    assert cpu_lora_moe.apply() is Outcome.APPLIED
    assert cpu_lora_moe.apply() is Outcome.APPLIED
    assert chosen(method, lora=True) == chosen(method, lora=False) == without


def test_another_upstream_is_refused(method: Any) -> None:
    def select_unquantized_moe_backend(moe_config: Any) -> Any: ...

    method.select_unquantized_moe_backend = select_unquantized_moe_backend
    with pytest.raises(PatchError, match="cpu_lora_moe"):
        cpu_lora_moe.apply()
