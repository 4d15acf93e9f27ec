# SPDX-License-Identifier: Apache-2.0
"""The far end of a rank: does to its vLLM scheduler what it is told, and answers. Knows nothing of processes."""

from __future__ import annotations

import pickle
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from .cached_blocks import CacheRecorder
from .drafts import Speculation
from .grammars import RankGrammars, end_by_grammar, grammar_begins
from .interface import Allowed
from .rank_scheduler import AsyncRankScheduler, RankScheduler
from .stats import take_stats
from .wire import UNANSWERED, Answer, News, RequestState, Scheduled, SessionState, state_of, unpack

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    from .outlets import Outlets


class RankServer:
    """One rank's scheduler, and what its near end has asked to be told.

    Args:
        scheduler: the rank's.
        hasher: of requests' blocks; None without prefix caching.
        outlets: where output goes; None: back to the near end.
    """

    def __init__(
        self,
        scheduler: RankScheduler | AsyncRankScheduler,
        hasher: Callable[[Request], list[Any]] | None,
        outlets: Outlets | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.outlets = outlets
        self._hasher = hasher
        # Output tokens that the near end knows of each watched request.
        self._told: dict[str, int] = {}
        # Of watched sessions, what was told last.
        self._told_sessions: dict[str, tuple[int, ...]] = {}
        # Steps whose output has not come.
        self._steps: deque[tuple[int, SchedulerOutput]] = deque()
        self._serial = 0
        self._preempted: list[str] = []
        self._freed: list[str] = []
        self._turns: list[tuple[str, bool]] = []
        # Freed by what the message at hand has brought.
        self._gone: list[str] = []
        # Only where prefixes are found by the blocks of one group.
        one_group = len(scheduler.kv_cache_config.kv_cache_groups) == 1
        self._cache = CacheRecorder(scheduler.block_pool) if hasher is not None and one_group else None
        # Outputs to be sent once the near end has been answered.
        self._outputs: dict[int, EngineCoreOutputs] | None = None
        scheduler.on_preempt = self._preempted.append
        scheduler.on_free = self._note_freed
        scheduler.on_turn = lambda request_id, idle: self._turns.append((request_id, idle))

    def _note_freed(self, request_id: str) -> None:
        self._freed.append(request_id)
        self.do_unwatch(request_id)
        self._gone.append(request_id)

    def obey(self, message: bytes) -> bytes | None:
        """Do what a message says.

        Args:
            message: pickled; a list of (command, arguments).

        Returns:
            The answer, pickled, with the last command's result; None if there is to be none.

        Raises:
            Exception: what went wrong, where nobody waits for an answer that could say so: the process is to end.
        """
        result, commands = None, pickle.loads(message)
        answered = commands[-1][0] != UNANSWERED
        try:
            for name, args in commands:
                own = getattr(self, f"do_{name}", None)
                result = (own or getattr(self.scheduler, name))(*args)
        except Exception as error:
            if not answered:
                raise
            news = News(error=f"{error!r}\n{traceback.format_exc()}")
            return Answer(None, self.scheduler.view.pack(), {}, tuple(news)).encode()
        if not answered:
            return None
        return Answer(result, self.scheduler.view.pack(), self._states(), self._news()).encode()

    def after(self) -> None:
        """What need not be done before the answer."""
        if self._outputs is not None and self.outlets is not None:
            self.outlets.send(self._outputs)
        self._outputs = None
        if self._gone:
            if self.outlets is not None and self.outlets.foreign:
                self.outlets.foreign.difference_update(self._gone)
            self._gone.clear()

    def _news(self) -> tuple[Any, ...] | None:
        """The values of ``News``, if there is any."""
        cache = None if self._cache is None else self._cache.changes()
        outgrown = self.scheduler.take_outgrown()
        if not (self._preempted or self._freed or self._turns or outgrown or cache is not None):
            return None
        news = News(self._preempted[:], self._freed[:], self._turns[:], outgrown, None if cache is None else cache[:])
        for told in (self._preempted, self._freed, self._turns):
            told.clear()  # type: ignore[attr-defined]
        return tuple(news)

    def _states(self) -> dict[str, RequestState]:
        states = {}
        for request_id, told in self._told.items():
            request = self.scheduler.requests.get(request_id)
            if request is not None:
                states[request_id] = state_of(request, told, self._told_sessions)
                self._told[request_id] = request.num_output_tokens
        return states

    # -- commands ----------------------------------------------------------------------------------------------

    def do_facts(self) -> tuple[int, int, int, Any]:
        """What does not change of a rank; the answer also tells how it stands."""
        scheduler = self.scheduler
        events = scheduler.get_kv_event_publisher_config()
        return scheduler.num_blocks, scheduler.max_num_scheduled_tokens, scheduler.most_tokens, events

    def do_session(self, request_id: str) -> SessionState | None:
        session = self.scheduler.requests.get(request_id)
        return None if session is None else SessionState.of(session)

    def do_hand_over(self, request_id: str, keeper_id: str, first_block: int) -> tuple[int | None, tuple[Any, ...]]:
        """Returns where the request's grammar begins (``grammar_begins``), and the values of its ``Speculation``."""
        request = self.scheduler.requests[request_id]
        begins, speculation = grammar_begins(request), Speculation.of(request)
        self.scheduler.hand_over(request_id, keeper_id, first_block)
        if self.outlets is not None:
            self.outlets.foreign.discard(request_id)
        return begins, tuple(speculation)

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        return [*self._told, *self._told_sessions, *(self.outlets.foreign if self.outlets is not None else ())]

    def do_look(self) -> None:
        """Nothing is done; the answer tells how the rank stands."""

    def do_hash_from(self, none_hash: BlockHash) -> None:
        """What is hashed before a prompt's first block, as in the engine's process."""
        kv_cache_utils.NONE_HASH = none_hash

    def do_watch(self, request_id: str, told: int) -> None:
        self._told[request_id] = told

    def do_unwatch(self, request_id: str) -> None:
        self._told.pop(request_id, None)
        self._told_sessions.pop(request_id, None)

    def do_withdraw(self, member_id: str) -> list[Any]:
        """Returns its events: it goes back to the near end."""
        member = self.scheduler.requests[member_id]
        self.scheduler.withdraw(member_id)
        return member.events

    def do_enter(self, state: dict[str, Any], to_share: int, taken: int) -> None:
        request = self._take(state)
        if self.outlets is not None:
            self.outlets.foreign.discard(request.request_id)
        self.scheduler.enter(request, to_share, taken)

    def do_resume(self, request_id: str, num_computed_tokens: int, to_share: int) -> None:
        """Let a request wait here that the model runner knows from before its preemption."""
        request = self.scheduler.requests[request_id]
        request.num_computed_tokens = num_computed_tokens
        self.scheduler.enter(request, to_share)

    def do_add_chunk(self, state: dict[str, Any]) -> None:
        self.scheduler.add_chunk(self._take(state))

    def do_queue_chunk(self, request_id: str, state: dict[str, Any]) -> None:
        self.scheduler.queue_chunk(self.scheduler.requests[request_id], self._take(state))

    def do_arrive(self, state: dict[str, Any], first_block: int, foreign: bool) -> None:
        """Args as of the door; and whether the request's outlet is another rank's."""
        request = self._take(state)
        if self.outlets is not None:
            (self.outlets.foreign.add if foreign else self.outlets.foreign.discard)(request.request_id)
        fails = request.use_structured_output and not self._grammars.replay(request)
        self.scheduler.arrive(request, first_block, outlet=-1)
        if fails:
            end_by_grammar(self.scheduler, request)

    @property
    def _grammars(self) -> RankGrammars:
        manager = self.scheduler.structured_output_manager
        assert isinstance(manager, RankGrammars)
        return manager

    def _take(self, state: dict[str, Any]) -> Request:
        request = unpack(state, self._hasher)
        if request.structured_output_request is not None:
            try:
                self._grammars.grammar_init(request)
            except Exception as error:  # it ends this request, as one that comes while the grammar is compiled
                request.structured_output_request._grammar = error
        return request

    # -- a step ------------------------------------------------------------------------------------------------

    def do_schedule(self, throttle_prefills: bool, allowed: Allowed) -> tuple[Any, ...]:
        """Returns a ``Scheduled``, plain."""
        self.scheduler.allow(allowed)
        output = self.scheduler.schedule(throttle_prefills)
        self._serial += 1
        self._steps.append((self._serial, output))
        part = self.scheduler.part_of(output)
        scheduled = Scheduled(
            serial=self._serial,
            tokens=part.tokens,
            batch=part.batch[:],  # a plain tuple
            scheduled={name: part.scheduled[name] for name in self._told if name in part.scheduled},
            structured=part.structured,
            pending=part.pending,
            introduced=self.scheduler.introduced,
            # Now, for the output is changed later on, by structured output for one.
            payload=pickle.dumps(output, -1),
            prompts=(part.prompt_tokens, part.prompt_pairs),
        )
        return tuple(scheduled)

    def _step(self, serial: int) -> SchedulerOutput:
        return next(output for at, output in self._steps if at == serial)

    def do_bitmask(self, serial: int) -> bytes | None:
        bitmask = self.scheduler.get_grammar_bitmask(self._step(serial))
        return None if bitmask is None else pickle.dumps(bitmask, -1)

    def do_tell_drafts(self, serial: int, draft_token_ids: DraftTokenIds) -> None:
        self.scheduler.update_draft_token_ids_in_output(draft_token_ids, self._step(serial))

    def do_update(self, serial: int, output: bytes) -> Any:
        """Returns an ``Updated``, plain: of the outputs only those that are not sent from here."""
        at, part = self._steps.popleft()
        assert at == serial
        answer: ModelRunnerOutput = pickle.loads(output)
        updated = take_stats(self.scheduler.update_from_output(part, answer))
        if self.scheduler.speculates:
            updated = updated._replace(sharded=self.scheduler.take_sharded())
        if self.outlets is None or not self.outlets.connected:
            return tuple(updated)
        self._outputs = updated.outputs
        return tuple(updated._replace(outputs=self.outlets.keep_back(updated.outputs)))

    def do_set_weight_version(self, version: Any) -> None:
        assert self.outlets is not None
        self.outlets.set_weight_version(version)

    def do_connect(self, paths: list[str], engine_index: int) -> None:
        assert self.outlets is not None
        self.outlets.connect(paths, engine_index)

    def do_forward(self, outputs: dict[int, list[EngineCoreOutput]]) -> None:
        assert self.outlets is not None
        self.outlets.forward(outputs)

    def close(self) -> None:
        self.scheduler.shutdown()
        if self.outlets is not None:
            self.outlets.close()
