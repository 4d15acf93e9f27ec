# SPDX-License-Identifier: Apache-2.0
"""The interface that attention sees of an exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

# Rows for (or from) each rank; None: as many for every rank.
Counts = Sequence[int] | None


class Exchange(Protocol):
    """Moves rows between ranks. Every rank makes the same calls in the same order, also with nothing to send.

    ``counts[r]`` is the number of rows for (or from) rank r, known to all ranks from the step plan. Rows for a rank
    lie together, the ranks' in ascending order. Without counts every pair of ranks exchanges equally many rows: then
    the same calls can be captured in a graph and replayed for any step.
    """

    def dispatch(self, queries: torch.Tensor, send_counts: Counts, recv_counts: Counts) -> Callable[[], torch.Tensor]:
        """Begin to send queries to the holders of the shards they visit.

        Args:
            queries: [rows to send, num_heads, head_size].
            send_counts: rows for each rank.
            recv_counts: rows from each rank.

        Returns:
            To be called before the next call here: waits for what comes, [rows to receive, num_heads, head_size], valid
            until that next call. Until then this rank may do what needs none of it.
        """
        ...

    def combine(
        self, partials: torch.Tensor, send_counts: Counts, recv_counts: Counts, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Send partial results back to the homes.

        Args:
            partials: [rows to send, ...], one row for each query that ``dispatch`` received: output and log-sum-exp,
                laid out as the attention path likes.
            send_counts: rows for each rank (what ``dispatch`` received from it).
            recv_counts: rows from each rank (what ``dispatch`` sent to it).
            out: contiguous [rows to receive, ...], to write to.

        Returns:
            ``out``, or a tensor that is valid until the next call: a row for each query sent, in that order.
        """
        ...
