# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism in the CPU MoE kernels.

Wrong upstream: with expert parallelism a rank holds some of the experts, and the layer passes
`expert_map` (global expert id -> local one, -1 for experts elsewhere). `CPUUnquantizedExperts.apply`
(vllm/model_executor/layers/fused_moe/experts/cpu_moe.py; its X86, Arm and Power subclasses inherit
it) ignores the map and hands global ids to `torch.ops._C.cpu_fused_moe`, which uses them as indices
of counters and weights without a check: it reads and writes outside its buffers, mostly ending in a
segmentation fault. An id of -1 writes before the first counter, so mapping the ids alone would not
do. The quantized CPU experts ignore the map as well, while telling the kernel selection that they
support any parallel configuration.

Versions: 0.32.0, 0.33.0.

Repair: the unquantized experts compute only the (token, expert) pairs whose expert is local. The
pairs become rows of a top-1 problem for the same kernel, and their weighted results are summed per
token in the order of the token's slots, in float32 where the dtype is narrower. Nothing is computed
for experts elsewhere; a token without local experts gets zeros. Summed over the ranks the result
is the one without expert parallelism, to rounding. A token's bits do not depend on the batch.
The number of pairs varies from step to step, so `apply` must not be traced by `torch.compile`; the
patch `cpu_moe_opaque` sees to that.
Quantized experts that ignore the map say so when the kernel is chosen, by `NotImplementedError`.

Can go: when `CPUUnquantizedExperts.apply` honours `expert_map`.

Known upstream: https://github.com/vllm-project/vllm/pull/47778 would have the kernel skip experts
that are elsewhere.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_nanocp.patches._guard import Guarded, Outcome, PatchError, replace

if TYPE_CHECKING:
    import torch

_KNOWN_APPLY = {"f972c3a30e24e955"}  # 0.32.0
_QUANTIZED = (
    "CPUExpertsFp8",
    "CPUExpertsFp8W8A8",
    "CPUExpertsInt4",
    "CPUExpertsInt8",
    "CPUExpertsMxfp4",
)


def apply() -> Outcome:
    """Make the unquantized CPU experts honour `expert_map`, the others refuse it. Idempotent.

    Raises `PatchError` if `CPUUnquantizedExperts.apply` is not the known one.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    cls = cpu_moe.CPUUnquantizedExperts
    if "expert_map" in inspect.signature(_custom_ops.cpu_fused_moe).parameters:
        return Outcome.NOT_NEEDED
    for name, other in vars(cpu_moe).items():
        inherits = inspect.isclass(other) and issubclass(other, cls) and other is not cls
        if inherits and "apply" in vars(other):
            raise PatchError(__name__, f"{name} has its own apply")
    quantized = [getattr(cpu_moe, name) for name in _QUANTIZED if hasattr(cpu_moe, name)]
    return replace(
        __name__,
        Guarded(cls, "apply", _KNOWN_APPLY, _local_pairs_only),
        *(
            Guarded(other, "_supports_parallel_config", None, functools.partial(_no_expert_parallel, other.__name__))
            for other in quantized
            if _ignores_expert_map(other.apply)
        ),
    )


def select_local_pairs(
    topk_ids: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (token, slot) pairs of a routing whose expert is on this rank, in row-major order.

    `topk_ids`: integer [tokens, slots], global expert ids, negative for unused slots.
    `expert_map`: integer [global experts], local id or -1.
    Returns `(tokens, slots, local_ids)`, each [pairs]; the first two int64, the last int32.
    """
    import torch

    ids = topk_ids.long()
    local = expert_map[ids.clamp(min=0)].to(torch.int32)
    tokens, slots = torch.nonzero((ids >= 0) & (local >= 0), as_tuple=True)
    return tokens, slots, local[tokens, slots]


def _local_pairs_only(original: Callable[..., None]) -> Callable[..., None]:
    def apply_local(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """`output` [tokens, hidden] = weighted sum of the local experts of `hidden_states`."""
        import torch

        if expert_map is None:
            original(
                self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation,
                global_num_experts, None, *args, **kwargs,
            )  # fmt: skip
            return
        tokens, slots, local_ids = select_local_pairs(topk_ids, expert_map)
        total = torch.zeros(output.shape, dtype=torch.promote_types(output.dtype, torch.float32))
        if tokens.numel():
            rows = hidden_states[tokens]
            results = torch.empty_like(rows, dtype=output.dtype)
            # The kernel reads float32 weights and int32 ids without looking at dtype or strides.
            weights = topk_weights[tokens, slots].to(torch.float32)
            original(
                self, results, rows, w1, w2, weights.unsqueeze(1), local_ids.unsqueeze(1),
                activation, global_num_experts, None, *args, **kwargs,
            )  # fmt: skip
            # Row after row, so a token's sum is in the order of its slots.
            total.index_add_(0, tokens, results.to(total.dtype))
        output.copy_(total)

    return apply_local


def _ignores_expert_map(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `expert_map` that its body never reads."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return not any(isinstance(node, ast.Name) and node.id == "expert_map" for node in ast.walk(tree))


def _no_expert_parallel(name: str, supported: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def supports_parallel_config(moe_parallel_config: Any) -> bool:
        if moe_parallel_config.use_ep and supported(moe_parallel_config):
            raise NotImplementedError(
                f"{name}: this quantized CPU MoE kernel cannot leave out the experts of "
                "other ranks; start without --enable-expert-parallel or use unquantized weights"
            )
        return supported(moe_parallel_config)

    return supports_parallel_config
