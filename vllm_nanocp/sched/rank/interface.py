# SPDX-License-Identifier: Apache-2.0
"""A rank as the composition over all ranks knows it: what may be asked of its vLLM scheduler, wherever that runs.

Two things are ranks: vLLM's scheduler itself with its doors (``rank_scheduler.py``), and the near end of one that runs
in a process of its own (``remote_rank.py``). Ids and plain data go in and out. What a rank has to say by itself
(requests that it has preempted or freed) comes through the three callbacks, at the latest when the call that brought
it about returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...plan import Batch

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request, RequestStatus

    from .rank_view import RankView
    from .stats import Updated


class Decoding(NamedTuple):
    """A request that decodes and may leave its rank: its last block is full, or it is decoded with drafts, which seldom
    end with a block.

    Attributes:
        request_id: its id.
        computed: tokens whose KV is there or in flight; with drafts those that are there for certain.
        made: output tokens, those in flight included.
        known: tokens that have come back.
        missing: blocks that it has yet to take for the next step.
        rest: blocks beyond its full ones, which come free once it has left.
        flying: whether it has tokens in flight, and so cannot leave with this step.
    """

    request_id: str
    computed: int
    made: int
    known: int
    missing: int
    rest: int
    flying: bool


def batch_of(part: SchedulerOutput) -> Batch:
    """A rank's batch as its model runner will see it."""
    num_reqs, num_tokens = len(part.num_scheduled_tokens), part.total_num_scheduled_tokens
    drafts = sum(map(len, part.scheduled_spec_decode_tokens.values()))
    # One token each beside its drafts; a request's first token is no decode, though it may be its only one.
    decode = (
        num_tokens == num_reqs + drafts
        and all(part.scheduled_cached_reqs.num_computed_tokens)
        and all(request.num_computed_tokens for request in part.scheduled_new_reqs)
    )
    most = max(part.num_scheduled_tokens.values(), default=0) if drafts else 1
    return Batch(num_reqs, num_tokens, most if decode and most * num_reqs == num_tokens else 0)


@dataclass(slots=True)
class Part:
    """What one rank's scheduler has scheduled.

    Attributes:
        tokens: in all.
        batch: as the rank's model runner will see it, if there are tokens.
        scheduled: tokens by request; of watched ones at least.
        structured: whether there are requests with structured output.
        pending: whether their bitmask waits for tokens in flight.
        payload: for the rank's workers: vLLM's output, or the same pickled.
        serial: by which the rank knows it, if it is elsewhere.
        prompt_tokens: of these, of prompts.
        prompt_pairs: of a query of a prompt and a key.
    """

    tokens: int
    batch: Batch
    scheduled: Mapping[str, int]
    structured: bool
    pending: bool
    payload: SchedulerOutput | bytes = field(repr=False)
    serial: int = 0
    prompt_tokens: int = 0
    prompt_pairs: float = 0.0

    @classmethod
    def of(cls, output: SchedulerOutput) -> Part:
        return cls(
            tokens=output.total_num_scheduled_tokens,
            batch=batch_of(output),
            scheduled=output.num_scheduled_tokens,
            structured=output.has_structured_output_requests,
            pending=output.pending_structured_output_tokens,
            payload=output,
        )


def do_nothing() -> None:
    """Where nobody has asked to be called."""


# What may be computed of prompts in a step: tokens, and pairs of a query and a key. None: as much as fits.
Allowed = tuple[int, float] | None


class Rank(Protocol):
    """See the module. The doors' own docstrings are those of ``RankDoors``."""

    on_preempt: Callable[[str], None]
    on_free: Callable[[str], None]
    on_turn: Callable[[str, bool], None]
    # The numbers in ``view`` are others now, or may be.
    on_change: Callable[[], object]
    # Requests that the model runner meets with this step's output, and that have made tokens elsewhere: those.
    introduced: dict[str, list[int]]
    # The longest request that can ever have room here.
    most_tokens: int

    @property
    def view(self) -> RankView: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def max_num_scheduled_tokens(self) -> int: ...

    def refresh(self) -> None: ...

    # A step. What begins on all ranks runs at once if they are elsewhere. To wait before it is ended is optional.
    def wait(self) -> None: ...
    def begin_schedule(self, throttle_prefills: bool, allowed: Allowed) -> None: ...
    def end_schedule(self) -> Part: ...
    def begin_update(self, part: Part, output: Any) -> None: ...
    def end_update(self) -> Updated: ...
    def begin_bitmask(self, part: Part) -> None: ...
    def end_bitmask(self) -> Any: ...
    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None: ...
    def tell_drafts(self, part: Part, draft_token_ids: DraftTokenIds) -> None: ...

    # Requests that are here.
    def enter(self, request: Request, to_share: int = 0, taken: int = 0) -> None: ...
    def add_chunk(self, chunk: Request) -> None: ...
    def queue_chunk(self, session: Request, chunk: Request) -> None: ...
    def requeue(self, request_id: str) -> None: ...
    def end(self, request_ids: Iterable[str], status: RequestStatus) -> None: ...
    def take_outgrown(self) -> list[str]: ...
    def take_from_queues(self, request_id: str) -> None: ...
    def preempt_running(self) -> None: ...
    def give_way(self) -> None: ...
    def all_give_way(self) -> None: ...
    def decoding(self) -> list[Decoding]: ...
    def watch(self, request: Request) -> None: ...
    def unwatch(self, request_id: str) -> None: ...
    def note_finished(self, request_id: str, client_index: int) -> None: ...
    def note_backlog(self, backlog: bool) -> None: ...

    # Shards and members.
    def cached_run(self, hashes: Sequence[BlockHash], first_block: int) -> tuple[int, int]: ...
    def adopt_cached(self, member_id: str, hashes: Sequence[BlockHash]) -> int: ...
    def allocate(self, member_id: str, num_blocks: int) -> None: ...
    def unfold(self, member_id: str, first_block: int) -> None: ...
    def shard_blocks(self, member_id: str) -> list[int]: ...
    def close_shard(self, member_id: str) -> None: ...
    def park(self, member_id: str, first_block: int) -> None: ...
    def withdraw(self, member_id: str) -> list[Any]: ...
    def record_prefix_hits(self, num_tokens: int, num_hits: int, preempted: bool) -> None: ...

    # Homes that move.
    def leave(self, request_id: str) -> None: ...
    def stay(self, request_id: str) -> None: ...
    def expect(self, request_id: str, adapter: int | None) -> None: ...
    def expect_no_more(self, request_id: str) -> None: ...
    def hand_over(self, request_id: str, keeper_id: str, first_block: int) -> None: ...
    def arrive(self, request: Request, first_block: int, outlet: int) -> None: ...

    # What EngineCore asks.
    def set_pause_state(self, pause_state: PauseState) -> None: ...
    def reset_prefix_cache(self, reset_running_requests: bool, reset_connector: bool) -> bool: ...
    def reset_encoder_cache(self) -> None: ...
    def make_stats(self) -> SchedulerStats | None: ...
    def get_kv_event_publisher_config(self) -> Any: ...
    def shutdown(self) -> None: ...
