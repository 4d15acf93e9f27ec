# SPDX-License-Identifier: Apache-2.0
"""Temperature, `top_k` and `top_p` of requests that are decoded with drafts, on CPU.

Wrong upstream: `expand_batch_to_tokens` (vllm/v1/sample/rejection_sampler.py) gives each draft its request's value.
On CPU its kernel writes to a copy of the output in 64-bit integers (`_expand_kernel_impl`, vllm/utils/
cpu_triton_utils.py), so that any other output stays uninitialised: drafts are verified with a temperature that is
whatever the memory held. Sampled tokens have the wrong distribution, and the same seed gives others each time.

Versions: 0.32.0, 0.33.0.

Repair: the values are repeated by PyTorch.

Can go: when the kernel's wrapper copies its result back, and takes floating-point numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN: set[str] = {"ef896c2fe058ae70"}  # 0.32.0


def apply() -> Outcome:
    """Let each draft have its request's values. Idempotent.

    Raises `PatchError` if `expand_batch_to_tokens` is not the known one.
    """
    from vllm.v1.sample import rejection_sampler

    return replace(__name__, Guarded(rejection_sampler, "expand_batch_to_tokens", _KNOWN, lambda _: _expanded))


def _expanded(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts, output_size=num_tokens)
