# SPDX-License-Identifier: Apache-2.0
"""A second stream, for work that what follows does not need at once. In a graph it becomes a branch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """The body's work may run at the same time as what comes after it, up to a call of what this yields.

    Args:
        device: of all tensors that the body touches. Without streams (a CPU) things run one after another.

    Yields:
        Lets the current stream wait for the body's work.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side = _streams[device]
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)
