# SPDX-License-Identifier: Apache-2.0
"""Several API servers are several clients of the engine: what a request makes goes to the one that it came from."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import RequestStatus

from .scheduler_world import WorldError
from .world_shapes import vllm_config  # noqa: F401
from .worlds import InMode, World, in_mode  # noqa: F401

CLIENTS = 3


class ClientsWorld(World):
    """A world whose requests come from several clients."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.client_of = {name: at % CLIENTS for at, name in enumerate(self.asks)}
        for name, ask in self.asks.items():
            ask.request.client_index = self.client_of[name]
        update, finish = self.scheduler.update_from_output, self.scheduler.finish_requests

        def checked(*args: Any) -> dict[int, EngineCoreOutputs]:
            outputs = update(*args)
            for client, part in outputs.items():
                for answer in part.outputs:
                    if self.client_of[answer.request_id] != client:
                        raise WorldError(f"{answer.request_id} is answered to client {client}")
            # Statistics come once a step, to a client that gets answers if there is one.
            if sum(part.scheduler_stats is not None for part in outputs.values()) > 1:
                raise WorldError("statistics of a step came to several clients")
            self.counts["clients"] = max(self.counts["clients"], len(outputs))
            return outputs

        def ended(ids: Any, status: RequestStatus) -> Any:
            requests = finish(ids, status)
            for request in requests:
                if self.client_of[request.request_id] != request.client_index:
                    raise WorldError(f"{request.request_id} ends for client {request.client_index}")
            return requests

        self.scheduler.update_from_output = checked  # type: ignore[method-assign]
        self.scheduler.finish_requests = ended  # type: ignore[method-assign]


def test_each_client_gets_its_own(in_mode: InMode) -> None:  # noqa: F811
    """Sharded requests, requests that move, are preempted or aborted."""
    counts = in_mode.run(ClientsWorld, 6)
    assert counts["rows"] and counts["moves"] and counts["aborts"] and counts["clients"] > 6, counts
