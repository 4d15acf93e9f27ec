# SPDX-License-Identifier: Apache-2.0
"""Output that leaves by several connections, which overtake each other: no client sees an ending before the tokens that
were made before it, nor anything after it, whoever has made the ending."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any, ClassVar

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder

from vllm_nanocp.sched.rank import outlets

from . import loopback
from .test_sessions import SessionWorld
from .world_shapes import Shape, vllm_config  # noqa: F401
from .worlds import InMode, WorldError, in_mode  # noqa: F401


class Connection:
    """A way to the client: what goes in comes out in order, and at any time."""

    opened: ClassVar[list[Connection]] = []
    _decoder = MsgpackDecoder(EngineCoreOutputs)

    def __init__(self) -> None:
        self.answers: deque[EngineCoreOutput] = deque()
        self.sent: Counter[str] = Counter()

    @classmethod
    def open(cls, *_: Any, **__: Any) -> Connection:
        """In the place of ``make_zmq_socket``."""
        connection = cls()
        cls.opened.append(connection)
        return connection

    def send_multipart(self, frames: Any, copy: bool) -> None:
        self.put_nowait((0, self._decoder.decode(frames)))

    def put_nowait(self, item: tuple[int, EngineCoreOutputs]) -> None:
        """As the engine's output queue has it."""
        self.answers += item[1].outputs
        for answer in item[1].outputs:
            self.sent[answer.request_id] += len(answer.new_token_ids)

    def close(self) -> None:
        """As a socket has it."""


class Engine(EngineCoreProc):
    """What is left of one: the ways of its own endings."""

    _weight_version = None  # type: ignore[assignment]
    engine_index = 0

    def __init__(self, scheduler: Any, output_queue: Any) -> None:
        self.scheduler, self.output_queue = scheduler, output_queue


class OutletWorld(SessionWorld):
    """A world whose ranks send output themselves, and whose engine aborts requests."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Connection.opened = [Connection()]
        self.engine = Engine(self.scheduler, Connection.opened[0])
        self.scheduler.outlets.note_paths(self.engine, ["client 0"])
        self.dice = random.Random(self.shape.seed)
        self.received: Counter[str] = Counter()
        self.aborted: set[str] = set()

    def abort(self, now: bool) -> None:
        """The engine does, as in a pause or when it is told to end."""
        for name, ask in self.asks.items():
            if not now or ask.leaves is None or not ask.comes <= ask.leaves <= self.now or name in self.aborted:
                continue
            ended = self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            if ended:
                self.engine._send_abort_outputs(ended)
                self.aborted.add(name)
                self.left.add(name)
                self.counts["aborts"] += 1

    def held(self, name: str, ask: Any) -> bool | None:
        return False if ask.comes > self.now else None  # clients learn of an ending later

    def deliver(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for item in outputs.items():
            self.engine.output_queue.put_nowait(item)
        for connection in self.dice.sample(Connection.opened, len(Connection.opened)):
            self.receive(connection, self.dice.choice([0, 0, 1, 5, 50]))

    def receive(self, connection: Connection, most: int) -> None:
        for _ in range(min(most, len(connection.answers))):
            answer = connection.answers.popleft()
            self.take(answer.request_id, answer.new_token_ids, answer.finish_reason)

    def take(self, name: str, tokens: list[int], finish: FinishReason | None) -> None:
        self.received[name] += len(tokens)
        if finish != FinishReason.ABORT or name in self.ended:
            super().take(name, tokens, finish)
            return
        sent = sum(connection.sent[name] for connection in Connection.opened)
        if self.received[name] != sent:
            raise WorldError(f"{name} ends when {self.received[name]} of its {sent} tokens have come")
        self.ended.add(name)

    def check_nothing_left(self) -> None:
        for connection in Connection.opened:
            self.receive(connection, len(connection.answers))
        self.counts["by ranks"] += sum(sum(connection.sent.values()) for connection in Connection.opened[1:])
        super().check_nothing_left()


def test_no_ending_overtakes(in_mode: InMode, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(outlets, "make_zmq_socket", Connection.open)
    counts = in_mode.run(OutletWorld, 5, apart=True)
    assert counts["aborts"] > 5 and counts["failed turns"] and counts["by ranks"] > 1000 and counts["moves"], counts


def test_nobody_waits_for_an_outlet(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It sends at once, and answers nothing; what goes wrong there ends its process (``test_rank_process.py``)."""
    loopback.use(monkeypatch)
    monkeypatch.setattr(outlets, "make_zmq_socket", Connection.open)
    rank: Any = Shape.draw(random.Random(1), 1).scheduler(vllm_config, True).ranks[0]
    rank.connect(["a client"], 0, None)
    rank.forward({0: [EngineCoreOutput("r", [5])]})
    assert Connection.opened[-1].sent["r"] == 1 and not rank.channel._frames
    rank.refresh()
    with pytest.raises(IndexError):
        rank.forward({1: [EngineCoreOutput("r", [5])]})  # there is no such client
    assert not rank.channel._frames, "no answer"
