# SPDX-License-Identifier: Apache-2.0
"""Partial results on GPUs: how a row of one travels, and the merge, which is FlashInfer's.

A row is one query's output in the model's type, [num_heads, head_size], and behind it the log-sum-exps of its heads in
float32, base 2 (FlashInfer's; FlashAttention's are natural). One row is one piece of memory, so that one exchange
carries both.
"""

from __future__ import annotations

import torch

LOG2_E = 1.4426950408889634
# The log-sum-exp of no keys. Not -inf: FlashInfer's merge subtracts two of them.
NO_KEYS = -1e30
# Head sizes that FlashInfer's merge is compiled for.
HEAD_SIZES = (64, 128, 256)


class RowLayout:
    """Where the parts of a row are.

    Args:
        num_heads: query heads of this worker.
        head_size: elements.
        dtype: of outputs; two bytes wide.
    """

    def __init__(self, num_heads: int, head_size: int, dtype: torch.dtype) -> None:
        assert dtype.itemsize == 2
        self.num_heads, self.head_size, self.dtype = num_heads, head_size, dtype
        self.output_size = num_heads * head_size
        # Rows begin at multiples of 16 bytes, as kernels with wide loads and stores want.
        self.size = -(-(self.output_size + 2 * num_heads) // 8) * 8

    def empty(self, rows: int, device: torch.device) -> torch.Tensor:
        """[rows, size], uninitialised."""
        return torch.empty((rows, self.size), dtype=self.dtype, device=device)

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """The outputs of rows: a view [rows, num_heads, head_size]."""
        return rows[:, : self.output_size].unflatten(1, (self.num_heads, self.head_size))

    def lses(self, rows: torch.Tensor) -> torch.Tensor:
        """The log-sum-exps of rows: a view [rows, num_heads], float32, base 2."""
        first = self.output_size // 2
        return rows.view(torch.float32)[:, first : first + self.num_heads]

    def merge(self, rows: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        """Attention over several disjoint sets of keys from attention over each.

        Args:
            rows: [num_rows, size], the partial results.
            pick: int64 [num_results, num_partials], which rows make a result. A row with ``NO_KEYS`` and a finite
                output has no weight beside one with keys.

        Returns:
            [num_results, num_heads, head_size]; zero where no row picked has keys.
        """
        index = pick.flatten()
        outputs = rows[:, : self.output_size].index_select(0, index)
        lses = self.lses(rows).index_select(0, index)
        shape = (*pick.shape, self.num_heads)
        return merge_states(outputs.view(*shape, self.head_size), lses.view(shape))


def merge_states(outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """FlashInfer's ``merge_states``, without the merged log-sum-exp.

    Args:
        outputs: contiguous [rows, num_partials, num_heads, head_size].
        lses: contiguous [rows, num_partials, num_heads], float32, base 2, finite.

    Returns:
        [rows, num_heads, head_size].
    """
    import flashinfer

    return flashinfer.merge_states(outputs, lses)[0]


def warm_up(layout: RowLayout, device: torch.device) -> None:
    """Have FlashInfer compile its merge now, not in front of the first long request."""
    rows = torch.zeros((1, layout.size), dtype=layout.dtype, device=device)
    layout.merge(rows, torch.zeros((1, 2), dtype=torch.int64, device=device))
