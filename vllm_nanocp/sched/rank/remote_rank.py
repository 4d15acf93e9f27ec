# SPDX-License-Identifier: Apache-2.0
"""The near end of a rank whose scheduler is of another process.

Commands without a result are kept until one that has a result is given, and go with it. The numbers of the rank
(``view``) are those of the last answer, changed by what was done since: never to more room than there is, nor to less
work.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vllm.v1.core import kv_cache_utils

from ...errors import NanoCPError
from ...placement import cdiv
from ...plan import Batch
from ...step_messages import PackedOutput
from .cached_blocks import CachedBlocks, Changes, Whereabouts
from .drafts import Speculation
from .grammars import note_grammar_begins
from .interface import Allowed, Decoding, Part, do_nothing
from .rank_view import RankView
from .sessions import keep_chunk
from .stats import Updated
from .wire import UNANSWERED, News, Scheduled, SessionState, apply, pack

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request, RequestStatus


class Channel(Protocol):
    """A way to a ``RankServer`` and back, in order."""

    def send(self, message: bytes) -> None: ...

    def receive(self) -> bytes | memoryview:
        """The next answer, to be used before the next one; raises ``NanoCPError`` if there is nobody any more."""
        ...

    def close(self) -> None: ...


class RemoteRank:
    """A ``Rank``; see there.

    Args:
        number: the rank's.
        channel: to the server.
        block_size: tokens a block holds.
        where: the same for all ranks; kept up to date for this one here.
    """

    on_preempt: Callable[[str], None]
    on_free: Callable[[str], None]
    on_turn: Callable[[str, bool], None]
    view: RankView
    most_tokens: int

    def __init__(self, number: int, channel: Channel, block_size: int, where: Whereabouts) -> None:
        self.on_change: Callable[[], object] = do_nothing
        self.number = number
        self.channel = channel
        self.block_size = block_size
        self.introduced: dict[str, list[int]] = {}
        self._commands: list[tuple[str, tuple[Any, ...]]] = []
        # Requests that the rank's scheduler knows by their own ids.
        self._known: set[str] = set()
        # Copies that are kept up to date, and for how many reasons.
        self._watched: dict[str, tuple[Request, int]] = {}
        # Copies of the sessions here.
        self._sessions: dict[str, Request] = {}
        self._outgrown: list[str] = []
        # Where blocks are cached, on all ranks.
        self.where = where
        self._cached = CachedBlocks(where, number)
        self._none_hash: BlockHash | None = None
        # What an answer is to come to; and the answer, if it has come.
        self._asked = ""
        self._frame: bytes | memoryview | None = None
        facts = self._call("facts")
        self.num_blocks, self.max_num_scheduled_tokens, self.most_tokens, self._kv_event_config = facts

    # -- messages ----------------------------------------------------------------------------------------------

    def _tell(self, name: str, *args: Any) -> None:
        self._commands.append((name, args))

    def _ask(self, name: str, *args: Any) -> None:
        # Nobody asks twice, but after an interrupt: then an answer may be on its way still, or half read.
        if self._asked:
            raise NanoCPError(
                f"nanocp: the engine was interrupted, or has failed, in the middle of {self._asked!r}: it and rank "
                f"{self.number} do not know the same any more; start a new engine"
            )
        self._asked = name
        self._commands.append((name, args))
        self.channel.send(pickle.dumps(self._commands, -1))
        self._commands = []

    def wait(self) -> None:
        """Until the answer is there.

        Who waits for the rank that was asked last, and then for the others, sleeps once, and not once a rank; and what
        is then done for one after another is done from warm caches.
        """
        self._frame = self.channel.receive()

    def _hear(self) -> Any:
        frame, self._frame = self._frame, None
        answer = pickle.loads(self.channel.receive() if frame is None else frame)
        asked = self._asked
        try:
            self._asked = ""
            return self._take(*answer)
        except BaseException:  # an interrupt, too
            self._asked = asked
            raise

    def _take(self, result: Any, view: Any, states: dict[str, Any], news: Any) -> Any:
        self.view = RankView(*view)
        self.on_change()
        for request_id, state in states.items():
            watched = self._watched.get(request_id)
            if watched is not None:
                apply(watched[0], *state)
        if news is not None:
            self._take_news(News._make(news))
        return result

    def _take_news(self, news: News) -> None:
        if news.error is not None:
            raise NanoCPError(f"nanocp: a rank's scheduler has failed: {news.error}")
        self._outgrown += news.outgrown
        if news.cache is not None:
            self._cached.follow(Changes._make(news.cache))
        for request_id in news.preempted:
            self.on_preempt(request_id)
        for request_id in news.freed:
            self._known.discard(request_id)
            self._watched.pop(request_id, None)
            self._sessions.pop(request_id, None)
            self.on_free(request_id)
        for request_id, idle in news.turns:
            self.on_turn(request_id, idle)

    def _call(self, name: str, *args: Any) -> Any:
        self._ask(name, *args)
        return self._hear()

    def refresh(self) -> None:
        """Have all that was told done, and the numbers taken anew."""
        self._call("look")

    def _forget(self, request_id: str) -> None:
        """The rank's scheduler knows a request no more, and its model runner is to be told."""
        self._known.discard(request_id)
        if self._watched.pop(request_id, None) is not None:
            self._tell("unwatch", request_id)
        self.view.finished = True

    # -- a step ------------------------------------------------------------------------------------------------

    def begin_schedule(self, throttle_prefills: bool, allowed: Allowed) -> None:
        self._ask("schedule", throttle_prefills, allowed)

    def end_schedule(self) -> Part:
        step = Scheduled._make(self._hear())
        self.introduced = step.introduced
        batch = Batch._make(step.batch)
        facts = (step.tokens, batch, step.scheduled, step.structured, step.pending, step.payload, step.serial)
        return Part(*facts, *step.prompts)

    def begin_update(self, part: Part, output: Any) -> None:
        message = output.data if isinstance(output, PackedOutput) else pickle.dumps(output, -1)
        self._ask("update", part.serial, message)

    def end_update(self) -> Updated:
        return Updated._make(self._hear())

    def begin_bitmask(self, part: Part) -> None:
        self._ask("bitmask", part.serial)

    def end_bitmask(self) -> bytes | None:
        bitmask: bytes | None = self._hear()
        return bitmask

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        self._tell("update_draft_token_ids", draft_token_ids)

    def tell_drafts(self, part: Part, draft_token_ids: Any) -> None:
        self._tell("tell_drafts", part.serial, draft_token_ids)

    # -- requests ----------------------------------------------------------------------------------------------

    def enter(self, request: Request, to_share: int = 0, taken: int = 0) -> None:
        request_id = request.request_id
        needed = cdiv(request.num_tokens, self.block_size)
        if request_id in self._known:
            self._tell("resume", request_id, request.num_computed_tokens, to_share)
        else:
            self._known.add(request_id)
            self._tell_none_hash()
            self._tell("enter", pack(request), to_share, taken)
            if request.streaming_queue is not None:
                self._sessions[request_id] = request
                request.streaming_queue = deque()
        # The blocks of one that comes with a part computed are there already.
        held = needed if request.num_computed_tokens else 0
        if taken and self.view.free_blocks >= needed:
            self.view.free_blocks -= needed
            held = needed
        self.view.note_entered(request, held, to_share, self.block_size, taken)
        self.on_change()

    def _tell_none_hash(self) -> None:
        """vLLM chooses it when the schedulers are there already, and may draw it."""
        none_hash = getattr(kv_cache_utils, "NONE_HASH", None)
        if none_hash is not None and none_hash != self._none_hash:
            self._none_hash = none_hash
            self._tell("hash_from", none_hash)

    def add_chunk(self, chunk: Request) -> None:
        self._call("add_chunk", pack(chunk))

    def queue_chunk(self, session: Request, chunk: Request) -> None:
        self._tell("queue_chunk", session.request_id, pack(chunk))
        keep_chunk(session, chunk)

    def requeue(self, request_id: str) -> None:
        self._call("requeue", request_id)

    def end(self, request_ids: Iterable[str], status: RequestStatus) -> None:
        self._call("end", list(request_ids), status)

    def take_outgrown(self) -> list[str]:
        if not self._outgrown:
            return []
        outgrown, self._outgrown = self._outgrown, []
        for request_id in outgrown:  # chunks may have come since
            state: SessionState | None = self._call("session", request_id)
            if state is not None and request_id in self._sessions:
                state.apply(self._sessions[request_id])
        return outgrown

    def take_from_queues(self, request_id: str) -> None:
        self._call("take_from_queues", request_id)

    def preempt_running(self) -> None:
        self._call("preempt_running")

    def give_way(self) -> None:
        self._call("give_way")

    def all_give_way(self) -> None:
        self._call("all_give_way")

    def decoding(self) -> list[Decoding]:
        found: list[Decoding] = self._call("decoding")
        return found

    def watch(self, request: Request) -> None:
        known = self._watched.get(request.request_id)
        self._watched[request.request_id] = request, 1 if known is None else known[1] + 1
        if known is None or known[0] is not request:
            self._tell("watch", request.request_id, request.num_output_tokens)

    def unwatch(self, request_id: str) -> None:
        known = self._watched.get(request_id)
        if known is None:
            return
        if known[1] > 1:
            self._watched[request_id] = known[0], known[1] - 1
            return
        del self._watched[request_id]
        self._tell("unwatch", request_id)

    def note_finished(self, request_id: str, client_index: int) -> None:
        self._tell("note_finished", request_id, client_index)

    def note_backlog(self, backlog: bool) -> None:
        if backlog and not self.view.capacity_bound:
            self.view.capacity_bound = True
            self._tell("note_backlog", backlog)

    # -- shards and members ------------------------------------------------------------------------------------

    def cached_run(self, hashes: Sequence[BlockHash], first_block: int) -> tuple[int, int]:
        length = self._cached.run(hashes, first_block)
        if not length:
            return 0, 0
        length, held = self._call("cached_run", list(hashes[first_block : first_block + length]), 0)
        return length, held

    def adopt_cached(self, member_id: str, hashes: Sequence[BlockHash]) -> int:
        adopted: int = self._call("adopt_cached", member_id, list(hashes))
        return adopted

    def allocate(self, member_id: str, num_blocks: int) -> None:
        self._call("allocate", member_id, num_blocks)

    def unfold(self, member_id: str, first_block: int) -> None:
        self._tell("unfold", member_id, first_block)

    def shard_blocks(self, member_id: str) -> list[int]:
        blocks: list[int] = self._call("shard_blocks", member_id)
        return blocks

    def close_shard(self, member_id: str) -> None:
        self._tell("close_shard", member_id)

    def park(self, member_id: str, first_block: int) -> None:
        self._tell("park", member_id, first_block)
        self.view.running -= 1
        self.view.unfinished -= 1
        self.on_change()
        self._forget(member_id)

    def withdraw(self, member_id: str) -> list[Any]:
        events: list[Any] = self._call("withdraw", member_id)
        self._forget(member_id)
        return events

    def record_prefix_hits(self, num_tokens: int, num_hits: int, preempted: bool) -> None:
        self._tell("record_prefix_hits", num_tokens, num_hits, preempted)

    # -- homes that move ---------------------------------------------------------------------------------------

    def leave(self, request_id: str) -> None:
        self._call("leave", request_id)

    def stay(self, request_id: str) -> None:
        self._call("stay", request_id)

    def expect(self, request_id: str, adapter: int | None) -> None:
        self._call("expect", request_id, adapter)

    def expect_no_more(self, request_id: str) -> None:
        self._tell("expect_no_more", request_id)
        self.view.coming -= 1
        self.view.free_blocks += 1
        self.view.slots += 1
        self.on_change()

    def hand_over(self, request_id: str, keeper_id: str, first_block: int) -> None:
        begins, speculation = self._call("hand_over", request_id, keeper_id, first_block)
        request = self._watched[request_id][0]
        Speculation._make(speculation).apply(request)
        structured = request.structured_output_request
        if structured is not None:
            note_grammar_begins(structured, begins)
        self._forget(request_id)

    def arrive(self, request: Request, first_block: int, outlet: int) -> None:
        self._known.add(request.request_id)
        if request.num_output_tokens:
            request.prefill_stats = None  # it went with the first token
        self._call("arrive", pack(request), first_block, outlet != self.number)
        request.spec_token_ids = []  # they are verified there

    # -- output ------------------------------------------------------------------------------------------------

    def connect(self, paths: list[str], engine_index: int, weight_version: Any) -> None:
        """From now on output goes straight to the API servers; only what ``Outlets.keep_back`` keeps comes here."""
        self._tell("set_weight_version", weight_version)
        self._call("connect", paths, engine_index)

    def set_weight_version(self, version: Any) -> None:
        self._tell("set_weight_version", version)

    def forward(self, outputs: dict[int, list[EngineCoreOutput]]) -> None:
        """Send what other ranks have made for requests whose outlet is here. At once: there may be no next step. But
        nobody waits until it is done."""
        self._ask(UNANSWERED, outputs)
        self._asked = ""

    # -- what EngineCore asks ----------------------------------------------------------------------------------

    def set_pause_state(self, pause_state: PauseState) -> None:
        self._call("set_pause_state", pause_state)

    def reset_prefix_cache(self, reset_running_requests: bool, reset_connector: bool) -> bool:
        done: bool = self._call("reset_prefix_cache", reset_running_requests, reset_connector)
        return done

    def reset_encoder_cache(self) -> None:
        self._call("reset_encoder_cache")

    def make_stats(self) -> SchedulerStats | None:
        stats: SchedulerStats | None = self._call("make_stats")
        return stats

    def get_kv_event_publisher_config(self) -> Any:
        return self._kv_event_config

    def shutdown(self) -> None:
        self.channel.close()
