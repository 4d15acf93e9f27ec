# SPDX-License-Identifier: Apache-2.0
"""A sharded request: its members at the ranks that hold a shard, and which of them computes now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from ..placement import Run, ShardMap
from ..plan import Holder, PlanRow, keeper_id


def can_shard(request: Request | EngineCoreRequest) -> bool:
    """Whether a request may be spread over ranks.

    Not: prompt embeddings and multi-modal inputs (their positions would have to be cut), pooling, streaming input
    (its prompt grows), and prompt logprobs (vLLM's runner collects them on one rank).
    """
    params = request.sampling_params
    return (
        params is not None
        and params.prompt_logprobs is None
        and params.prompt_logprob_token_ids is None
        and request.prompt_embeds is None
        and request.prompt_token_ids is not None
        and not request.mm_features
        and not request.resumable
        and request.pooling_params is None
    )


@dataclass(eq=False, slots=True)
class Keeper:
    """A member that keeps blocks, its own by this id, and does not compute: not yet, or no more."""

    request_id: str


def make_member(request: Request, member_id: str, block_size: int, end_block: int) -> Request:
    """A request that computes, for another, KV up to block ``end_block`` - 1, and samples nothing useful.

    It ends where its run ends, so that vLLM's scheduler stops there by itself; the token that the model runner
    samples then belongs to nobody and is dropped, because the member has left by the time it comes.
    """
    member = Request(
        request_id=member_id,
        prompt_token_ids=list(request.all_token_ids[: end_block * block_size]),
        sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
        pooling_params=None,
        client_index=request.client_index,
        arrival_time=request.arrival_time,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )
    member.block_hashes = request.block_hashes[:end_block]
    # Its blocks are settled: the rank's scheduler must not look for them in the prefix cache again.
    member.skip_reading_prefix_cache = True
    member.prefill_stats = None
    return member


@dataclass(eq=False)
class ShardedRequest:
    """State of one request that is spread over ranks.

    Attributes:
        request: the request itself; it is the home's member.
        shard_map: where its blocks are.
        members: one a run; the last is ``request``. Others are requests only while they compute.
        active: index of the member that computes now. Members before it are parked, later ones have not entered.
        started: whether any member was scheduled.
        open_shards: for each rank that holds finished runs, the id by which the workers know their blocks, all of
            them as one shard, and the tokens they hold; changed by ``open_shard``.
        run: that is computed now.
        rank: that computes now.
        at_home: whether that is the home.
        local_start: position of the first token of the run that is computed now.
        member: that computes now, once it was woken.
    """

    request: Request
    shard_map: ShardMap
    members: list[Request | Keeper]
    active: int = 0
    started: bool = False
    open_shards: dict[int, tuple[str, int]] = field(default_factory=dict)
    # What follows from these is looked at in each step, and changes seldom.
    run: Run = field(init=False)
    rank: int = field(init=False)
    at_home: bool = field(init=False)
    local_start: int = field(init=False)
    member: Request = field(init=False)
    _holders: tuple[Holder, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self._stand()

    def _stand(self) -> None:
        """The active member is another one, or its run is."""
        self.run = self.shard_map.runs[self.active]
        self.rank = self.run.rank
        self.at_home = self.active == len(self.members) - 1
        self.local_start = self.shard_map.first_token(self.active)
        member = self.members[self.active]
        if isinstance(member, Request):
            self.member = member

    @classmethod
    def create(cls, request: Request, shard_map: ShardMap, serial: int) -> ShardedRequest:
        """Members for each run. ``serial`` makes their ids unique among all a request ever had."""
        keepers = [Keeper(keeper_id(request.request_id, serial, i)) for i in range(len(shard_map.runs) - 1)]
        return cls(request, shard_map, [*keepers, request])

    def wake(self, num_computed_tokens: int) -> None:
        """Let the active member compute, from this token of the request on."""
        keeper = self.members[self.active]
        if isinstance(keeper, Keeper):
            member = make_member(self.request, keeper.request_id, self.shard_map.block_size, self.run.end_block)
            self.members[self.active] = self.member = member
        self.member.num_computed_tokens = num_computed_tokens

    def park(self) -> None:
        """The active member has computed its run; the next one is to."""
        self.members[self.active] = Keeper(self.member.request_id)
        self.go_on()

    def go_on(self) -> None:
        """The next member is the active one."""
        self.active += 1
        self._stand()

    def open_shard(self, rank: int, shard: str, tokens: int) -> None:
        """A rank's finished runs are known by this id now."""
        self.open_shards[rank] = shard, tokens
        self._holders = tuple(Holder(rank, shard, tokens) for rank, (shard, tokens) in self.open_shards.items())

    @property
    def num_computed_tokens(self) -> int:
        """Tokens from the request's first on whose KV is there, or is in a step that was scheduled."""
        return min(self.member.num_computed_tokens, self.request.num_tokens)

    def runs_to_come(self) -> Iterator[tuple[Run, int]]:
        """Runs that are computed after the one at hand, and the tokens of each."""
        for index, run in enumerate(self.shard_map.runs[self.active + 1 :], self.active + 1):
            end = self.shard_map.end_token(index, self.request.num_tokens)
            yield run, end - self.shard_map.first_token(index)

    @property
    def run_done(self) -> bool:
        """Whether the member has computed (or has scheduled) all of its run. The home never has."""
        return self.ends_by(self.member.num_computed_tokens)

    def ends_by(self, num_computed_tokens: int) -> bool:
        """Whether the active member's run is done with so many tokens of the request. The home's never is."""
        return not self.at_home and num_computed_tokens >= self.shard_map.end_token(
            self.active, self.request.num_tokens
        )

    def move_home(self, rank: int, member_id: str) -> Keeper:
        """The home has filled its last block, and the request goes on at another rank.

        Args:
            rank: the new home.
            member_id: for the member that keeps the blocks at the old one.

        Returns:
            That member.
        """
        block_size, computed = self.shard_map.block_size, self.request.num_computed_tokens
        end_block = computed // block_size
        *runs, last = self.shard_map.runs
        runs += [replace(last, end_block=end_block), Run(rank, end_block, end_block + 1)]
        member = Keeper(member_id)
        self.members[-1:] = [member, self.request]
        self.shard_map = ShardMap(block_size, tuple(runs))
        self.go_on()
        return member

    def blocks_at(self, rank: int, held: Callable[[str], list[int]]) -> list[int]:
        """Block ids of all finished runs at a rank, in order.

        Args:
            rank: which.
            held: the blocks that a keeper of this id has there.
        """
        blocks: list[int] = []
        for keeper, run in zip(self.members[: self.active], self.shard_map.runs, strict=False):
            if run.rank == rank:
                assert isinstance(keeper, Keeper)
                blocks += held(keeper.request_id)[: run.num_blocks]
        return blocks

    def row(self, num_queries: int) -> PlanRow | None:
        """This step's row, after ``num_queries`` tokens were scheduled; None when all it attends to is local."""
        if not self._holders:
            return None
        member = self.member
        return PlanRow(
            req_id=member.request_id,
            home=self.rank,
            num_queries=num_queries,
            first_block=self.run.first_block,
            local_tokens=member.num_computed_tokens - num_queries - self.local_start,
            holders=self._holders,
        )
