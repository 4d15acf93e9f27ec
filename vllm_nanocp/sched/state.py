# SPDX-License-Identifier: Apache-2.0
"""What the parts of the composed scheduler may see of it. None of them imports the scheduler: it is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request, RequestStatus

    from ..config import NanoCPConfig
    from ..metrics.collector import Collector
    from ..placement import RankLoad
    from ..placement.cost import CostModel, StepLoad
    from ..placement.visits import Visits
    from .failures import Failures
    from .placer import Placer
    from .rank.interface import Rank
    from .shard_lifecycle import Members
    from .sharded_request import ShardedRequest
    from .shared_prefix import SharedPrefixes


class Moves(Protocol):
    """Of ``home_moves.Mover``, what others read."""

    moves: bool
    num_moves: int
    num_spills: int
    leaving: dict[str, int]
    num_turns: int
    last_work: list[StepLoad]
    model: CostModel

    def loads(self) -> list[RankLoad]: ...


class Room(Protocol):
    """Of ``graph_room.GraphRoom``, what others read."""

    @property
    def freed(self) -> int: ...
    def near(self, more: int) -> Visits | None: ...


class SchedulerState(Protocol):
    """Read only; what is in it may be changed by whose duty that is.

    Attributes:
        config: the package's settings.
        block_size: tokens a block holds.
        ranks: in the order of their numbers.
        requests: all that have not ended, by id.
        rank_of: the rank whose scheduler and model runner know a request by its own id.
        sharded: requests with a shard map, by id.
        members: opens, passes on and closes their shards.
        waiting: requests that no rank has; ``unplaced`` has the same by id.
        by_priority: whether they wait by priority, not by arrival.
        num_steps: so far.
        num_sharded_steps: those with visits.
        num_tokens: computed so far.
        num_preemptions: so far; ``num_avoidable_preemptions`` of them while another rank had room.
        finished_shares: KV tokens that each rank held of the last sharded requests that have ended.
        pause_state: vLLM's.
    """

    @property
    def config(self) -> NanoCPConfig: ...
    @property
    def block_size(self) -> int: ...
    @property
    def ranks(self) -> Sequence[Rank]: ...
    @property
    def requests(self) -> dict[str, Request]: ...
    @property
    def rank_of(self) -> dict[str, int]: ...
    @property
    def sharded(self) -> dict[str, ShardedRequest]: ...
    @property
    def members(self) -> Members: ...
    @property
    def waiting(self) -> RequestQueue: ...
    @property
    def unplaced(self) -> dict[str, Request]: ...
    @property
    def by_priority(self) -> bool: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_sharded_steps(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_avoidable_preemptions(self) -> int: ...
    @property
    def finished_shares(self) -> Mapping[str, list[int]]: ...
    @property
    def pause_state(self) -> PauseState: ...

    # Its parts.
    @property
    def collector(self) -> Collector: ...
    @property
    def failures(self) -> Failures: ...
    @property
    def mover(self) -> Moves: ...
    @property
    def graph_room(self) -> Room: ...
    @property
    def placer(self) -> Placer: ...
    @property
    def prefixes(self) -> SharedPrefixes: ...

    def has_requests(self) -> bool: ...
    def free_blocks(self) -> list[int]: ...
    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Any]: ...
