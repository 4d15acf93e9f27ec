# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions: requests whose prompt grows by a chunk each time they have made their tokens.

vLLM's scheduler queues chunks at the request itself and goes on with the next one where the last ended. Three things
are missing for several ranks: a session may wait for a rank when a chunk comes, its last tokens may come when it has
just been preempted (vLLM 0.32 then drops its prompt and never schedules it again; 0.33 queues it at its rank, where no
room is kept for it), and it may outgrow its rank. Touches vLLM's ``Scheduler``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

    _Base = Scheduler
else:
    _Base = object


def is_idle(request: Request) -> bool:
    """Whether a session has made its tokens and waits for its client's next chunk."""
    return request.status == RequestStatus.WAITING_FOR_STREAMING_REQ


def begin(request: Request) -> None:
    """A request has come; chunks of a session may come before any rank knows it."""
    if request.resumable:
        request.streaming_queue = deque()


def keep_chunk(session: Request, chunk: Request) -> None:
    """Keep the next chunk of a session that no rank knows yet, or the end of its input, as vLLM's scheduler does."""
    assert session.streaming_queue is not None, "duplicate request id"
    session.streaming_queue.append(StreamingUpdate.from_request(chunk))


class SessionDoors(_Base):
    """Mixed into vLLM's scheduler: sessions in every state that several ranks bring about."""

    # A session of this id has made its tokens after a preemption, and is idle, or has its next chunk. It is in none of
    # the rank's queues.
    on_turn: Callable[[str, bool], None]
    # The longest request that can ever have room here.
    most_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Sessions whose last chunk, with the tokens it asks for, has no place here.
        self.outgrown: list[Request] = []
        # Sessions that have made their tokens after a preemption, in the outputs at hand.
        self._preempted_turns: list[Request] = []

    def _handle_stopped_request(self, request: Request) -> bool:
        preempted = request.num_computed_tokens == 0
        if self.num_spec_tokens:
            # A stop among accepted drafts: what was computed of those behind it is not the session's. With async
            # scheduling vLLM subtracts all that is yet to come, those included.
            most = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, most)
        finished = super()._handle_stopped_request(request)
        if preempted and not finished:
            self._preempted_turns.append(request)
        return finished

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Go on with a chunk. All tokens are kept but the last that was sampled, also by one that holds no KV."""
        computed = session.num_computed_tokens
        session.num_computed_tokens = session.num_tokens - 1
        super()._update_request_as_session(session, update)
        session.num_computed_tokens = computed
        if self.use_v2_model_runner:
            # While it waits with its KV, vLLM does not count its slot there. It comes again as a new one.
            self.reset_preempted_req_ids.add(session.request_id)
        if not self._has_place(session, update):
            self.outgrown.append(session)

    def queue_chunk(self, session: Request, chunk: Request) -> None:
        """Keep the next chunk of a session that this rank knows and that waits in the queue of all ranks."""
        keep_chunk(session, chunk)

    def take_outgrown(self) -> list[str]:
        """Sessions that have come to have no place here, and have not ended since."""
        if not self.outgrown:
            return []
        outgrown, self.outgrown = self.outgrown, []
        return [session.request_id for session in outgrown if not session.is_finished()]

    def _has_place(self, session: Request, update: StreamingUpdate) -> bool:
        """Whether this rank can ever hold a session with its next tokens; ``max_tokens`` is cut to what fits if the
        chunk alone asks for all there is, as it does when its client leaves ``max_tokens`` out."""
        total = session.num_tokens
        if total >= self.max_model_len:
            return False  # vLLM takes no longer prompt
        if min(total + session.max_tokens, self.max_model_len) <= self.most_tokens:
            return True
        if total >= self.most_tokens or len(update.prompt_token_ids or ()) + update.max_tokens < self.most_tokens:
            return False
        session.max_tokens = self.most_tokens - total
        return True

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        for session in self._preempted_turns:
            if session.request_id in self.requests:
                self.take_from_queues(session.request_id)  # where 0.33 has put it; 0.32 has lost it
                self.on_turn(session.request_id, is_idle(session))
        self._preempted_turns.clear()
        return outputs

    # -- sessions that do not run, and their KV -----------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether something runs here or waits for nothing but room."""
        return bool(self.running) or next(self._ready(), None) is not None

    def _ready(self) -> Iterator[Request]:
        queued = chain(self.kv_holding_waiting, self.waiting)
        return (request for request in queued if not self._is_blocked_waiting_status(request.status))

    def give_way_if_stuck(self) -> None:
        """After a step in which nothing ran and nothing could start: see ``give_way``."""
        first = next(self._ready(), None)
        if first is not None and not first.num_stale_output_tokens and self._pause_state == PauseState.UNPAUSED:
            self.give_way()

    def give_way(self) -> None:
        """Let a session that does not run give up its KV, which is computed again with its next chunk.

        vLLM preempts only what runs. Sessions that each wait for a block which others of them hold would wait for ever,
        and so would those that need what idle ones hold. Idle ones go first. The first of those that wait stays, unless
        there are none but members behind it, which have all their blocks.
        """
        holders = self._holders()
        first = next(self._ready(), None)
        others = [session for session in holders if is_idle(session)] or [s for s in holders if s is not first]
        if others:
            self._give_up(others[-1])
        elif holders and len(self.kv_holding_waiting) > 1:
            self._give_up(holders[0])

    def all_give_way(self) -> None:
        """Let all that do not run give up their KV, which is of no use any more."""
        for session in self._holders():
            self._give_up(session)

    def _holders(self) -> list[Request]:
        return [request for request in self.kv_holding_waiting if request.resumable]

    def _give_up(self, session: Request) -> None:
        self.kv_holding_waiting.remove_requests([session])
        self.kv_cache_manager.free(session)
        self.encoder_cache_manager.free(session)
        session.num_computed_tokens = 0
        self.reset_preempted_req_ids.add(session.request_id)  # frees its slot in the model runner
        self._enqueue_waiting_request(session)
        self.refresh()

    def refresh(self) -> None:
        """What was known of this rank has changed."""

    def take_from_queues(self, request_id: str) -> None:
        """Out of the waiting queues; ``RankDoors`` knows them."""
        raise NotImplementedError
