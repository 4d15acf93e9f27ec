# SPDX-License-Identifier: Apache-2.0
"""`deepseek_one_token`: what a layer gives a worker that has only padding of a single token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, deepseek_one_token

pytest.importorskip("vllm")

TOKEN = torch.tensor([[1.0, 2.0]])


@pytest.mark.parametrize("patched", [False, True])
def test_the_worker_with_the_padding_has_the_token(stock: Any, patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the patch this shows the defect."""
    from vllm.model_executor.models import deepseek_v2

    kind = stock(deepseek_v2.DeepseekV2DecoderLayer, "forward")
    padding = torch.zeros_like(TOKEN)
    for name, value in dict(
        get_tensor_model_parallel_world_size=lambda: 2,
        tensor_model_parallel_reduce_scatter=lambda rows, dim: rows[1:],
        sequence_parallel_chunk=lambda rows: padding,
        tensor_model_parallel_all_gather=lambda rows, dim: torch.cat([TOKEN, rows]),
    ).items():
        monkeypatch.setattr(deepseek_v2, name, value)
    if patched:
        assert deepseek_one_token.apply() is deepseek_one_token.apply() is Outcome.APPLIED

    def norm(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return hidden if residual is None else (hidden, residual)

    layer = SimpleNamespace(
        use_sequence_parallel_moe=True,
        use_mha=True,
        input_layernorm=norm,
        post_attention_layernorm=norm,
        self_attn=lambda positions, hidden: hidden,
        mlp=lambda hidden, already_sequence_parallel: hidden,
    )
    for rows in kind.forward(layer, torch.tensor([7]), TOKEN, None):
        assert torch.equal(rows, TOKEN if patched else padding)
