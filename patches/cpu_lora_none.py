# SPDX-License-Identifier: Apache-2.0
"""Requests without a LoRA adapter beside others with one, on CPU.

Wrong upstream: a token without an adapter has the adapter index -1. `bgmv_shrink`
(vllm/lora/ops/torch_ops/lora_ops.py), and all that leads to it, takes the weights at that index, which in Python are
those of the last slot: the token gets that adapter, if there is one, and other output than it ought to have.

Versions: 0.32.0, 0.33.0.

Repair: what such tokens' inputs shrink to is zero, and so is what an adapter adds to their outputs.

Can go: when the function leaves them out itself.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vllm_nanocp.patches._guard import Outcome, require_source

if TYPE_CHECKING:
    import torch

_MODULE = "cpu_lora_none"
_MARK = "_nanocp_patch"
_KNOWN: set[str] = {"e7a5eafed74a2bc1"}  # 0.32.0


def apply() -> Outcome:
    """Let tokens without an adapter have none. Idempotent.

    Raises `PatchError` if `bgmv_shrink` is not the known one.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink
    if hasattr(original, _MARK):
        return Outcome.APPLIED
    require_source(_MODULE, original, _KNOWN)

    @functools.wraps(original)
    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    setattr(bgmv_shrink, _MARK, True)
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink
    return Outcome.APPLIED
