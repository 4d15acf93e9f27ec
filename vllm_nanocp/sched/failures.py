# SPDX-License-Identifier: Apache-2.0
"""Requests that the scheduler itself ends with an error, and what their clients are told.

vLLM's front-end expects one ending for each chunk of a streaming-input session, also for those that were queued or are
still to come; it would wait for ever for one that is left out. And a chunk that comes after the end must not begin a
session of its own, without all that was said before.
"""

from __future__ import annotations

from vllm.v1.engine import EngineCoreEvent, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request


class Failures:
    """Answers that wait for the next step's outputs."""

    def __init__(self) -> None:
        # By client.
        self._answers: list[tuple[int, EngineCoreOutput]] = []
        # Sessions that have ended here and whose input has not.
        self._sessions: set[str] = set()

    @property
    def pending(self) -> bool:
        return bool(self._answers)

    def note(self, request: Request) -> None:
        """A request has been ended with an error."""
        self._answer(request, request.take_events())
        if not request.resumable:
            return
        chunks = list(request.streaming_queue or ())
        for chunk in chunks:
            if chunk is not None:
                self._answer(request)
        if None not in chunks:
            self._sessions.add(request.request_id)

    def _answer(self, request: Request, events: list[EngineCoreEvent] | None = None) -> None:
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            events=events,
            trace_headers=request.trace_headers,
        )
        self._answers.append((request.client_index, answer))

    def refuse(self, request: Request) -> bool:
        """Whether a request that comes is the next chunk, or the end, of a session that has ended; it is then dealt
        with."""
        if request.request_id not in self._sessions:
            return False
        if request.resumable:
            self._answer(request)
        else:
            self._sessions.remove(request.request_id)
        return True

    def forget(self, request_id: str) -> None:
        """A client has given a request up: no more of it will come."""
        self._sessions.discard(request_id)

    def add_to(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Hand the answers over to a step's outputs, by client."""
        for client, answer in self._answers:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(answer)
        self._answers.clear()

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        return [*self._sessions, *(answer.request_id for _, answer in self._answers)]
