# SPDX-License-Identifier: Apache-2.0
"""Places waiting requests: looks at those at the front of the queue and lets start what fits.

Who may overtake whom, and what room is kept for those that were overtaken, is policy (``placement.queue``). Requests
for whose adapter there is no slot wait aside, by adapter, and are looked at again when there is one; as in vLLM they
keep nobody waiting. A step passes over a bounded number of requests, and lets them start for a bounded time, however
many wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from ..placement import Prefix, ShardMap
from ..placement.queue import ENDS_OVER, LOOKS, MOST_STARTS, WINDOW, Blocked, least_starts, may_start, ranks_for
from .placer import NOWHERE
from .rank.adapters import adapter_of
from .step_room import StepRoom

if TYPE_CHECKING:
    from .rank.interface import Rank
    from .state import SchedulerState

logger = init_logger("vllm.nanocp.scheduler")

# An adapter, and the home of requests that have one.
_Slot = tuple[int, int | None]


def make_way(ranks: Sequence[Rank]) -> None:
    """A request finds no room at these ranks. If nothing will end that it could wait for, sessions without work give up
    their KV."""
    if not any(rank.view.busy for rank in ranks):
        for rank in ranks:
            rank.give_way()


class Admission:
    """From the queue of all ranks to the ranks.

    Args:
        scheduler: over all ranks.
        create_queue: vLLM's, for requests that wait for an adapter's slot.
        policy: of the queues.
    """

    def __init__(
        self,
        scheduler: SchedulerState,
        create_queue: Callable[[SchedulingPolicy], RequestQueue],
        policy: SchedulingPolicy,
    ) -> None:
        self.scheduler = scheduler
        self._create_queue = lambda: create_queue(policy)
        # Requests that have found no room, by id.
        self._blocked: dict[str, Blocked] = {}
        # Requests that wait for an adapter's slot, and which one each waits for.
        self._by_slot: dict[_Slot, RequestQueue] = {}
        self._slot_of: dict[str, _Slot] = {}
        # Requests that have no sampling state anywhere and wait at a rank for its room -> which one.
        self._at_rank: dict[str, int] = {}
        # Requests placed so far: whose turn it is, where that decides.
        self.num_placed = 0
        self.num_overtakings = 0
        self.clock: Callable[[], float] = perf_counter
        # Whether the last step let as many start as it may, and all found room: others may, too.
        self.cut_short = False
        # Requests that have left the ranks so far, and how many do in a step of late.
        self._num_gone = 0
        self._ends = 0.0

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Place what fits."""
        scheduler = self.scheduler
        self.cut_short = False
        self._count_ends()
        if scheduler.pause_state != PauseState.UNPAUSED:
            return
        self._take_back()
        if not (scheduler.waiting or self._by_slot):
            return
        room = StepRoom(scheduler.mover.loads())
        self._return_to_queue(room)
        passed = self._scan(room)
        for request in reversed(passed):
            scheduler.waiting.prepend_request(request)

    def _count_ends(self) -> None:
        gone = self.num_placed - (len(self.scheduler.requests) - len(self.scheduler.unplaced))
        self._ends += (max(0, gone - self._num_gone) - self._ends) / ENDS_OVER
        self._num_gone = gone

    def _take_back(self) -> None:
        """Requests that wait at a rank, at most one at each, and that have room at another one now: there is no saying
        how long those run for whose room they wait. Those stay that would come behind others in the queue, for whom the
        room may be kept, and no more come back than it is for. Of those that find none a few are looked at."""
        scheduler, looks = self.scheduler, 0
        if not self._at_rank:
            return
        first = scheduler.waiting.peek_request() if scheduler.waiting else None
        room = StepRoom(scheduler.mover.loads())
        for request_id, at in list(self._at_rank.items()):
            request = scheduler.requests[request_id]
            if request.status == RequestStatus.RUNNING or request_id in scheduler.unplaced:
                self.forget(request_id)
                continue
            # One that is taken as computed may have its blocks already.
            idle = request.status == RequestStatus.WAITING and not request.num_computed_tokens
            if not idle or (first is not None and self._precedes(first, request)):
                continue
            if looks == LOOKS:
                break
            del self._at_rank[request_id]
            if not self._takes_elsewhere(request, at, room):
                looks += 1
                self._at_rank[request_id] = at  # the others come before it in the next step
            else:
                del scheduler.rank_of[request_id]
                request.events[:0] = scheduler.ranks[at].withdraw(request_id)
                if request.structured_output_request is not None:  # its grammar may be compiled anew where it goes
                    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
                scheduler.prefixes.leads_no_more(request_id)
                scheduler.unplaced[request_id] = request
                self._insert([request])

    def _takes_elsewhere(self, request: Request, at: int, room: StepRoom) -> bool:
        """Whether another rank than where it waits has room for a request now: then it is taken of ``room``."""
        scheduler, adapter = self.scheduler, adapter_of(request)
        blocks, together = room.of(adapter)
        most = together[-1] if scheduler.config.segments is None else together[0]
        if request.num_tokens > most * scheduler.block_size:
            return False
        rules = (request, None, self.num_placed, NOWHERE)
        found = scheduler.placer.place(*rules, closed=(at,), may_wait=False)
        if found is None or any(blocks[run.rank] < run.num_blocks for run in found.runs):
            return False
        room.take(found, NOWHERE, adapter)
        return True

    def forget(self, request_id: str) -> None:
        """A request does not wait at its rank any more, or has ended."""
        at = self._at_rank.pop(request_id, None)
        if at is not None:
            self.scheduler.ranks[at].unwatch(request_id)

    def _scan(self, room: StepRoom) -> list[Request]:
        """Place what fits of the first requests; those that do not are taken out of the queue and returned."""
        waiting, first_placed = self.scheduler.waiting, self.num_placed
        passed: list[Request] = []
        looks, started, aside = 0, 0, MOST_STARTS
        least, began = least_starts(len(self.scheduler.ranks), self._ends), self.clock()
        while waiting and len(passed) < WINDOW and looks < LOOKS:
            if not aside or not may_start(started, least, self.clock() - began):
                self.cut_short = not passed
                break
            request = waiting.peek_request()
            home, adapter = self.scheduler.rank_of.get(request.request_id), adapter_of(request)
            if adapter is not None and not room.takes(adapter, home):
                self._wait_for_slot(waiting.pop_request(), (adapter, home))
                continue
            if passed:
                if self.scheduler.by_priority and request.priority > passed[-1].priority:
                    for other in passed:  # those that are more important
                        self._close(other, room)
                if not any(room.of(None)[0]):
                    break
                blocked = self._blocked.get(request.request_id)
                freed = self.scheduler.graph_room.freed
                if blocked is not None and not blocked.may_fit(*room.of(adapter), room.most, freed):
                    passed.append(waiting.pop_request())
                    self._close_if_due(request, room)
                    continue
            placed = self.num_placed
            if self._place(request, room, passed, may_wait=not passed and self._is_due(request)):
                now = self.num_placed - placed  # or it is set aside, and starts when it comes back
                started, aside = started + now, aside - 1 + now
            else:
                looks += bool(passed)
                passed.append(waiting.pop_request())
                self._close_if_due(request, room)
                if len(passed) == 1:
                    first_placed = self.num_placed
        if self.num_placed > first_placed:
            return passed
        # While nobody overtakes it, the first may as well wait at a rank: vLLM's scheduler knows best when it fits.
        while passed and not self._is_due(passed[0]):
            waiting.prepend_request(passed[0])
            if not self._place(passed[0], room, passed=[], may_wait=True):
                waiting.pop_request()
                break
            del passed[0]
        return passed

    def _place(self, request: Request, room: StepRoom, passed: list[Request], may_wait: bool) -> bool:
        """Place the first of the queue, or take it out of it because it waits for another's prefix or has ended.

        Args:
            request: the first of the queue.
            room: on the ranks.
            passed: requests before it that found none.
            may_wait: whether it may go to a rank to wait there.

        Returns:
            False if it finds no room.
        """
        scheduler, request_id = self.scheduler, request.request_id
        home, adapter = scheduler.rank_of.get(request_id), adapter_of(request)
        closed = room.closed if passed else ()
        blocked = self._blocked.get(request_id)
        # A prefix, a long one perhaps, is not looked for again in each step, but when there is more room.
        sought = blocked is None or blocked.grown(room.of(adapter, kept=not passed)[0])
        rules = (request, home, self.num_placed)
        how = (closed, may_wait, bool(passed))
        shard_map, prefix = None, NOWHERE
        if not sought:
            shard_map = scheduler.placer.place(*rules, prefix, *how)
        if sought or shard_map is not None:
            found = scheduler.prefixes.find(request)
            if found is None:  # set aside, for another one that computes what it begins with
                scheduler.waiting.pop_request()
                return True
            prefix = found
            shard_map = scheduler.placer.place(*rules, prefix, *how)
        want = scheduler.placer.want(request, home) if shard_map is None else None
        if want is not None:
            unknown = blocked is None or blocked.want != want
            if unknown and not scheduler.placer.ever_fits(request, home):
                self.fail(request)
                return True
            if may_wait:
                make_way(scheduler.ranks if home is None else [scheduler.ranks[home]])
        if shard_map is None or scheduler.prefixes.claim(request, shard_map, prefix):
            want = want or scheduler.placer.want(request, home)
            if blocked is None:
                blocked = self._blocked[request_id] = Blocked(want, urgent=request.num_preemptions > 0)
            blocked.want, blocked.room = want, room.of(adapter, kept=not passed)[0]
            blocked.visits = scheduler.graph_room.freed if scheduler.placer.lacks_visits else None
            if sought:
                blocked.shared, blocked.spread = sum(prefix.held), len(prefix.runs) > 1
            return False
        scheduler.waiting.pop_request()
        self._count(passed, shard_map.num_blocks - sum(prefix.held))
        room.take(shard_map, prefix, adapter)
        waits = scheduler.placer.waits and home is None and not request.resumable
        self._enter(request, shard_map, prefix)
        if waits:
            self._at_rank[request_id] = shard_map.home
            scheduler.ranks[shard_map.home].watch(request)
        return True

    def _count(self, passed: list[Request], blocks: int) -> None:
        """So many blocks go to a request behind these."""
        for other in passed:
            self._blocked[other.request_id].overtaken += max(1, blocks)
        self.num_overtakings += bool(passed)

    def _enter(self, request: Request, shard_map: ShardMap, prefix: Prefix) -> None:
        scheduler, request_id = self.scheduler, request.request_id
        del scheduler.unplaced[request_id]
        self._blocked.pop(request_id, None)
        hashes = scheduler.placer.lookup_hashes(request)
        home = scheduler.rank_of.get(request_id)
        if len(shard_map.runs) == 1:
            scheduler.rank_of[request_id] = shard_map.home
            rank = scheduler.ranks[shard_map.home]
            to_share = prefix.held[0] if prefix.runs and prefix.runs[0].rank == shard_map.home else 0
            hits = max(rank.cached_run(hashes, 0)[0], to_share) * scheduler.block_size
            scheduler.collector.admitted(1, hits, 0, request.num_tokens - hits)
            taken = request.num_tokens - 1 if scheduler.members.taken_as_computed(request) else 0
            rank.enter(request, to_share, taken)
        else:
            hits, local = scheduler.members.open(request, shard_map, hashes)
            scheduler.collector.admitted(shard_map.degree, local, hits - local, request.num_tokens - hits)
        if home is not None:
            scheduler.ranks[home].unwatch(request_id)
        scheduler.prefixes.lead(request, shard_map, hits // scheduler.block_size)
        self.num_placed += 1

    def fail(self, request: Request) -> None:
        """End a request that the ranks cannot hold, however empty."""
        logger.warning(
            "nanocp: request %s ends with an error: its %d tokens, and those it may make, can have room nowhere",
            request.request_id,
            request.num_tokens,
        )
        for ended in self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR):
            self.scheduler.failures.note(ended)

    # -- requests that are due ---------------------------------------------------------------------------------

    def _is_due(self, request: Request) -> bool:
        blocked = self._blocked.get(request.request_id)
        return request.num_preemptions > 0 or (blocked is not None and blocked.due)

    def _close_if_due(self, request: Request, room: StepRoom) -> None:
        if self._blocked[request.request_id].due:
            self._close(request, room)

    def _close(self, request: Request, room: StepRoom) -> None:
        """Keep for a request what is free, or comes free, on as many ranks as it needs."""
        blocked = self._blocked[request.request_id]
        if blocked.ranks and room.closed.issuperset(blocked.ranks):  # in this step already, or kept for one before it
            return
        if not blocked.ranks or not room.closed.isdisjoint(blocked.ranks):
            mine, _ = room.of(adapter_of(request), kept=True)
            blocked.ranks = ranks_for(blocked.want, mine, room.totals, room.closed)
        room.close(blocked.ranks)

    # -- slots for adapters --------------------------------------------------------------------------------------

    def _wait_for_slot(self, request: Request, slot: _Slot) -> None:
        self._slot_of[request.request_id] = slot
        if slot not in self._by_slot:
            self._by_slot[slot] = self._create_queue()
        self._by_slot[slot].add_request(request)

    def _return_to_queue(self, room: StepRoom) -> None:
        """Requests for whose adapter there is a slot now, a few of each in a step, take their places in the queue."""
        for slot in [slot for slot in self._by_slot if room.takes(*slot)]:
            queue = self._by_slot[slot]
            back: list[Request] = []
            while queue and len(back) < WINDOW:
                back.append(queue.pop_request())
                del self._slot_of[back[-1].request_id]
            if not queue:
                del self._by_slot[slot]
            self._insert(back)

    def _insert(self, back: list[Request]) -> None:
        """Put requests, which are in order, behind those that came before them."""
        waiting = self.scheduler.waiting
        before: list[Request] = []
        merged: list[Request] = []
        for request in back:
            while waiting and len(before) < WINDOW and self._precedes(waiting.peek_request(), request):
                before.append(waiting.pop_request())
                merged.append(before[-1])
            merged.append(request)
        for request in reversed(merged):
            waiting.prepend_request(request)

    def _precedes(self, request: Request, other: Request) -> bool:
        if self.scheduler.by_priority:
            return request < other
        return request.num_preemptions > 0 or request.arrival_time <= other.arrival_time

    def leave(self, request_id: str) -> bool:
        """A request that waits to be placed has ended; whether it waited for an adapter's slot."""
        self._blocked.pop(request_id, None)
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return False
        queue = self._by_slot[slot]
        queue.remove_request(next(request for request in queue if request.request_id == request_id))
        if not queue:
            del self._by_slot[slot]
        return True

    def leftovers(self) -> list[str]:
        """Ids that are still remembered; for tests, when no request is left."""
        return [*self._blocked, *self._at_rank, *self._slot_of, *map(str, self._by_slot)]
