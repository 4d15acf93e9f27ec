# SPDX-License-Identifier: Apache-2.0
"""Output of a rank's scheduler process goes straight to the API servers, as that of vLLM's data-parallel engines does.

Each API server reads from one socket what comes to it over one connection from each rank, and connections overtake each
other. So all output of a request leaves by one rank, its outlet: the rank where its home was first. What another rank
makes for it goes back to the engine, which hands it to the outlet; and so does the engine with an ending of its own
making (an error, the aborts of a pause or of its end), or it might come before the last tokens. Touches vLLM 0.32's
``EngineCoreProc.process_output_sockets`` and ``_send_abort_outputs``, ``EngineCoreOutputs`` and ``MsgpackEncoder``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import zmq
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from ...wrapping import to_wrap, wraps
from .remote_rank import RemoteRank

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from .interface import Rank

# As in vLLM's output thread: what is sent last shall arrive.
_LINGER_MS = 4000
# An attribute of requests that the engine has ended.
_OUTLET = "_nanocp_outlet"


def note_outlet(request: Request, rank: int | None) -> None:
    """The engine ends a request, which its rank then forgets: note by which rank its ending is to leave, if it has been
    on one."""
    setattr(request, _OUTLET, rank)


def outlet_of(request: Request) -> int | None:
    """What was noted."""
    outlet: int | None = getattr(request, _OUTLET, None)
    return outlet


class Outlets:
    """A rank's sockets, one to each API server."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[Any] = []
        self._encoder = MsgpackEncoder()
        self._engine_index = 0
        self._weight_version: Any = None
        # Requests whose outlet is another rank's.
        self.foreign: set[str] = set()

    @property
    def connected(self) -> bool:
        return bool(self._sockets)

    def connect(self, paths: Sequence[str], engine_index: int) -> None:
        """Connect to where the API servers listen, in their order."""
        assert not self._sockets
        self._context = zmq.Context()
        self._sockets = [make_zmq_socket(self._context, path, zmq.PUSH, linger=_LINGER_MS) for path in paths]
        self._engine_index = engine_index

    def set_weight_version(self, version: Any) -> None:
        self._weight_version = version

    def keep_back(self, outputs: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
        """Take out what is foreign, which is not to be sent from here."""
        back: dict[int, EngineCoreOutputs] = {}
        for client, some in list(outputs.items()):
            foreign: list[EngineCoreOutput] = []
            if self.foreign:
                foreign = [output for output in some.outputs if output.request_id in self.foreign]
            if foreign:
                some.outputs = [output for output in some.outputs if output.request_id not in self.foreign]
                back[client] = EngineCoreOutputs(outputs=foreign)
            if not some.outputs and not some.finished_requests:
                del outputs[client]
        return back

    def forward(self, outputs: dict[int, list[EngineCoreOutput]]) -> None:
        """Send what other ranks have made for requests whose outlet is here."""
        self.send({client: EngineCoreOutputs(outputs=some) for client, some in outputs.items()})

    def send(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for client, some in outputs.items():
            some.engine_index = self._engine_index
            some.weight_version = self._weight_version
            self._sockets[client].send_multipart(self._encoder.encode(some), copy=False)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        if self._context is not None:
            self._context.term()


class EngineOutlets:
    """In the engine: tells the ranks where the API servers listen, and brings foreign output to its outlet.

    Args:
        ranks: all of them.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = [rank for rank in ranks if isinstance(rank, RemoteRank)]
        self._engine: Any = None
        self._paths: list[str] | None = None
        self._version: Any = None
        self.connected = False
        # What is to go to each outlet, by client.
        self._foreign: dict[int, dict[int, list[EngineCoreOutput]]] = {}

    def note_paths(self, engine: Any, paths: Sequence[str]) -> None:
        """Called by the engine's output thread, once."""
        self._engine, self._paths = weakref.proxy(engine), list(paths)

    def begin_step(self) -> None:
        """Before the ranks take a step's output in."""
        if not self._ranks or self._paths is None:
            return
        version = self._engine._weight_version
        if not self.connected:
            for rank in self._ranks:
                rank.connect(self._paths, self._engine.engine_index, version)
            self.connected = True
        elif version != self._version:
            for rank in self._ranks:
                rank.set_weight_version(version)
        self._version = version

    def forward(
        self, outputs: dict[int, EngineCoreOutputs], outlet_of: Mapping[str, int]
    ) -> dict[int, EngineCoreOutputs]:
        """Take out what is foreign; ``send_foreign`` hands it to its outlets.

        Args:
            outputs: of one rank, by client: all, or if ranks send it themselves what it has kept back.
            outlet_of: the outlets of requests that have one elsewhere.

        Returns:
            What leaves by the engine.
        """
        if not self.connected:
            return outputs
        for client, some in outputs.items():
            for output in some.outputs:
                if output.request_id in outlet_of:
                    its = self._foreign.setdefault(outlet_of[output.request_id], {})
                    its.setdefault(client, []).append(output)
            some.outputs = [output for output in some.outputs if output.request_id not in outlet_of]
        return {client: some for client, some in outputs.items() if some.outputs}

    def send_foreign(self) -> None:
        """Once all of a step is there, so that an outlet gets one message."""
        if self._foreign:
            foreign, self._foreign = self._foreign, {}
            for outlet, its in foreign.items():
                self._ranks[outlet].forward(its)

    def send_aborts(self, requests: Sequence[Request]) -> list[Request]:
        """Have those that the engine has aborted, and that have been on a rank, end by their outlets.

        Returns:
            The others.
        """
        outlets = {request.request_id: outlet for request in requests if (outlet := outlet_of(request)) is not None}
        if not self.connected or not outlets:
            return list(requests)
        endings: dict[int, EngineCoreOutputs] = {}
        for request in requests:
            if request.request_id in outlets:
                ending = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)
                endings.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ending)
        self.forward(endings, outlets)
        self.send_foreign()
        return [request for request in requests if request.request_id not in outlets]


def install_engine() -> None:
    """Have the engine's scheduler know where the API servers listen, and send what the engine ends. Idempotent."""
    from vllm.v1.engine.core import EngineCoreProc

    original = to_wrap(EngineCoreProc, "process_output_sockets", __name__)
    if original is None:
        return
    abort = EngineCoreProc._send_abort_outputs

    @wraps(original, __name__)
    def process_output_sockets(self: Any, output_paths: list[str], *args: Any, **kwargs: Any) -> Any:
        outlets = getattr(self.scheduler, "outlets", None)
        if isinstance(outlets, EngineOutlets):
            outlets.note_paths(self, output_paths)
        return original(self, output_paths, *args, **kwargs)

    EngineCoreProc.process_output_sockets = process_output_sockets  # type: ignore[method-assign]

    def _send_abort_outputs(self: Any, aborted_reqs: list[Request]) -> None:
        outlets = getattr(self.scheduler, "outlets", None)
        abort(self, outlets.send_aborts(aborted_reqs) if isinstance(outlets, EngineOutlets) else aborted_reqs)

    EngineCoreProc._send_abort_outputs = _send_abort_outputs  # type: ignore[method-assign]
