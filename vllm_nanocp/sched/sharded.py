# SPDX-License-Identifier: Apache-2.0
"""A sharded request: its members at the ranks that hold a shard, and which of them computes now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from ..placement import Run, ShardMap
from ..plan import Holder, PlanRow


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


def make_member(request: Request, member_id: str, block_size: int, end_block: int) -> Request:
    """A request that computes, for another, KV up to block ``end_block`` - 1, and samples nothing useful. With 0 it
    only keeps blocks.

    It ends where its run ends, so that vLLM's scheduler stops there by itself; the token that the model runner
    samples then belongs to nobody and is dropped, because the member has left by the time it comes.
    """
    member = Request(
        request_id=member_id,
        prompt_token_ids=list(request.all_token_ids[: max(1, end_block * block_size)]),
        sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
        pooling_params=None,
        client_index=request.client_index,
        arrival_time=request.arrival_time,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )
    member.block_hashes = request.block_hashes[:end_block]
    member.skip_reading_prefix_cache = request.skip_reading_prefix_cache
    member.prefill_stats = None
    return member


@dataclass
class ShardedRequest:
    """State of one request that is spread over ranks.

    Attributes:
        request: the request itself; it is the home's member.
        shard_map: where its blocks are.
        members: one a run; the last is ``request``.
        active: index of the member that computes now. Members before it are parked, later ones have not entered.
        started: whether any member was scheduled.
        open_shards: for each rank that holds finished runs, the id by which the workers know their blocks, all of
            them as one shard, and the tokens they hold.
    """

    request: Request
    shard_map: ShardMap
    members: list[Request]
    active: int = 0
    started: bool = False
    open_shards: dict[int, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def create(cls, request: Request, shard_map: ShardMap, serial: int) -> ShardedRequest:
        """Members for each run. ``serial`` makes their ids unique among all a request ever had."""
        members = [
            make_member(request, f"{request.request_id}#{serial}.{i}", shard_map.block_size, run.end_block)
            for i, run in enumerate(shard_map.runs[:-1])
        ]
        return cls(request, shard_map, [*members, request])

    @property
    def member(self) -> Request:
        """The member that computes now."""
        return self.members[self.active]

    @property
    def rank(self) -> int:
        """The rank that computes now."""
        return self.shard_map.runs[self.active].rank

    @property
    def at_home(self) -> bool:
        return self.active == len(self.members) - 1

    @property
    def run_done(self) -> bool:
        """Whether the member has computed (or has scheduled) all of its run. The home never has."""
        return not self.at_home and self.member.num_computed_tokens >= self.shard_map.end_token(
            self.active, self.request.num_tokens
        )

    @property
    def local_start(self) -> int:
        """Position of the first token of the run that is computed now."""
        return self.shard_map.first_token(self.active)

    def move_home(self, rank: int, member_id: str) -> Request:
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
        member = make_member(self.request, member_id, block_size, 0)
        self.members[-1:] = [member, self.request]
        self.shard_map = ShardMap(block_size, tuple(runs))
        self.active += 1
        return member

    def blocks_at(self, rank: int, held: Callable[[Request, int], list[int]]) -> list[int]:
        """Block ids of all finished runs at a rank, in order.

        Args:
            rank: which.
            held: (member, first block) -> ids of the blocks it holds there.
        """
        blocks: list[int] = []
        for member, run in zip(self.members[: self.active + 1], self.shard_map.runs, strict=False):
            if run.rank == rank:
                blocks += held(member, run.first_block)[: run.num_blocks]
        return blocks

    def row(self, num_queries: int) -> PlanRow | None:
        """This step's row, after ``num_queries`` tokens were scheduled; None when all it attends to is local."""
        if not self.open_shards:
            return None
        first_query = self.member.num_computed_tokens - num_queries
        first_block = self.shard_map.runs[self.active].first_block
        block_size = self.shard_map.block_size
        return PlanRow(
            req_id=self.member.request_id,
            home=self.rank,
            num_queries=num_queries,
            first_block=first_block,
            local_tokens=first_query - first_block * block_size,
            holders=tuple(Holder(rank, shard, tokens) for rank, (shard, tokens) in self.open_shards.items()),
        )
