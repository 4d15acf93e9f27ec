# SPDX-License-Identifier: Apache-2.0
"""One scheduler over all ranks, made of vLLM's own: one vLLM scheduler a rank, placement, and shard maps.

A request waits here until placement finds room. One that stays on one rank is then that rank's scheduler's, and
this class only carries its output. A sharded request gets its blocks on all its ranks at once (so that two of them
can never wait for each other), and its members enter the ranks' schedulers one after another: each computes its
run and is parked; the last is the request itself, at its home, which decodes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY, MultiModalRegistry
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from .. import config as nanocp_config
from .. import kv_event_sources, rank_hint
from ..errors import UNSHARDED, refuse
from ..graph_capacities import visit_room
from ..metrics.collector import Collector
from ..placement.moves import MoveConfig
from ..plan import idle_batch
from ..step_messages import generators_in
from . import status
from .admission import Admission
from .cadence import PrefillCadence
from .failures import Failures
from .graph_room import GraphRoom
from .home_moves import Mover
from .pacing import Pacing
from .placer import Placer
from .rank import outlets, sessions
from .rank.chunks import stripe_blocks
from .rank.interface import Part
from .rank.make_ranks import make_ranks
from .rank.outlets import EngineOutlets
from .rank.rank_spec import RankSpec
from .rank.stats import PlainStats
from .rank_metrics import Readers, engine_stats
from .ranks_together import RanksTogether
from .segments import StepSegments
from .shard_lifecycle import Members
from .shared_prefix import SharedPrefixes
from .step_output import NanoCPSchedulerOutput, batches_of, merge

logger = init_logger("vllm.nanocp.scheduler")

# Finished sharded requests whose shares `status` still shows.
_REMEMBERED = 256


class NanoCPScheduler(RanksTogether):
    """vLLM's scheduler interface over N ranks."""

    mover: Mover

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        structured_output_manager: StructuredOutputManager,
        block_size: int,
        hash_block_size: int | None = None,
        mm_registry: MultiModalRegistry = MULTIMODAL_REGISTRY,
        include_finished_set: bool = False,
        log_stats: bool = False,
    ) -> None:
        self.config = nanocp_config.of(vllm_config)
        self.kv_cache_config = kv_cache_config
        self.block_size = block_size
        # Shards and prefixes are found by the blocks of one group; models with more are served unsharded.
        one_group = len(kv_cache_config.kv_cache_groups) == 1
        if not kv_cache_config.kv_cache_groups:
            refuse("a model that keeps no KV", "requests are placed by their KV", "serve it without --nanocp")
        if not one_group and self.config.degree_limit > 1:
            kinds = len(kv_cache_config.kv_cache_groups)
            refuse(f"a model with {kinds} kinds of KV cache and max_degree above 1", "shards are of one", UNSHARDED)
        self.log_stats = log_stats
        self.connector = None
        self.ec_connector = None
        spec = RankSpec(0, vllm_config, kv_cache_config, block_size, hash_block_size, include_finished_set, log_stats)
        self.ranks = make_ranks(spec, structured_output_manager, mm_registry)
        # Whether they schedule at the same time, in processes of their own.
        self.apart = bool(self.config.scheduler_processes)
        interval = vllm_config.scheduler_config.prefill_schedule_interval
        self.cadence = PrefillCadence(interval) if interval > 1 else None
        self.pacing = None if self.config.gap is None else Pacing(self.config.gap, self.ranks)
        self.collector = Collector()
        self.mover = Mover(
            self,
            self.config.move_config or MoveConfig(max_degree=self.config.degree_limit),
            moves=self.config.move_config is not None,
            generators=not vllm_config.use_v2_model_runner,  # V2 samples by seed and position
        )
        for number, rank in enumerate(self.ranks):
            rank.on_preempt = partial(self._on_preempt, number)
            rank.on_free = self._on_free
            rank.on_turn = self._on_turn
            rank.on_change = partial(self.mover.changed.add, number)
        max_model_len, queries = vllm_config.model_config.max_model_len, 1 + vllm_config.num_speculative_tokens
        # V1's runner makes its dummy batch of one token, V2's of as many as a request is decoded with.
        self.idle = idle_batch(queries if vllm_config.use_v2_model_runner else 1)
        self.graph_room = GraphRoom(self, visit_room(vllm_config))
        self.placer = Placer(
            self.ranks,
            self.config,
            block_size,
            max_model_len,
            one_group,
            self.mover.loads,
            stripe_blocks(vllm_config.scheduler_config, block_size, self.config.chunk_tokens, queries)
            if self.config.parallel_prefill
            else None,
            StepSegments(self),
            self.graph_room.has_room,
        )
        policy = SchedulingPolicy(vllm_config.scheduler_config.policy)
        self.by_priority = policy == SchedulingPolicy.PRIORITY
        self.waiting = create_request_queue(policy)
        # Requests in `waiting`, by id.
        self.unplaced: dict[str, Request] = {}
        # All that have not ended, by id. Where a rank's scheduler is of another process, a copy.
        self.requests: dict[str, Request] = {}
        # The rank whose scheduler and model runner know a request by its own id.
        self.rank_of: dict[str, int] = {}
        speculative = vllm_config.speculative_config
        tells_next = speculative is not None and speculative.use_eagle()
        self.members = Members(self.ranks, self.rank_of, block_size, self.config.decode_bench, log_stats, tells_next)
        self.sharded = self.members.sharded
        self.prefixes = SharedPrefixes(
            self.ranks,
            self.members,
            self.placer,
            self.waiting.prepend_request,
            self.by_priority,
        )
        # Members that ranks have preempted in the step at hand.
        self._preempted: list[str] = []
        self.failures = Failures()
        self.admission = Admission(self, create_request_queue, policy)
        self._pause_state = PauseState.UNPAUSED
        self.num_steps = self.num_sharded_steps = self.num_tokens = self.num_preemptions = 0
        # Preemptions while a rank still had blocks to spare.
        self.num_avoidable_preemptions = 0
        self._resetting = False
        # The last finished sharded requests: id -> KV tokens each rank held.
        self.finished_shares: OrderedDict[str, list[int]] = OrderedDict()
        self.readers = Readers(self)
        self.outlets = EngineOutlets(self.ranks)
        outlets.install_engine()
        status.install()
        kv_event_sources.install_engine()
        rank_hint.install_engine()

    # -- requests come and go ----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if self.failures.refuse(request):
            return
        rank, waiting = self.rank_of.get(request.request_id), self.unplaced.get(request.request_id)
        # The next part of a streaming-input session; or a duplicate id, which vLLM refuses.
        if waiting is not None and rank is not None:
            self.ranks[rank].queue_chunk(waiting, request)
            return
        if rank is not None:
            self.ranks[rank].add_chunk(request)
            return
        if waiting is not None:
            sessions.keep_chunk(waiting, request)
            return
        assert request.request_id not in self.sharded, "duplicate request id"
        sessions.begin(request)
        self.requests[request.request_id] = request
        if self.log_stats:
            request.record_event(EngineCoreEventType.QUEUED)
        self._wait(request)

    def _wait(self, request: Request, first: bool = False) -> None:
        request.num_computed_tokens = 0
        self.prefixes.leads_no_more(request.request_id)
        self.unplaced[request.request_id] = request
        home = self.rank_of.get(request.request_id)
        if home is not None:  # what it has in flight may yet come
            self.ranks[home].watch(request)
            self.ranks[home].refresh()  # the copy may be from when it entered
        (self.waiting.prepend_request if first else self.waiting.add_request)(request)

    def _on_turn(self, request_id: str, idle: bool) -> None:
        """A session has made its tokens after a rank had preempted it: if it waits in the queue here, and has its next
        chunk, it goes on to."""
        if request_id in self.unplaced:
            if not idle:
                return
            self._unqueue(request_id)
            self.ranks[self.rank_of[request_id]].unwatch(request_id)
        self.ranks[self.rank_of[request_id]].requeue(request_id)

    def _on_free(self, member_id: str) -> None:
        """A rank's scheduler has freed a finished request, or a member of one."""
        request_id = self.members.owner_of(member_id)
        if request_id in self.unplaced:  # it ended by output that was in flight when it was preempted
            self._unqueue(request_id)
        sharded = self.sharded.get(request_id)
        if sharded is not None:
            held = sharded.shard_map.tokens_by_rank(len(self.ranks), sharded.num_computed_tokens)
            logger.info("nanocp: request %s finished: KV tokens per rank %s", request_id, held)
            self.finished_shares[request_id] = held
            if len(self.finished_shares) > _REMEMBERED:
                self.finished_shares.popitem(last=False)
            self.members.close(sharded)
        self.rank_of.pop(request_id, None)
        self.requests.pop(request_id, None)
        self.members.outlet_of.pop(request_id, None)
        self.mover.forget(request_id)
        self.admission.forget(request_id)
        self.prefixes.leads_no_more(request_id)

    def _unqueue(self, request_id: str) -> Request:
        """A request that waits to be placed has ended."""
        request = self.unplaced.pop(request_id)
        # Both may remember it: one that has waited in vain for a prefix may now wait for an adapter's slot.
        if not any([self.admission.leave(request_id), self.prefixes.leave(request_id)]):
            self.waiting.remove_request(request)
        return request

    def _on_preempt(self, at: int, member_id: str) -> None:
        """A rank's scheduler has preempted a request; it is in the middle of a step, so this waits."""
        self._preempted.append(member_id)
        self.num_preemptions += 1
        if not self._resetting:
            room = any(
                rank.view.spare_blocks > 0 and load.slots > 0
                for rank, load in zip(self.ranks, self.mover.loads(), strict=True)
                if rank is not self.ranks[at]
            )
            self.num_avoidable_preemptions += room
            self.collector.preempted(rooms_elsewhere=room)

    def _settle(self) -> None:
        """Requests that a rank has preempted give up all their shards and wait for a new placement."""
        for member_id in self._preempted:
            request_id = self.members.owner_of(member_id)
            sharded, request = self.sharded.get(request_id), self.requests[request_id]
            if sharded is None or sharded.at_home:
                # The model runner keeps its sampling state: the home stays where it is.
                self.ranks[self.rank_of[request_id]].take_from_queues(request_id)
            else:
                self.ranks[sharded.rank].withdraw(member_id)
                request.num_preemptions += 1
                if self.log_stats:
                    request.record_event(EngineCoreEventType.PREEMPTED)
            if sharded is not None:
                self.members.close(sharded)
            self._wait(request, first=True)
        self._preempted.clear()

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is None:
            request_ids = list(self.requests)
        elif isinstance(request_ids, str):
            request_ids = [request_ids]
        ended: list[Request] = []
        for request_id in dict.fromkeys(request_ids):
            self.failures.forget(request_id)
            request = self.requests.get(request_id)
            if request is None:
                continue
            rank, sharded = self.rank_of.get(request_id), self.sharded.get(request_id)
            outlets.note_outlet(request, self.members.outlet_of.get(request_id, rank))
            if sharded is not None and not sharded.at_home:
                self.ranks[sharded.rank].end([sharded.member.request_id], finished_status)
            if rank is not None:  # perhaps from a time before its preemption
                self.ranks[rank].end([request_id], finished_status)
            elif sharded is not None:
                self.ranks[sharded.rank].note_finished(request_id, request.client_index)
            else:
                self._unqueue(request_id)
                self._unplaced_ended = True
                self.ranks[0].note_finished(request_id, request.client_index)
            self.requests.pop(request_id, None)
            request.status = finished_status
            ended.append(request)
        return ended

    # -- a step ------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> NanoCPSchedulerOutput:
        """One step of all ranks: requests on their way arrive, ranks without room spill, waiting requests are placed,
        each rank's vLLM scheduler schedules, and what visits what is written into the plan.

        Args:
            throttle_prefills: as vLLM's; ``PrefillCadence`` says so where the interval is set.
        """
        if self.cadence is not None:
            throttle_prefills = self.cadence.throttles(self.get_num_unfinished_requests(), self.ranks)
        self.members.begin_step()
        self._unplaced_ended = False
        for rank in self.ranks:
            for session_id in rank.take_outgrown():
                if session_id in self.requests:
                    self.admission.fail(self.requests[session_id])
        self.mover.step()
        self.admission.step()
        now = time.monotonic()
        if self.pacing is not None:
            self._allowed = self.pacing.begin(self.ranks)
        parts = self._schedule_ranks(throttle_prefills)
        self.mover.last_work = work = self.mover.work()
        self._settle()
        prompts = not throttle_prefills and (self._allowed is None or self._allowed[0] > 0)
        self.prefixes.observe(parts, prompts and self._pause_state == PauseState.UNPAUSED, self._allowed)
        if self.cadence is not None:
            self.cadence.note_backlog(bool(self.waiting) and not self.admission.cut_short)
        plan = self.members.take_plan()
        self.num_steps += 1
        plan.serial = self.num_steps
        self.num_sharded_steps += bool(plan.rows)
        plan.batches = batches_of(parts, self.idle)
        for rank in self.ranks:
            for request_id, tokens in rank.introduced.items():
                plan.arrived[request_id] = self.mover.arrival(request_id, tokens)
        output = merge(parts, plan)
        self.num_tokens += output.total_num_scheduled_tokens
        output.work, output.scheduled = work, now
        return output

    def _schedule_ranks(self, throttle_prefills: bool) -> list[Part]:
        """Let each rank schedule: all at once, but those that compute prompts together one after another, so that what
        one has computed enters the next in the same step. Where several are about to preempt, these too, and before all
        others: what the first gives up is room for the next ones."""
        together = self.members.order() if self.config.parallel_prefill else []
        short = self.mover.short_ranks() if self.apart else []
        crowded = len(short) > 1
        in_turn = [*together, *(rank for rank in short if crowded and rank not in together)]
        others = [rank for rank in range(len(self.ranks)) if rank not in in_turn]
        if not crowded:
            self.begin_schedule(others, throttle_prefills)
        parts: dict[int, Part] = {}
        for index in in_turn:
            # There is room now, for what the next rank would preempt; but no rank must be at work.
            if self._preempted and (crowded or not self.apart):
                self.mover.spill(index)
            self.begin_schedule([index], throttle_prefills)
            parts[index] = self.ranks[index].end_schedule()
            if index in together:
                self.members.advance({index: parts[index]})
        if crowded:
            self.begin_schedule(others, throttle_prefills)
        if self.apart:
            for index in reversed(others):
                self.ranks[index].wait()
        for index in others:
            if self._preempted and not self.apart:
                self.mover.spill(index)
            parts[index] = self.ranks[index].end_schedule()
        # Who enters now is scheduled with the next step.
        self.members.advance({index: part for index, part in parts.items() if index not in together})
        return [parts[index] for index in range(len(self.ranks))]

    def update_from_output(  # type: ignore[override]
        self, scheduler_output: SchedulerOutput, model_runner_output: list[ModelRunnerOutput]
    ) -> dict[int, EngineCoreOutputs]:
        """Hand each rank's output to its scheduler.

        Args:
            scheduler_output: of this class's ``schedule``.
            model_runner_output: one a rank.
        """
        assert isinstance(scheduler_output, NanoCPSchedulerOutput)
        if self.mover.learns:
            self.mover.observe(scheduler_output.parts, scheduler_output.work, scheduler_output.scheduled)
        if self.pacing is not None:
            self.pacing.observe(scheduler_output.parts, scheduler_output.scheduled)
        merged: dict[int, EngineCoreOutputs] = {}
        stats: list[SchedulerStats | PlainStats] = []
        reader = 0  # who is to have them
        if scheduler_output.plan.departing:
            states = {k: v for output in model_runner_output for k, v in generators_in(output).items()}
            self.mover.note_generators(scheduler_output.plan.departing, states)
        self.outlets.begin_step()
        for rank, part, output in zip(self.ranks, scheduler_output.parts, model_runner_output, strict=True):
            rank.begin_update(part, output)
        if self.apart:
            for rank in reversed(self.ranks):
                rank.wait()
        # Of requests that end now, too.
        outlet_of = dict(self.members.outlet_of)
        for answered, client, its, drafted in [rank.end_update() for rank in self.ranks]:
            self.collector.drafted(*drafted)
            if its is not None:
                reader = client if not stats else reader
                stats.append(its)
            for client, outputs in (self.outlets.forward(answered, outlet_of) if answered else {}).items():
                so_far = merged.setdefault(client, outputs)
                if so_far is not outputs:
                    so_far.outputs.extend(outputs.outputs)
                    if outputs.finished_requests:
                        so_far.finished_requests = (so_far.finished_requests or set()) | outputs.finished_requests
        self.failures.add_to(merged, self.outlets)
        self.outlets.send_foreign()
        if self.cadence is not None and not self.get_num_unfinished_requests():
            self.cadence.rest()
        if stats:
            self.readers.tell(stats, merged, reader)
        return merged

    # -- state -------------------------------------------------------------------------------------------------

    def make_stats(self) -> SchedulerStats | None:
        parts = [stats for rank in self.ranks if (stats := rank.make_stats()) is not None]
        return engine_stats(self, parts) if parts else None

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            self.mover.cancel()
            self._resetting = True
            for rank in self.ranks:
                rank.preempt_running()
                rank.all_give_way()
            self._resetting = False
            self._settle()
            for sharded in list(self.sharded.values()):  # those whose active member waits with its blocks
                self.members.take_back(sharded)
                self._wait(sharded.request, first=True)
        return all([rank.reset_prefix_cache(False, reset_connector) for rank in self.ranks])
