# SPDX-License-Identifier: Apache-2.0
"""Asks the placement policy on behalf of a request: gathers the ranks' loads and what their prefix caches hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from ..config import NanoCPConfig
from ..placement import Prefix, RankedLoads, RankLoad, Run, ShardMap, Want, cdiv, place, place_after_prefix, queue_at
from ..placement.auto import Segments
from ..placement.moves import KV_WEIGHT, with_reserve
from ..placement.place import start_degree
from ..placement.prefix import light
from ..placement.queue import as_overtaken
from ..rank_hint import preferred_rank
from .rank.adapters import adapter_of
from .rank.interface import Rank
from .rank.remote_rank import RemoteRank
from .sharded_request import can_shard

NOWHERE = Prefix()


class _Derived:
    """What is derived from the ranks' loads, one by one, and kept.

    Args:
        derive: from a load.
    """

    def __init__(self, derive: Callable[[RankLoad], RankLoad]) -> None:
        self._derive = derive
        self._loads: RankedLoads | None = None
        self._derived = RankedLoads([])
        # Ranks whose load has changed since.
        self._changed: set[int] = set()

    def of(self, loads: RankedLoads) -> RankedLoads:
        if self._loads is not loads:
            self._loads, self._derived = loads, RankedLoads(map(self._derive, loads))
            self._changed = set()
            loads.followers.append(self._changed)
        for rank in self._changed:
            self._derived.put(rank, self._derive(loads[rank]))
        self._changed.clear()
        return self._derived


class Placer:
    """From requests and schedulers to the plain numbers that placement takes.

    Args:
        ranks: their schedulers.
        config: the plugin's settings.
        block_size: tokens a block holds.
        max_model_len: tokens.
        find_prefixes: whether cached prefixes can be found by the blocks of one KV cache group.
        loads: what there is to know of each rank's load.
        stripe_blocks: see ``place``.
        segments: how requests are cut in the step at hand.
        has_room: whether graphs have room for the visits of a request that is placed so.
    """

    def __init__(
        self,
        ranks: Sequence[Rank],
        config: NanoCPConfig,
        block_size: int,
        max_model_len: int,
        find_prefixes: bool,
        loads: Callable[[], RankedLoads],
        stripe_blocks: int | None,
        segments: Callable[[], Segments],
        has_room: Callable[[ShardMap], bool],
    ) -> None:
        self.segments, self._has_room = segments, has_room
        # Whether the last request asked for had room but for its visits.
        self.lacks_visits = False
        # Whether it was sent to a rank that has no room for it yet.
        self.waits = False
        self.ranks = ranks
        self.config = config
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.find_prefixes = find_prefixes
        self._loads = loads
        self._stripe_blocks = stripe_blocks
        self._moves = config.move_config
        # Batches are evened out later, KV is not; and what grows must not have to leave at once.
        self._kv_weight = None if self._moves is None else KV_WEIGHT
        reserve = 0 if self._moves is None else self._moves.reserve_blocks
        self._reserved = _Derived(lambda load: with_reserve(load, reserve)) if reserve else None
        self._overtaken = _Derived(lambda load: as_overtaken(load, block_size))
        # Ranks may hold more than their blocks have tokens.
        self._uncounted = any(rank.most_tokens > rank.num_blocks * block_size for rank in ranks)
        # Where blocks are cached, if the ranks are elsewhere.
        self._where = next((rank.where for rank in ranks if isinstance(rank, RemoteRank)), None)
        # Whether requests go where their prefix is.
        self.follows_prefixes = find_prefixes and config.placement != "round_robin"

    def place(
        self,
        request: Request,
        home: int | None,
        turn: int,
        prefix: Prefix,
        closed: Collection[int] = (),
        may_wait: bool = True,
        overtakes: bool = False,
    ) -> ShardMap | None:
        """A shard map for a request, or None when it has to wait. If a step would have more visits than graphs have
        room for, it stays on one rank, if one can ever hold it; but it does not wait at a rank, for there may be
        room for its visits before there is for all of it.

        Args:
            request: waiting.
            home: the rank that has its sampling state, if it has run before.
            turn: how many requests were placed before.
            prefix: where its first blocks are cached, or will be.
            closed: ranks whose room is kept for others.
            may_wait: whether it may be sent to a rank to wait for room there.
            overtakes: whether requests before it found no room.
        """
        how = (home, turn, prefix, closed, may_wait, overtakes)
        self.waits = False
        found = self._place(request, *how)
        self.lacks_visits = found is not None and len(found.runs) > 1 and not self._has_room(found)
        if not self.lacks_visits:
            return found
        whole = self._rules(request, home) | dict(segment_size=request.num_tokens, max_degree=1)
        now = (home, turn, prefix, closed, False, overtakes)
        return self._place(request, *now, whole) if self._fits_empty(request, whole) else found

    def _place(
        self,
        request: Request,
        home: int | None,
        turn: int,
        prefix: Prefix,
        closed: Collection[int],
        may_wait: bool,
        overtakes: bool,
        rules: dict[str, Any] | None = None,
    ) -> ShardMap | None:
        ranked, adapter = self._loads(), adapter_of(request)
        # Each takes free blocks away, down to none, so that their order does not matter.
        if self._reserved is not None:
            ranked = self._reserved.of(ranked)
        if overtakes:
            ranked = self._overtaken.of(ranked)
        loads: Sequence[RankLoad] = ranked
        if adapter is not None or closed:
            loads = [load.closed() if rank in closed else load.for_adapter(adapter) for rank, load in enumerate(ranked)]
        weight = self._kv_weight
        policy = self.config.placement
        preferred = self._preferred(request) if home is None else None
        rules = self._rules(request, home) if rules is None else rules
        tokens, block_size = request.num_tokens, self.block_size
        afresh: dict[str, Any] = dict(policy=policy, turn=turn, preferred=preferred, kv_weight=weight, **rules)
        if prefix.runs:
            if preferred is not None:  # a cached prefix elsewhere does not outweigh the client's wish
                wish = place(tokens, block_size, loads, **afresh)
                if wish is not None and wish.home == preferred:
                    if wish.degree == 1 and prefix.runs[0].rank != preferred:
                        return wish
                    rules["home"] = preferred
            again = request.num_preemptions > 0
            after = place_after_prefix(prefix, tokens, block_size, loads, kv_weight=weight, again=again, **rules)
            if after is not None:
                return after
        fresh = place(tokens, block_size, loads, **afresh)
        if fresh is not None or not may_wait:
            return fresh
        idle = [rank.view.nobody_waits for rank in self.ranks]
        if self._spreads(request, rules):
            return None
        wished = None if preferred is None else self._queue_at(request, preferred, loads, idle)
        found = wished or self._queue_at(request, home, loads, idle)
        self.waits = found is not None
        return found

    def one_rank(self, request: Request) -> bool:
        """Whether a request cannot be spread over ranks."""
        return self.config.degree_limit == 1 or not can_shard(request)

    def _preferred(self, request: Request) -> int | None:
        """The rank that the client wishes for; front-ends refuse those that there are not."""
        preferred = preferred_rank(request)
        return preferred if preferred is None or 0 <= preferred < len(self.ranks) else None

    def want(self, request: Request, home: int | None) -> Want:
        """What a waiting request needs to start.

        Args:
            request: waiting.
            home: the rank that has its sampling state, if it has run before.
        """
        rules = self._rules(request, home)
        limit = min(rules["max_degree"], len(self.ranks))
        blocks = cdiv(request.num_tokens, self.block_size) + rules["headroom_blocks"]
        loose = limit > 1 and self.config.segments is None
        return Want(blocks, start_degree(request.num_tokens, rules["segment_size"], limit), limit, home, loose)

    def _rules(self, request: Request, home: int | None) -> dict[str, Any]:
        """What placement may do with a request, whatever the ranks' loads."""
        most_tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        growth = cdiv(most_tokens, self.block_size) - cdiv(request.num_tokens, self.block_size)
        segments = self.segments()
        return dict(
            segment_size=segments.of(request.num_tokens),
            least_shard=segments.least,
            max_degree=self.config.degree_limit if can_shard(request) else 1,
            home=home,
            headroom_blocks=max(0, min(1, growth)),
            stripe_blocks=self._stripe_blocks,
        )

    @staticmethod
    def _spreads(request: Request, rules: dict[str, Any]) -> bool:
        """Whether a request is to be on several ranks."""
        return bool(rules["max_degree"] > 1 and request.num_tokens > rules["segment_size"])

    def _queue_at(
        self, request: Request, home: int | None, loads: Sequence[RankLoad], idle: Sequence[bool] | None
    ) -> ShardMap | None:
        """A rank at which a request that found no room may wait for it."""
        tokens = request.num_tokens
        if self._uncounted:  # only vLLM's scheduler knows how many blocks it needs
            tokens = min(tokens, self.ranks[0].num_blocks * self.block_size)
        return queue_at(tokens, self.block_size, loads, [True] * len(loads) if idle is None else idle, home)

    def ever_fits(self, request: Request, home: int | None) -> bool:
        """Whether a waiting request could be placed if nothing else were on any rank.

        Args:
            request: waiting.
            home: the rank that has its sampling state, if it has run before.
        """
        rules = self._rules(request, home)
        if self._fits_empty(request, rules):
            return True
        return not self._spreads(request, rules) and self._queue_at(request, home, self._empty(), None) is not None

    def _empty(self) -> list[RankLoad]:
        return [RankLoad(free_blocks=rank.num_blocks, used_blocks=0, batch=0, slots=1) for rank in self.ranks]

    def _fits_empty(self, request: Request, rules: dict[str, Any]) -> bool:
        policy = self.config.placement
        return place(request.num_tokens, self.block_size, self._empty(), policy=policy, **rules) is not None

    def lookup_hashes(self, request: Request) -> list[BlockHash]:
        """Hashes of the blocks that may come from a prefix cache.

        Not of the block of the last token, which has to be computed for there to be something to sample from.
        """
        if request.skip_reading_prefix_cache or not self.find_prefixes:
            return []
        return request.block_hashes[: (request.num_tokens - 1) // self.block_size]

    def find_prefix(self, hashes: Sequence[BlockHash], again: bool = False) -> Prefix:
        """Where a request's first blocks are cached, on as few ranks as that takes; nowhere, if it should not go there.

        Args:
            hashes: of the blocks, from ``lookup_hashes``.
            again: whether the request was preempted: what is left of it counts wherever it is.
        """
        # Of ranks elsewhere it is known here, and mostly none has the first block.
        if not self.follows_prefixes or not hashes or (self._where is not None and hashes[0] not in self._where):
            return NOWHERE
        runs: list[Run] = []
        held: list[int] = []
        at = 0
        while at < len(hashes) and (self._where is None or hashes[at] in self._where):
            found = [rank.cached_run(hashes, at) for rank in self.ranks]
            longest = max(length for length, _ in found)
            if not longest:
                break
            able = [rank for rank, (length, _) in enumerate(found) if length == longest]
            rank = able[0] if len(able) == 1 else min(able, key=lambda r: self.ranks[r].view.tokens)
            runs.append(Run(rank, at, at + longest))
            held.append(found[rank][1])
            at += longest
        prefix = Prefix(tuple(runs), tuple(held))
        if runs and not again and self._moves is not None and not light(prefix, self._loads(), self.block_size):
            return NOWHERE
        return prefix
