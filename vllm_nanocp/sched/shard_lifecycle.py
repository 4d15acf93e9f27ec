# SPDX-License-Identifier: Apache-2.0
"""The members of sharded requests: their blocks, their way through the ranks' schedulers, and what the workers must be
told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request

from ..placement import Run, ShardMap
from ..plan import StepPlan, keeper_id
from .sharded_request import ShardedRequest

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

    from .rank.interface import Part, Rank


class Members:
    """All sharded requests.

    Args:
        ranks: their schedulers.
        rank_of: the rank whose scheduler and model runner know a request by its own id; kept up to date here for
            sharded requests that begin at their home or change it.
        block_size: tokens a block holds.
        decode_bench: whether prompts are taken as computed.
        log_stats: whether requests record when they were scheduled.
        tells_next: whether workers are told of the token behind a member's run.
    """

    def __init__(
        self,
        ranks: Sequence[Rank],
        rank_of: dict[str, int],
        block_size: int,
        decode_bench: bool,
        log_stats: bool,
        tells_next: bool = False,
    ) -> None:
        self.ranks = ranks
        self.rank_of = rank_of
        self.block_size = block_size
        self.decode_bench = decode_bench
        self.log_stats = log_stats
        self.tells_next = tells_next
        self.sharded: dict[str, ShardedRequest] = {}
        # The rank by which a request's output leaves, where its home has changed: its first one.
        self.outlet_of: dict[str, int] = {}
        # What the workers will be told with the step at hand.
        self.plan = StepPlan()
        # Member id -> the request it works for.
        self._owner: dict[str, str] = {}
        # Shards that rows of the step at hand may still visit; closed with the next plan.
        self._outdated: list[str] = []
        self._serial = 0
        # Requests of which the step at hand computes a part; and parts beside another one of the same request.
        self._computing: set[str] = set()
        self.num_parallel_parts = 0
        # How often a request has been sharded, gone on to its next run, moved or ended.
        self.changes = 0
        # Sharded requests that have ended, or given up their shards.
        self.num_closed = 0
        # Sharded requests by rank, and at which of these changes.
        self._shards = [0] * len(ranks)
        self._shards_at = 0

    def owner_of(self, member_id: str) -> str:
        """The request that a member works for; the id itself if it is no member's."""
        return self._owner.get(member_id, member_id)

    @property
    def have_news(self) -> bool:
        """Whether the workers must be told of shards that are closed."""
        return bool(self.plan.closed or self._outdated)

    # -- a step ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self.plan.closed.extend(self._outdated)
        self._outdated.clear()
        self._computing.clear()

    def order(self) -> list[int]:
        """Ranks that are to be scheduled one after another where they compute prompts together: those of prompts that
        are being computed, as the runs of the first one follow each other, from the one that is computed now."""
        active = [sharded for sharded in self.sharded.values() if not sharded.at_home]
        if not active:
            return []
        involved = {run.rank for sharded in active for run in sharded.shard_map.runs[sharded.active :]}
        first, count = active[0].rank, len(self.ranks)
        return [rank for rank in (*range(first, count), *range(first)) if rank in involved]

    def advance(self, parts: Mapping[int, Part]) -> None:
        """Write the rows of some ranks; park members that reached the end of their run and let the next ones enter. One
        whose rank has yet to be scheduled computes in the same step.

        Args:
            parts: by rank, what its scheduler has scheduled.
        """
        for request_id, sharded in list(self.sharded.items()):
            part = parts.get(sharded.rank)
            if part is None:
                continue
            num_queries = part.scheduled.get(sharded.member.request_id, 0)
            if num_queries:
                if not sharded.started and self.log_stats:
                    sharded.request.record_event(EngineCoreEventType.SCHEDULED)
                sharded.started = True
                self.num_parallel_parts += request_id in self._computing
                self._computing.add(request_id)
                row = sharded.row(num_queries)
                if row is not None:
                    self.plan.rows.append(row)
            if not sharded.at_home and sharded.run_done:
                if self.tells_next and num_queries:
                    end = sharded.shard_map.end_token(sharded.active, sharded.request.num_tokens)
                    self.plan.next_tokens[sharded.member.request_id] = sharded.request.all_token_ids[end]
                self.ranks[sharded.rank].park(sharded.member.request_id, sharded.run.first_block)
                sharded.park()
                self.changes += 1
                self._publish(sharded)
                self._enter(sharded, sharded.local_start)

    def take_plan(self) -> StepPlan:
        """The plan of the step at hand, complete but for what depends on the ranks' batches."""
        plan, self.plan = self.plan, StepPlan()
        return plan

    # -- requests ----------------------------------------------------------------------------------------------

    def taken_as_computed(self, request: Request) -> bool:
        """Whether a benchmark times decoding alone; a request of it may still want its prompt computed, and one that
        was preempted is computed again, as with vLLM's DecodeBenchConnector."""
        if not self.decode_bench or request.num_preemptions:
            return False
        params = request.sampling_params
        return not (params and (params.extra_args or {}).get("compute_prompt"))

    def open(self, request: Request, shard_map: ShardMap, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """Take or allocate the blocks of all shards of a request, and let its first member with work enter.

        Args:
            request: waits nowhere.
            shard_map: where its blocks go. The ranks have room for them.
            hashes: of its blocks that may come from prefix caches.

        Returns:
            Tokens found in prefix caches, and those of them at the home.
        """
        self._serial += 1
        sharded = ShardedRequest.create(request, shard_map, self._serial)
        self.sharded[request.request_id] = sharded
        known = local = 0  # blocks from the start on whose KV is there; those of them at the home
        starts: list[int] = []  # where each member begins to compute
        for member, run in zip(sharded.members, shard_map.runs, strict=True):
            rank = self.ranks[run.rank]
            so_far = known == run.first_block
            cached = rank.adopt_cached(member.request_id, hashes[run.first_block : run.end_block] if so_far else [])
            starts.append((run.first_block + cached) * self.block_size)
            self._owner[member.request_id] = request.request_id
            known += cached
            local += cached * (run.rank == shard_map.home)
            if self.taken_as_computed(request):
                starts[-1] = min(run.end_block * self.block_size, request.num_tokens - 1)
        for member, run in zip(sharded.members, shard_map.runs, strict=True):
            self.ranks[run.rank].allocate(member.request_id, run.num_blocks)
        hits = known * self.block_size
        if not request.skip_reading_prefix_cache:
            self.ranks[shard_map.home].record_prefix_hits(request.num_tokens, hits, request.num_preemptions > 0)
        if request.prefill_stats is not None and request.num_preemptions == 0:
            request.prefill_stats.set(request.num_prompt_tokens, hits, 0)
        while sharded.ends_by(starts[sharded.active]):
            sharded.go_on()
            self._publish(sharded)
        self._enter(sharded, starts[sharded.active])
        self.changes += 1
        return hits, local * self.block_size

    def _publish(self, sharded: ShardedRequest) -> None:
        """Tell the workers, with the plan of the step at hand, of the run before the active member's, which is done.

        All finished runs at a rank are one shard, so that a row visits a rank once.
        """
        rank, shard = sharded.shard_map.runs[sharded.active - 1].rank, sharded.members[sharded.active - 1].request_id
        blocks = sharded.blocks_at(rank, self.ranks[rank].shard_blocks)
        self.plan.opened.setdefault(rank, []).append((shard, blocks))
        if rank in sharded.open_shards:
            self._outdated.append(sharded.open_shards[rank][0])
        sharded.open_shard(rank, shard, len(blocks) * self.block_size)

    def _enter(self, sharded: ShardedRequest, num_computed_tokens: int) -> None:
        """Let the active member compute, from this token of the request on."""
        sharded.wake(num_computed_tokens)
        self.ranks[sharded.rank].unfold(sharded.member.request_id, sharded.run.first_block)
        if sharded.at_home:
            self.rank_of[sharded.request.request_id] = sharded.rank
        self.ranks[sharded.rank].enter(sharded.member)
        self.ranks[sharded.rank].watch(sharded.member)

    def close(self, sharded: ShardedRequest) -> None:
        """Give back every shard but the active member's, which its rank's scheduler has freed.

        The last ones first, as vLLM gives back blocks: what is given back first leaves the prefix cache first, and a
        prefix is of use only from its beginning.
        """
        self.ranks[sharded.rank].unwatch(sharded.member.request_id)
        for index in reversed(range(len(sharded.members))):
            member_id = sharded.members[index].request_id
            if index != sharded.active:
                self.ranks[sharded.shard_map.runs[index].rank].close_shard(member_id)
            self._owner.pop(member_id, None)
        self.plan.closed.extend(shard for shard, _ in sharded.open_shards.values())
        del self.sharded[sharded.request.request_id]
        self.changes += 1
        self.num_closed += 1

    def take_back(self, sharded: ShardedRequest) -> None:
        """Give back all shards of a request whose active member waits at its rank; it waits nowhere then."""
        rank, member = self.ranks[sharded.rank], sharded.member
        rank.close_shard(member.request_id)
        if not sharded.at_home:
            rank.withdraw(member.request_id)
        elif sharded.request.num_preemptions:  # the model runner may know it
            rank.take_from_queues(member.request_id)
        else:
            member.events[:0] = rank.withdraw(member.request_id)
            del self.rank_of[sharded.request.request_id]
        self.close(sharded)

    # -- homes -------------------------------------------------------------------------------------------------

    def move_home(self, request: Request, source: int, target: int) -> None:
        """Let a decoding request, with nothing in flight, go on at another rank, from its last full block's end on."""
        self._serial += 1
        request_id = request.request_id
        sharded = self.sharded.get(request_id)
        if sharded is None:
            run = Run(source, 0, request.num_computed_tokens // self.block_size)
            sharded = ShardedRequest(request, ShardMap(self.block_size, (run,)), [request], started=True)
            self.sharded[request_id] = sharded
            self._owner[request_id] = request_id
        keeper = sharded.move_home(target, keeper_id(request_id, self._serial, "m"))
        self._owner[keeper.request_id] = request_id
        self.ranks[source].hand_over(request_id, keeper.request_id, sharded.shard_map.runs[-2].first_block)
        self._publish(sharded)
        self.rank_of[request_id] = target
        request.num_computed_tokens -= request.num_computed_tokens % self.block_size
        outlet = self.outlet_of.setdefault(request_id, source)
        self.ranks[target].arrive(request, sharded.shard_map.runs[-1].first_block, outlet)
        self.ranks[target].watch(request)
        self.changes += 1

    def shards_by_rank(self) -> Sequence[int]:
        """How many sharded requests have a shard on each rank."""
        if self._shards_at != self.changes:
            self._shards_at, self._shards = self.changes, [0] * len(self.ranks)
            for sharded in self.sharded.values():
                for rank in {sharded.rank, *sharded.open_shards}:
                    self._shards[rank] += 1
        return self._shards

    def ask_for_generator(self, request_id: str) -> None:
        """Have the worker of a request's home report, with the next step, the state of its generator."""
        self.plan.departing.append(request_id)

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        return [*self.sharded, *self.outlet_of, *self._owner, *self._outdated, *self.plan.closed, *self.plan.departing]
