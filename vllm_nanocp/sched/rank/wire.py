# SPDX-License-Identifier: Apache-2.0
"""What goes between the scheduler over all ranks and the processes of the ranks' schedulers.

A message to a rank is a list of commands, in order; the last one is answered, unless it is ``UNANSWERED``. An answer
carries, beside the result, what the rank has to say by itself. What goes in each step goes as plain tuples, which are
decoded several times faster than objects. Touches vLLM 0.32's ``Request``, ``StructuredOutputRequest``.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.request import Request, RequestStatus, StreamingUpdate
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.utils import ConstantList

from .grammars import grammar_begins, note_grammar_begins

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

# A command that nobody waits for. If something goes wrong with it, the process ends, and so the engine.
UNANSWERED = "forward"
# Of a request, what is made anew at the other end.
_REMADE = (
    "_block_hasher",
    "_all_token_ids",
    "_output_token_ids",
    "all_token_ids",
    "output_token_ids",
    "structured_output_request",
)


# Of a watched request, what has changed or may have: what ``apply`` takes.
RequestState = tuple[int, int, int, int, int, int, list[int], "SessionState | None"]


@dataclass(slots=True)
class SessionState:
    """A session's tokens, how many of them are prompt, how many it may make; and of each chunk that is queued, whether
    it is the end of its input."""

    tokens: list[int]
    num_prompt: int
    max_tokens: int
    queue: list[bool]

    @classmethod
    def of(cls, session: Request) -> SessionState:
        queue = [chunk is None for chunk in session.streaming_queue or ()]
        return cls(list(session._all_token_ids), session.num_prompt_tokens, session.max_tokens, queue)

    @classmethod
    def unless(cls, session: Request, told: dict[str, tuple[int, ...]]) -> SessionState | None:
        """The state, if it is another one than was told last; ``told`` notes sizes that change with it, by id."""
        queue = session.streaming_queue or ()
        ends = sum(chunk is None for chunk in queue)
        sizes = session.num_tokens, session.num_prompt_tokens, session.max_tokens, len(queue), ends
        if told.get(session.request_id) == sizes:
            return None
        told[session.request_id] = sizes
        return cls.of(session)

    def apply(self, session: Request) -> None:
        """Bring a copy up to date. Of queued chunks it is only told that they are there."""
        goes_on = self.tokens[: session.num_tokens] == session._all_token_ids
        session._all_token_ids[:] = self.tokens
        session._output_token_ids[:] = self.tokens[self.num_prompt :]
        session.num_prompt_tokens = self.num_prompt
        session.max_tokens = self.max_tokens
        if not goes_on:
            del session.block_hashes[:]
        session.update_block_hashes()
        session.streaming_queue = deque(None if end else _A_CHUNK for end in self.queue)


_STATUS = {status.value: status for status in RequestStatus}
# Stands for a chunk that is elsewhere.
_A_CHUNK = StreamingUpdate(None, None, 0, 0.0, None)


class Answer(NamedTuple):
    """A rank's answer, as it comes out of its message.

    Attributes:
        result: of the last command.
        view: the rank in numbers, after it: ``RankView.pack``.
        states: of watched requests, by id.
        news: the values of ``News``; None: there is none.
    """

    result: Any
    view: tuple[Any, ...]
    states: dict[str, RequestState]
    news: tuple[Any, ...] | None

    def encode(self) -> bytes:
        return pickle.dumps(tuple(self), -1)

    @classmethod
    def decode(cls, message: bytes | memoryview) -> Answer:
        return cls._make(pickle.loads(message))


class News(NamedTuple):
    """What happens to single requests, and to the prefix cache; goes as a plain tuple.

    Attributes:
        preempted, freed: ids, in order.
        turns: sessions that have made their tokens after a preemption; and whether they are idle.
        outgrown: sessions that have no place any more, by id.
        cache: the values of ``Changes``, if the prefix cache has changed.
        error: what went wrong, if something did; the rank is not to be used any more.
    """

    preempted: Sequence[str] = ()
    freed: Sequence[str] = ()
    turns: Sequence[tuple[str, bool]] = ()
    outgrown: Sequence[str] = ()
    cache: tuple[bool, Sequence[BlockHash], Sequence[BlockHash]] | None = None
    error: str | None = None


class Scheduled(NamedTuple):
    """The result of a rank's ``schedule``, as a plain tuple, with its workers' part as bytes.

    Attributes:
        batch: the values of a ``Batch``.
        prompts: tokens and pairs, see ``Part``.
    """

    serial: int
    tokens: int
    batch: tuple[int, int, int]
    scheduled: dict[str, int]
    structured: bool
    pending: bool
    introduced: dict[str, list[int]]
    payload: bytes
    prompts: tuple[int, float]


def pack(request: Request) -> dict[str, Any]:
    """A request as plain data, to go on in another process: what it has told of itself (events) goes with it. Its
    grammar, if it has one, is compiled anew there, and takes the tokens again that it has taken here."""
    state = vars(request).copy()
    for name in _REMADE:
        state.pop(name, None)
    state["output"] = request._output_token_ids
    # A prompt that is embedded, or a session's that has grown, is not what is computed.
    plain = request.prompt_token_ids is not None and request.prompt_is_token_ids is None and not request.resumable
    state["all"] = None if plain else request._all_token_ids
    state["hashed"] = request._block_hasher is not None
    structured = request.structured_output_request
    state["grammar"] = None
    if structured is not None:
        state["grammar"] = structured.reasoning_ended, structured.reasoning_parser_kwargs, grammar_begins(request)
    request.events = []
    return state


def unpack(state: dict[str, Any], hasher: Callable[[Request], list[Any]] | None) -> Request:
    """The request that ``pack`` was given, without its grammar.

    Args:
        state: from ``pack``; it is used up.
        hasher: of its blocks, in this process.
    """
    output, all_tokens, hashed, grammar = (state.pop(name) for name in ("output", "all", "hashed", "grammar"))
    request = Request.__new__(Request)
    vars(request).update(state)
    request._output_token_ids = output
    request._all_token_ids = [*(request.prompt_token_ids or ()), *output] if all_tokens is None else all_tokens
    request.output_token_ids = ConstantList(request._output_token_ids)
    request.all_token_ids = ConstantList(request._all_token_ids)
    request._block_hasher = hasher if hashed else None
    request.structured_output_request = None
    if grammar is not None:
        structured = StructuredOutputRequest.from_sampling_params(request.sampling_params)
        assert structured is not None
        structured.reasoning_ended, structured.reasoning_parser_kwargs, begins = grammar
        note_grammar_begins(structured, begins)
        request.structured_output_request = structured
    return request


def state_of(request: Request, told: int, told_sessions: dict[str, tuple[int, ...]]) -> RequestState:
    """What to tell of a watched request.

    Args:
        request: watched.
        told: output tokens that are known at the other end.
        told_sessions: see ``SessionState.unless``.
    """
    is_session = request.resumable or request.streaming_queue is not None
    return (
        request.num_computed_tokens,
        request.num_in_flight_tokens,
        request.num_output_placeholders,
        request.num_stale_output_tokens,
        request.num_preemptions,
        request.status.value,
        [] if is_session else request._output_token_ids[told:],
        SessionState.unless(request, told_sessions) if is_session else None,
    )


def apply(
    request: Request,
    computed: int,
    in_flight: int,
    placeholders: int,
    stale: int,
    preemptions: int,
    status: int,
    tokens: list[int],
    session: SessionState | None,
) -> None:
    """Bring a copy of a request up to date.

    Args:
        request: the copy.
        computed, in_flight, placeholders, stale, preemptions: vLLM's counters.
        status: vLLM's, as a number: members of enumerations are slow to decode.
        tokens: output tokens since the last state that was told.
        session: of a session, whose tokens do not only grow at the end.
    """
    request.num_computed_tokens = computed
    request.num_in_flight_tokens = in_flight
    request.num_output_placeholders = placeholders
    request.num_stale_output_tokens = stale
    request.num_preemptions = preemptions
    request.status = _STATUS[status]
    if tokens:
        request.append_output_token_ids(tokens)
    elif session is not None:
        session.apply(request)
