# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a MoE model's other layers, on CPU.

Wrong upstream: with `--enable-lora` `select_unquantized_moe_backend`
(vllm/model_executor/layers/fused_moe/oracle/unquantized.py) takes the Triton experts, which can have adapters, on CPU
too, and whether or not `--lora-target-modules` leaves the experts out. There is no Triton on CPU: `AttributeError:
module 'triton.language' has no attribute 'float32'`, in the worker, at the first request.

Versions: 0.32.0, 0.33.0.

Repair: on CPU experts are chosen as without LoRA. With adapters of the experts themselves vLLM then ends at start:
"Monolithic kernels are not supported for Fused MoE LoRA."

Can go: when vLLM chooses so itself, or CPU has experts with adapters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from vllm_nanocp.patches._guard import Outcome, require_source

_MODULE = "cpu_lora_moe"
_MARK = "_nanocp_patch"
_KNOWN: set[str] = {"2817b5968ddec5bc"}  # 0.32.0


def apply() -> Outcome:
    """Let MoE layers on CPU have the experts that they have without LoRA. Idempotent.

    Raises `PatchError` if `select_unquantized_moe_backend` is not the known one.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as user

    original = user.select_unquantized_moe_backend
    if hasattr(original, _MARK):
        return Outcome.APPLIED
    require_source(_MODULE, original, _KNOWN)

    @functools.wraps(original)
    def select(moe_config: Any) -> Any:
        return original(dataclasses.replace(moe_config, is_lora_enabled=False))

    setattr(select, _MARK, True)
    user.select_unquantized_moe_backend = select
    return Outcome.APPLIED
