# SPDX-License-Identifier: Apache-2.0
"""A sharded request: its members at the ranks that hold a shard, and which of them computes now."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from ..placement import ShardMap
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
        opened: ids of members whose blocks the workers know of.
    """

    request: Request
    shard_map: ShardMap
    members: list[Request]
    active: int = 0
    started: bool = False
    opened: set[str] = field(default_factory=set)

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

    def row(self, num_queries: int) -> PlanRow | None:
        """This step's row, after ``num_queries`` tokens were scheduled; None when all it attends to is local."""
        if self.active == 0:
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
            holders=tuple(
                Holder(run.rank, self.members[i].request_id, run.num_blocks * block_size)
                for i, run in enumerate(self.shard_map.runs[: self.active])
            ),
        )
