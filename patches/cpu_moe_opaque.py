# SPDX-License-Identifier: Apache-2.0
"""Data- or expert-parallel MoE layers with `torch.compile` on CPU.

Wrong upstream: on CPU `MoERunner._select_forward`
(vllm/model_executor/layers/fused_moe/runner/moe_runner.py) lets Dynamo trace through the MoE layer,
where GPUs see one opaque operator. A data-parallel layer reads how many tokens each rank has in
this step, a Python list in the forward context. Tracing once must fail or bake in the sizes of the
warm-up; 0.32.0 fails at start:
`torch._dynamo.exc.UserError: ... Could not guard on data-dependent expression ...`.
Only `--enforce-eager` helps.

Versions: 0.32.0, 0.33.0.

Repair: layers that exchange tokens with other ranks use the operator that GPUs use,
`torch.ops.vllm.moe_forward` (or `moe_forward_shared`). Other layers are traced as before.

Can go: when `_select_forward` does so itself, or traced layers take the sizes at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_SELECT = {"0d3dd2e2e54e7c77"}  # 0.32.0


def apply() -> Outcome:
    """Make parallel MoE layers opaque to `torch.compile`. Idempotent.

    Raises `PatchError` if `MoERunner._select_forward` is not the known one.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return replace(__name__, Guarded(MoERunner, "_select_forward", _KNOWN_SELECT, _opaque_if_parallel))


def _opaque_if_parallel(original: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    def select_forward(self: Any) -> Callable[..., Any]:
        import torch

        parallel = self.moe_config.moe_parallel_config
        if parallel.dp_size == 1 and not parallel.use_ep:
            return original(self)
        shared = self._shared_experts is not None
        return torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward

    return select_forward
