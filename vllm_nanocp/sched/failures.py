# SPDX-License-Identifier: Apache-2.0
"""Requests that the scheduler itself ends with an error, and what their clients are told.

vLLM's front-end expects one ending for each chunk of a streaming-input session, also for those that were queued or are
still to come; it would wait for ever for one that is left out. (That of 0.33 takes the first error for the session's
end: it does without the others and gives the session up, which is then forgotten here.) And a chunk that comes after
the end must not begin a session of its own, without all that was said before.
"""

from __future__ import annotations

from vllm.v1.engine import EngineCoreEvent, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from .rank.outlets import EngineOutlets, outlet_of


class Failures:
    """Answers that wait for the next step's outputs."""

    def __init__(self) -> None:
        # By client.
        self._answers: list[tuple[int, EngineCoreOutput]] = []
        # The outlets of those that have one; and of sessions that have ended here and whose input has not.
        self._outlets: dict[str, int] = {}
        self._sessions: dict[str, int | None] = {}

    @property
    def pending(self) -> bool:
        return bool(self._answers)

    def note(self, request: Request) -> None:
        """A request has been ended with an error."""
        outlet = outlet_of(request)
        self._answer(request, outlet, request.take_events())
        if not request.resumable:
            return
        chunks = list(request.streaming_queue or ())
        for chunk in chunks:
            if chunk is not None:
                self._answer(request, outlet)
        if None not in chunks:
            self._sessions[request.request_id] = outlet

    def _answer(self, request: Request, outlet: int | None, events: list[EngineCoreEvent] | None = None) -> None:
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            events=events,
            trace_headers=request.trace_headers,
        )
        self._answers.append((request.client_index, answer))
        if outlet is not None:
            self._outlets[request.request_id] = outlet

    def refuse(self, request: Request) -> bool:
        """Whether a request that comes is the next chunk, or the end, of a session that has ended; it is then dealt
        with."""
        if request.request_id not in self._sessions:
            return False
        if request.resumable:
            self._answer(request, self._sessions[request.request_id])
        else:
            del self._sessions[request.request_id]
        return True

    def forget(self, request_id: str) -> None:
        """A client has given a request up: no more of it will come."""
        self._sessions.pop(request_id, None)

    def add_to(self, outputs: dict[int, EngineCoreOutputs], outlets: EngineOutlets) -> None:
        """Hand the answers over to the requests' outlets, where ranks send output themselves, or to a step's outputs,
        by client."""
        if not self._answers:
            return
        answers: dict[int, EngineCoreOutputs] = {}
        for client, answer in self._answers:
            answers.setdefault(client, EngineCoreOutputs()).outputs.append(answer)
        for client, left in outlets.forward(answers, self._outlets).items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(left.outputs)
        self._answers.clear()
        self._outlets.clear()

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        return [*self._sessions, *(answer.request_id for _, answer in self._answers)]
