# SPDX-License-Identifier: Apache-2.0
"""A prefix that several requests share is computed once, also when they come before any of it is cached.

A request that is placed and has blocks to compute leads: those blocks are known here by their hashes. A request whose
next block is one of them follows. If it is to be spread over ranks it is set aside, holding nothing, until the leader
has computed the last block that both have, and is then placed around what is cached. If it fits on one rank it goes to
the leader's, where vLLM's scheduler finds the blocks when its turn has come.

Nobody waits for one that waits for room, and for one that only has no turn no longer than computing would take. A
request that has waited so long waits for that one no more, but may for another that begins as itself does: those that
are released together would else compute what they share once for each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from vllm.v1.request import Request, RequestStatus

from ..placement import Prefix, Run, ShardMap, cdiv
from ..placement.prefix import worthwhile

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

    from .placer import Placer
    from .rank.interface import Allowed, Part, Rank
    from .shard_lifecycle import Members

# When a request has waited in vain for so many, it waits for nobody.
PATIENT_WITH = 4
# Part of what a rank may compute of prompts in a step that it cannot use: no chunk of a prompt may fit into it.
LEAST_LEFT = 1 / 16

_arrival, _turn = attrgetter("arrival_time"), attrgetter("turn")


@dataclass(eq=False, slots=True)
class Follower:
    """A request that is set aside.

    Attributes:
        request: in no queue.
        until: tokens of it that the leader will have computed.
        own_blocks: that it will take once it is placed.
        patience: whole steps without a token for the leader that it still waits.
        turn: what those that are set aside are sorted by.
    """

    request: Request
    until: int
    own_blocks: int
    patience: float
    turn: tuple[int, float, str]


@dataclass(eq=False, slots=True)
class Leader:
    """A placed request that has blocks to compute.

    Attributes:
        request: in a rank's scheduler, or sharded.
        shard_map: where its blocks go.
        hashes: of the blocks that others may find.
        end: tokens of it that are computed when all of these are.
        computed: tokens of it after the last step.
        stuck: whether it waits for room: it got nothing in the last step although its rank had tokens to give.
        followers: that are set aside for it, by id.
    """

    request: Request
    shard_map: ShardMap
    hashes: Sequence[BlockHash]
    end: int
    computed: int = 0
    stuck: bool = False
    followers: dict[str, Follower] = field(default_factory=dict)


class SharedPrefixes:
    """Who computes what others wait for.

    Args:
        ranks: their schedulers.
        members: of the sharded requests.
        placer: finds what is cached.
        requeue: puts a request that was set aside back to the head of the queue.
        by_priority: whether the queues go by priority, not by arrival.
    """

    def __init__(
        self,
        ranks: Sequence[Rank],
        members: Members,
        placer: Placer,
        requeue: Callable[[Request], None],
        by_priority: bool,
    ) -> None:
        self.ranks = ranks
        self.members = members
        self.placer = placer
        self.block_size = placer.block_size
        self._requeue = requeue
        self._by_priority = by_priority
        self._budget = ranks[0].max_num_scheduled_tokens
        self._leaders: dict[str, Leader] = {}
        # Block hash -> who computes it: the first that was placed, and those that would not wait for it.
        self._pending: dict[BlockHash, tuple[Leader, ...]] = {}
        # Requests that are set aside -> whom they follow.
        self._followed: dict[str, Leader] = {}
        # Those that are set aside, in the order of their turns.
        self._line: list[Follower] = []
        # Requests that have waited long enough, until they are placed -> for whom.
        self._impatient: dict[str, list[str]] = {}
        self.num_set_aside = 0

    # -- requests come and go ----------------------------------------------------------------------------------

    def find(self, request: Request) -> Prefix | None:
        """What a request that waits should be placed around.

        Returns:
            Where its first blocks are cached, or will be when its turn has come; None if it is set aside now.
        """
        hashes = self.placer.lookup_hashes(request)
        return self._follow(request, hashes, self.placer.find_prefix(hashes, request.num_preemptions > 0))

    def claim(self, request: Request, shard_map: ShardMap, prefix: Prefix) -> bool:
        """Whether a request, so placed, would take the room that those who come before it, and are set aside, need."""
        if not self._line or self._before(request, self._line[0].request):
            return False
        left = sum(rank.view.free_blocks for rank in self.ranks) - shard_map.num_blocks + sum(prefix.held)
        for follower in self._line:  # no further than needed
            if left < 0 or self._before(request, follower.request):
                break
            left -= follower.own_blocks
        return left < 0

    def _before(self, request: Request, other: Request) -> bool:
        """Whether a request's turn is before another one's."""
        return request < other if self._by_priority else request.arrival_time < other.arrival_time

    def _follow(self, request: Request, hashes: Sequence[BlockHash], prefix: Prefix) -> Prefix | None:
        """The prefix, longer perhaps by what others compute; None if the request has been set aside."""
        known, given_up = prefix.num_blocks, self._impatient.get(request.request_id, ())
        if len(given_up) >= PATIENT_WITH:
            return prefix
        end = self._end(hashes, known, given_up)
        leader = self._leader_of(hashes[end - 1], given_up) if end > known else None
        if leader is None:
            return prefix
        one_rank = self.placer.one_rank(request)
        if one_rank or request.num_tokens <= self.placer.segments().of(request.num_tokens):
            longer = self._on_first_rank(request, hashes, prefix, end, given_up)
            lost = end - longer.runs[0].end_block
            if one_rank or not worthwhile(lost, request.num_tokens, self.block_size):
                return longer if self._in_time(longer, (end - known) * self.block_size) else prefix
        elif not worthwhile(end - known, request.num_tokens, self.block_size):
            return prefix
        until = end * self.block_size
        if self._computed(leader) >= until or (self._by_priority and request < leader.request):
            return prefix  # one that is less important may not come to its turn for long
        own = cdiv(request.num_tokens, self.block_size) + 1 - end
        patience = cdiv(until - known * self.block_size, self._budget)
        turn = (request.priority if self._by_priority else 0, request.arrival_time, request.request_id)
        follower = leader.followers[request.request_id] = Follower(request, until, own, patience, turn)
        self._followed[request.request_id] = leader
        insort(self._line, follower, key=_turn)
        self.num_set_aside += 1
        return None

    def _leader_of(self, block_hash: BlockHash, given_up: Collection[str]) -> Leader | None:
        """Who computes a block, for one that has waited in vain for those ``given_up``."""
        for leader in self._pending.get(block_hash, ()):
            if not leader.stuck and leader.request.request_id not in given_up:
                return leader
        return None

    def _end(self, hashes: Sequence[BlockHash], known: int, given_up: Collection[str]) -> int:
        """The end of the blocks from ``known`` on that somebody computes."""

        def nobody(block_hash: BlockHash) -> bool:
            return self._leader_of(block_hash, given_up) is None

        if not self._pending or known >= len(hashes) or nobody(hashes[known]):
            return known
        return bisect_left(hashes, True, lo=known, key=nobody)

    def _on_first_rank(
        self, request: Request, hashes: Sequence[BlockHash], prefix: Prefix, end: int, given_up: Collection[str]
    ) -> Prefix:
        """The prefix with the blocks that its rank, or if there is none the leader's first, will have up to ``end``."""
        known = prefix.num_blocks
        leader = self._leader_of(hashes[known], given_up)
        assert leader is not None
        shard_map = leader.shard_map
        rank = shard_map.rank_of(known)
        if len(prefix.runs) > 1 or (prefix.runs and prefix.runs[0].rank != rank):
            return prefix
        ends = (run.end_block for run in shard_map.runs[:-1] if run.end_block > known)
        covered = min(end, next(ends, end))
        coming = covered - known
        return Prefix(
            (Run(rank, 0, covered),),
            (sum(prefix.held) + coming,),
            worthwhile(coming, request.num_tokens, self.block_size),
        )

    def _in_time(self, prefix: Prefix, tokens: int) -> bool:
        """Whether a request that shares so many tokens is answered about as soon at the rank of its prefix, behind the
        work there, as where there is least and it would compute them itself."""
        work = [rank.view.to_compute for rank in self.ranks]
        return work[prefix.runs[0].rank] - min(work) <= tokens * 3 // 2 + self._budget // 4

    def lead(self, request: Request, shard_map: ShardMap, known_blocks: int) -> None:
        """A request has been placed, so many of whose first blocks are cached there."""
        self._impatient.pop(request.request_id, None)
        end_block = request.num_tokens // self.block_size
        hashes = request.block_hashes[known_blocks:end_block]
        if not hashes or not self.placer.follows_prefixes or self.members.taken_as_computed(request):
            return
        leader = Leader(request, shard_map, hashes, end_block * self.block_size)
        if request.request_id not in self.members.sharded:  # it may have been placed to wait at its rank
            self.ranks[shard_map.home].watch(request)
            leader.stuck = self.ranks[shard_map.home].view.free_blocks < shard_map.num_blocks - known_blocks
        self._leaders[request.request_id] = leader
        alone = (leader,)
        for block_hash in hashes:
            others = self._pending.setdefault(block_hash, alone)
            if others is not alone:
                self._pending[block_hash] = (*others, leader)

    def leads_no_more(self, request_id: str) -> None:
        """A request has computed all it had to, has ended, or has been preempted."""
        leader = self._leaders.pop(request_id, None)
        if leader is None:
            return
        if request_id not in self.members.sharded:
            self.ranks[leader.shard_map.home].unwatch(request_id)
        for block_hash in leader.hashes:
            others = tuple(other for other in self._pending[block_hash] if other is not leader)
            if others:
                self._pending[block_hash] = others
            else:
                del self._pending[block_hash]
        self._release(leader, list(leader.followers.values()))

    def leave(self, request_id: str) -> bool:
        """A request that waits to be placed has ended; whether it was set aside."""
        self._impatient.pop(request_id, None)
        leader = self._followed.get(request_id)
        if leader is None:
            return False
        self._drop(leader, [leader.followers[request_id]])
        return True

    # -- a step ------------------------------------------------------------------------------------------------

    def observe(self, parts: Sequence[Part], prompts: bool, allowed: Allowed = None) -> None:
        """After a step: those whose leader has come far enough, or does not come on, go back to the queue.

        Args:
            parts: what each rank's scheduler has scheduled.
            prompts: whether prompts could be computed.
            allowed: how much of them each rank could compute; None: as much as fits into a step.
        """
        if not self._leaders:
            return
        spare = [self._spare(part, allowed) for part in parts]
        idle = max(spare) * 2 >= self._budget
        step = 1.0 if allowed is None else min(1.0, allowed[0] / self._budget)
        for request_id, leader in list(self._leaders.items()):
            computed = self._computed(leader)
            moved, leader.computed = computed > leader.computed, computed
            if computed >= leader.end:
                self.leads_no_more(request_id)
                continue
            rank, waits = self._stands(leader)
            if prompts:
                leader.stuck = waits and not moved and spare[rank] > 0
            if leader.followers:
                # By priority, others may go before the leader for ever.
                lost = prompts and not moved and (idle or (waits and self._by_priority))
                self._let_go(leader, step if lost else 0.0)

    def _spare(self, part: Part, allowed: Allowed) -> int:
        """Tokens that a rank had left for prompts in a step. Where it was not allowed to use all of it, the part that
        was left of what it was allowed."""
        if allowed is None:
            return self._budget - part.tokens
        tokens, pairs = allowed
        left = min(1 - part.prompt_tokens / max(1, tokens), 1 - part.prompt_pairs / max(1.0, pairs))
        return min(self._budget - part.tokens, int(left * self._budget)) if left > LEAST_LEFT else 0

    def _let_go(self, leader: Leader, lost: float) -> None:
        """Release those who need wait no longer, or will not."""
        ready: list[Follower] = []
        for follower in leader.followers.values():
            follower.patience -= lost
            if leader.stuck or follower.patience < 0:
                given_up = self._impatient.setdefault(follower.request.request_id, [])
                given_up.append(leader.request.request_id)
            elif leader.computed < follower.until:
                continue
            ready.append(follower)
        self._release(leader, ready)

    def _computed(self, leader: Leader) -> int:
        sharded = self.members.sharded.get(leader.request.request_id)
        return leader.request.num_computed_tokens if sharded is None else sharded.num_computed_tokens

    def _stands(self, leader: Leader) -> tuple[int, bool]:
        """At which rank a leader is, and whether it waits there."""
        sharded = self.members.sharded.get(leader.request.request_id)
        rank, request = (leader.shard_map.home, leader.request) if sharded is None else (sharded.rank, sharded.member)
        return rank, request.status != RequestStatus.RUNNING

    def _release(self, leader: Leader, ready: Sequence[Follower]) -> None:
        self._drop(leader, ready)
        for request in sorted((follower.request for follower in ready), key=_arrival, reverse=True):
            self._requeue(request)

    def _drop(self, leader: Leader, gone: Sequence[Follower]) -> None:
        for follower in gone:
            del leader.followers[follower.request.request_id], self._followed[follower.request.request_id]
            del self._line[bisect_left(self._line, follower.turn, key=_turn)]

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        aside = [follower.request.request_id for follower in self._line]
        return [*self._leaders, *self._followed, *aside, *self._impatient, *(str(h) for h in self._pending)]
