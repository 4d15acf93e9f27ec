# SPDX-License-Identifier: Apache-2.0
"""The exchange over torch.distributed: one all-to-all each way. Works wherever vLLM's process groups do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .base import Counts


class CollectiveExchange:
    """All-to-all over the data-parallel group (of workers with the same tensor-parallel rank).

    Args:
        group: one member a rank, in rank order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self.calls = 0

    def warm_up(self, device: torch.device) -> None:
        """Connect the ranks. NCCL would do it when they first exchange something, in the first step of a long request,
        and take memory that vLLM has not counted. A collective."""
        counts = [1] * self.group.size()
        one = torch.zeros(len(counts), device=device)
        dist.all_to_all_single(torch.empty_like(one), one, counts, counts, self.group)

    def _buffer(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A tensor of this shape over storage that only grows."""
        size = math.prod(shape)
        buffer = self._buffers.get(like.dtype)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[like.dtype] = buffer
        return buffer[:size].view(shape)

    def _all_to_all(
        self, rows: torch.Tensor, send: Counts, recv: Counts, out: torch.Tensor | None, ahead: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """What was received; with ``ahead``, what will be once the second is waited for."""
        self.calls += 1
        if out is None:
            shape = (len(rows) if recv is None else sum(recv), *rows.shape[1:])
            # A graph keeps the addresses it was captured with, so it must not share storage that may be replaced.
            out = rows.new_empty(shape) if recv is None else self._buffer(shape, rows)
        # Bytes, where NCCL has no name for the type (float8).
        source, target = rows.contiguous(), out
        if rows.dtype.itemsize == 1:
            source, target = source.view(torch.uint8), target.view(torch.uint8)
        received, sent = (None if counts is None else list(counts) for counts in (recv, send))
        return out, dist.all_to_all_single(target, source, received, sent, self.group, ahead)

    def dispatch(self, queries: torch.Tensor, send_counts: Counts, recv_counts: Counts) -> Callable[[], torch.Tensor]:
        # In a step of a size of its own there may be a prompt's chunk to attend to while queries travel. In a captured
        # step of decodes there is nothing.
        ahead = recv_counts is not None
        return functools.partial(_wait, *self._all_to_all(queries, send_counts, recv_counts, None, ahead))

    def combine(
        self, partials: torch.Tensor, send_counts: Counts, recv_counts: Counts, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._all_to_all(partials, send_counts, recv_counts, out)[0]


def _wait(rows: torch.Tensor, work: Any) -> torch.Tensor:
    if work is not None:
        work.wait()
    return rows
