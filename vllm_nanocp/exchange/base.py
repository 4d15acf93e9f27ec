# SPDX-License-Identifier: Apache-2.0
"""The interface that attention sees of an exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Exchange(Protocol):
    """Moves rows between ranks. Every rank makes the same calls in the same order, also with nothing to send.

    ``counts[r]`` is the number of rows for (or from) rank r, known to all ranks from the step plan. Rows for a rank
    lie together, the ranks' in ascending order.
    """

    def dispatch(self, queries: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        """Send queries to the holders of the shards they visit.

        Args:
            queries: [sum(send_counts), num_heads, head_size].
            send_counts: rows for each rank.
            recv_counts: rows from each rank.

        Returns:
            [sum(recv_counts), num_heads, head_size], valid until the next call.
        """
        ...

    def combine(self, partials: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        """Send partial results back to the homes.

        Args:
            partials: [sum(send_counts), num_heads, head_size + 1], float32: output, then natural log-sum-exp.
            send_counts: rows for each rank (what ``dispatch`` received from it).
            recv_counts: rows from each rank (what ``dispatch`` sent to it).

        Returns:
            [sum(recv_counts), num_heads, head_size + 1], float32, in the order of the queries sent; valid until the
            next call.
        """
        ...
