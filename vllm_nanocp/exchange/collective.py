# SPDX-License-Identifier: Apache-2.0
"""The exchange over torch.distributed: one all-to-all each way. Works wherever vLLM's process groups do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class CollectiveExchange:
    """All-to-all over the data-parallel group (of workers with the same tensor-parallel rank).

    Args:
        group: one member a rank, in rank order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self.calls = 0

    def _buffer(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A tensor of this shape over storage that only grows."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(like.dtype)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[like.dtype] = buffer
        return buffer[:size].view(shape)

    def _all_to_all(self, rows: torch.Tensor, send: Sequence[int], recv: Sequence[int]) -> torch.Tensor:
        self.calls += 1
        out = self._buffer((sum(recv), *rows.shape[1:]), rows)
        dist.all_to_all_single(out, rows.contiguous(), list(recv), list(send), group=self.group)
        return out

    def dispatch(self, queries: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        return self._all_to_all(queries, send_counts, recv_counts)

    def combine(self, partials: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        return self._all_to_all(partials, send_counts, recv_counts)
