# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a MoE model's other layers, on CPU.

Wrong upstream: with `--enable-lora` `select_unquantized_moe_backend`
(vllm/model_executor/layers/fused_moe/oracle/unquantized.py) takes the Triton experts, which can have adapters, on CPU
too, and whether or not `--lora-target-modules` leaves the experts out. There is no Triton on CPU: `AttributeError:
module 'triton.language' has no attribute 'float32'`, in the worker, at the first request.

Versions: 0.32.0, 0.33.0.

Repair: on CPU experts are chosen as without LoRA. Where the experts are to have adapters themselves, as without
`--lora-target-modules`, there is nothing to choose: that is refused before (`entry/refusals.py`).

Can go: when vLLM chooses so itself, or CPU has experts with adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN: set[str] = {"2817b5968ddec5bc", "55d6a1cd4522927a"}  # 0.32.0, 0.33.0


def apply() -> Outcome:
    """Let MoE layers on CPU have the experts that they have without LoRA. Idempotent.

    Raises `PatchError` if `select_unquantized_moe_backend` is not the known one.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method

    return replace(
        __name__,
        Guarded(unquantized_fused_moe_method, "select_unquantized_moe_backend", _KNOWN, _as_without_lora),
    )


def _as_without_lora(original: Any) -> Any:
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        return original(dataclasses.replace(moe_config, is_lora_enabled=False))

    return select_unquantized_moe_backend
