# SPDX-License-Identifier: Apache-2.0
"""Requests without a LoRA adapter beside others with one, on CPU.

Wrong upstream: a token without an adapter has the adapter index -1. `bgmv_shrink`
(vllm/lora/ops/torch_ops/lora_ops.py), and all that leads to it, takes the weights at that index, which in Python are
those of the last slot: the token gets that adapter, if there is one, and other output than it ought to have. So does
`bgmv_expand`, to which adapters of the embedding layer come without being shrunk, with a row of the first slot's.

Versions: 0.32.0; the first mended in 0.33.0.

Repair: what such tokens' inputs shrink to is zero, and so is what is expanded of them.

Can go: with 0.32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace, source_digest

if TYPE_CHECKING:
    import torch

_KNOWN: set[str] = {"e7a5eafed74a2bc1", "ff08e86052b966c9"}  # 0.32.0, 0.33.0
_MENDED = "ff08e86052b966c9"
_KNOWN_EXPAND: set[str] = {"634dfed323317a2a", "814456e82e1f2c5f"}  # 0.32.0, 0.33.0


def apply() -> Outcome:
    """Let tokens without an adapter have none. Idempotent.

    Raises `PatchError` if one of them is not a known one.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if source_digest(lora_ops.bgmv_shrink) == _MENDED:
        return Outcome.NOT_NEEDED
    return replace(
        __name__,
        Guarded(lora_ops, "bgmv_shrink", _KNOWN, _none_for_none),
        Guarded(punica_cpu, "bgmv_shrink", None, _none_for_none),  # imported by its name
        Guarded(lora_ops, "bgmv_expand", _KNOWN_EXPAND, _nothing_of_none),
        Guarded(punica_cpu, "bgmv_expand", None, _nothing_of_none),
    )


def _none_for_none(original: Any) -> Any:
    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    return bgmv_shrink


def _nothing_of_none(original: Any) -> Any:
    def bgmv_expand(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        add_inputs: bool = True,
    ) -> None:
        inputs = inputs.masked_fill((lora_indices_tensor < 0).unsqueeze(1), 0)
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs)

    return bgmv_expand
