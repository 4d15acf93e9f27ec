# SPDX-License-Identifier: Apache-2.0
"""Merging partial attention results by their log-sum-exp (as FlashAttention's split-KV and FlashInfer's
``merge_states`` do; natural logarithm here)."""

from __future__ import annotations

import torch

# An output, [rows, num_heads, head_size], and its natural log-sum-exp, [rows, num_heads], float32.
Partial = tuple[torch.Tensor, torch.Tensor]


def merge_partials(outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """Attention over the union of disjoint key sets from attention over each.

    Args:
        outputs: [num_partials, rows, num_heads, head_size], float32.
        lses: [num_partials, rows, num_heads], float32, natural; -inf where a partial saw no key. At least one
            partial of each row must have seen one.

    Returns:
        [rows, num_heads, head_size], float32.
    """
    weights = torch.softmax(lses, dim=0).unsqueeze(-1)
    # A partial without keys has weight 0, and whatever its kernel wrote as its output must not count.
    return torch.where(weights > 0, weights * outputs, 0.0).sum(dim=0)
