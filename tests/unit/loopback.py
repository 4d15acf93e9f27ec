# SPDX-License-Identifier: Apache-2.0
"""Ranks' schedulers behind their messages, and in this process: all that processes do but to run at the same time."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Sequence

import pytest

from vllm_nanocp.sched.rank import rank_process
from vllm_nanocp.sched.rank.rank_spec import RankSpec

# Whether worlds have their schedulers behind messages.
in_use = False


class Loopback:
    """A channel to a server that is called."""

    def __init__(self, spec: RankSpec) -> None:
        self.server = rank_process.make_server(pickle.loads(pickle.dumps(spec)))
        self._frames: deque[bytes] = deque()
        self.messages = self.bytes = 0

    def send(self, message: bytes) -> None:
        self.messages += 1
        self.bytes += len(message)
        frame = self.server.obey(message)
        if frame is not None:
            self._frames.append(frame)
        self.server.after()

    def receive(self) -> bytes:
        return self._frames.popleft()

    def close(self) -> None:
        self.server.close()


def open_channels(specs: Sequence[RankSpec]) -> list[Loopback]:
    return [Loopback(spec) for spec in specs]


def use(monkeypatch: pytest.MonkeyPatch, apart: bool = True) -> None:
    """Have the schedulers of a test's worlds behind messages, or not."""
    monkeypatch.setattr(sys.modules[__name__], "in_use", apart)
    monkeypatch.setattr(rank_process, "open_channels", open_channels)
