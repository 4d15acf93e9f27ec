# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker as one of N ranks in one world. Touches ``Worker`` and ``CPUWorker`` of vLLM 0.32."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_dp_group
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput

from .. import config as nanocp_config
from .. import patches
from ..attention.context import context
from ..attention.families import family_of
from ..attention.supported import check_layers
from ..exchange import CollectiveExchange
from ..step_messages import NanoCPGrammarOutput, PackedOutput, StepMessage, with_generators
from . import queues
from .rank_step import ShardTable, make_step
from .runner import RunnerAdapter, V1Runner, V2Runner

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

    from ..attention.family import Family

    _Base = Worker
else:
    _Base = object

# With ``decode_bench`` prompts are not computed. This variable sets the number that their KV holds; without it that is
# 0.015, as vLLM's DecodeBenchConnector has it. A model without weights picks its experts by it, so steps take longer or
# shorter.
BENCH_KV = "NANOCP_DECODE_BENCH_KV"


class OneRank(_Base):
    """Mixed into vLLM's worker: derives its rank from its place in the world, and runs its part of each step.

    The engine's configuration knows one data-parallel rank; each worker changes its own copy to say N, and which of
    them it is, before vLLM builds process groups, experts and attention from it. ``rank`` is its number among the
    workers of its rank, as in stock data parallelism; ``global_rank`` the one in the world.
    """

    shards: ShardTable
    runner: RunnerAdapter
    family: Family
    _generators: dict[str, bytes]
    _failed = False
    num_sharded_steps = 0
    num_captured_steps = 0
    num_routed_steps = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
        **kwargs: Any,
    ) -> None:
        self.nanocp = nanocp_config.of(vllm_config)
        context.queries = 1 + vllm_config.num_speculative_tokens
        parallel = vllm_config.parallel_config
        tp_size = parallel.tensor_parallel_size
        parallel.world_size = tp_size
        parallel.data_parallel_size = self.nanocp.ranks
        parallel.data_parallel_size_local = self.nanocp.ranks
        parallel.data_parallel_rank = parallel.data_parallel_index = rank // tp_size
        parallel.data_parallel_rank_local = local_rank // tp_size
        self.global_rank, self.tp_rank = rank, rank % tp_size
        patches.apply_all()
        queues.install()
        if self.nanocp.degree_limit > 1:
            self.family = family_of(vllm_config)
            self.family.register()
        super().__init__(
            vllm_config, local_rank % tp_size, rank % tp_size, distributed_init_method, is_driver_worker, **kwargs
        )

    def init_device(self) -> None:
        super().init_device()
        assert self.device is not None
        context.exchange = exchange = CollectiveExchange(get_dp_group().device_group)
        if self.nanocp.degree_limit > 1:
            exchange.warm_up(self.device)
        self.shards = ShardTable(self.parallel_config.data_parallel_rank, self.device)
        self.runner = (V2Runner if self.use_v2_model_runner else V1Runner)(self.model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.nanocp.degree_limit == 1:
            return
        layers = check_layers(self.vllm_config.compilation_config.static_forward_context, self.family)
        self.family.attach(layers)

    def attention_layers(self) -> dict[str, Any]:
        """vLLM's attention layers of the model, by name."""
        layers = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in layers.items() if getattr(layer, "impl", None) is not None}

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        if self.nanocp.decode_bench:
            value = float(os.environ.get(BENCH_KV, "0.015"))
            for cache in self.model_runner.kv_caches:
                if cache.is_floating_point():
                    cache.fill_(value)
        return times

    def execute_model(  # type: ignore[override]
        self, scheduler_output: StepMessage | SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """One step of this rank: shards opened and closed, what attention needs laid out, vLLM's model runner, and, if
        the rank has no tokens while others have, a pass without any, for the others' collectives.

        Args:
            scheduler_output: of all ranks. This one decodes its part and the plan.

        Returns:
            As vLLM's worker; a rank without tokens answers, too.

        Raises:
            RuntimeError: an earlier step has failed here. The other ranks may still wait in it, and would take what
                this one did in a later step for its part of that.
        """
        self._check_whole()
        if not isinstance(scheduler_output, StepMessage):
            # vLLM's V2 runner warms up with steps of its own, the same on all ranks.
            self._idle = False
            self._generators = {}
            return super().execute_model(scheduler_output)
        try:
            output = self._run(scheduler_output)
        except BaseException:
            self._failed = True
            self._end_step()
            raise
        if self.runner.drafts is None or not scheduler_output.plan.batches:
            self._end_step()
        return self._reply(output)

    def _run(self, message: StepMessage) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """The step itself. What it leaves of its state is for ``sample_tokens``."""
        plan = message.plan
        part = message.part(self.shards.rank)
        self.shards.update(plan)
        context.step = make_step(plan, self.shards, self.nanocp.ranks, self.runner.batch_row)
        if self.runner.drafts is not None:
            context.draft_step = make_step(plan, self.shards, self.nanocp.ranks, self.runner.batch_row, queries=1)
            if context.draft_step is not None:
                context.draft_step.capacity = _smallest(context.draft_routes, plan.most_visits(self.nanocp.ranks, None))
        if context.step is not None and context.routes:  # else the runner sets it, once it has chosen a graph
            context.step.capacity = _smallest(context.routes, plan.most_visits(self.nanocp.ranks, context.queries))
        self.runner.plan = plan
        self._generators = self.runner.generator_states(plan.departing) if plan.departing else {}
        output = super().execute_model(part)
        self._idle = not part.total_num_scheduled_tokens
        if self._idle and plan.batches:
            self.runner.run_idle(attention=context.step is not None)
        if context.step is not None:
            self.num_sharded_steps += 1
            self.num_captured_steps += context.step.captured
            self.num_routed_steps += bool(context.routes and context.step.capacity)
        return output

    def _check_whole(self) -> None:
        if self._failed:
            raise RuntimeError(f"nanocp: rank {self.shards.rank} has failed in a step")

    def _end_step(self) -> None:
        context.step = context.draft_step = self.runner.plan = None

    def nanocp_counters(self) -> dict[str, int]:
        """Sharded steps of this worker; those that replayed a graph with it, those over the routed exchange. And
        sharded forwards of a draft model; those that replayed a graph; of those after its first, how many over the
        routed exchange."""
        drafts = self.runner.drafts
        return {
            "sharded_drafts": 0 if drafts is None else drafts.num_sharded,
            "captured_drafts": 0 if drafts is None else drafts.num_captured,
            "routed_drafts": 0 if drafts is None else drafts.num_routed,
            "sharded_steps": self.num_sharded_steps,
            "captured_steps": self.num_captured_steps,
            "routed_steps": self.num_routed_steps,
        }

    def sample_tokens(  # type: ignore[override]
        self, grammar_output: NanoCPGrammarOutput | GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """As vLLM's worker. A draft model runs here, on a rank without tokens, too.

        Raises:
            RuntimeError: the step has failed here. With async scheduling the engine looks at this answer, not at that
                of ``execute_model``, and the other ranks, which wait for this one in a collective, have none.
        """
        self._check_whole()
        try:
            if self._idle:
                if self.runner.plan is not None and self.runner.drafts is not None:
                    self.runner.drafts.run_idle()
                return self._reply(EMPTY_MODEL_RUNNER_OUTPUT)
            if isinstance(grammar_output, NanoCPGrammarOutput):
                grammar_output = grammar_output.part(self.shards.rank)
            return self._reply(super().sample_tokens(grammar_output))
        finally:
            self._end_step()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts of the requests in the last step; a rank without tokens has those of an earlier one still."""
        drafts: DraftTokenIds | None = None if self._idle or self.tp_rank else super().take_draft_token_ids()
        return drafts

    def _reply(
        self, output: ModelRunnerOutput | AsyncModelRunnerOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """The rank's answer, from its first worker only; with the generators of departing requests, if any."""
        if self.tp_rank != 0 or output is None:
            return None
        # Kept for the whole step: an idle rank is asked twice, and its first answer dropped, when others sample.
        generators = self._generators
        packs = self.nanocp.scheduler_processes is True
        if not generators and not packs:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            wait = output.get_output
            output.get_output = lambda: _dressed(wait(), generators, packs)  # type: ignore[method-assign, assignment, return-value]
            return output
        return _dressed(output, generators, packs)  # type: ignore[return-value]


def _smallest(capacities: Iterable[int], visits: int | None) -> int:
    """The smallest that is enough for a step; 0 if none is."""
    return 0 if visits is None else min((c for c in capacities if c >= visits), default=0)


def _dressed(output: ModelRunnerOutput, generators: dict[str, bytes], packs: bool) -> ModelRunnerOutput | PackedOutput:
    """An answer with the generators of departing requests, packed if its scheduler is elsewhere."""
    if generators:
        output = with_generators(output, generators)
    return PackedOutput.of(output) if packs else output
