# SPDX-License-Identifier: Apache-2.0
"""The few things this package needs of vLLM 0.32's model runners, one small adapter each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.config.compilation import CUDAGraphMode

from ..attention.context import context
from ..plan import Batch, StepPlan

if TYPE_CHECKING:
    from .model_drafts import ModelDrafts
    from .speculator_drafts import SpeculatorDrafts


class RunnerAdapter(Protocol):
    """What the worker asks of a model runner.

    Attributes:
        plan: of the step that runs; None outside of one (warm-up, memory profiling).
        drafts: made by a model; None without them.
    """

    plan: StepPlan | None
    drafts: ModelDrafts | SpeculatorDrafts | None

    def batch_row(self, req_id: str) -> int:
        """Index of a request in the batch being prepared."""
        ...

    def generator_states(self, req_ids: list[str]) -> dict[str, bytes]:
        """States of the generators of those requests that this runner knows, if it samples with such."""
        ...

    def run_idle(self, attention: bool) -> None:
        """A forward pass without tokens of this rank's own, for the collectives of the others.

        Args:
            attention: whether attention must run too (guests, or the exchange's collectives).
        """
        ...


class V1Runner:
    """``vllm/v1/worker/gpu_model_runner.py``. Its ``coordinate_batch_across_dp`` is answered from the plan when there
    are no graphs, whose padding only the other ranks know."""

    def __init__(self, model_runner: Any) -> None:
        from vllm.v1.worker import gpu_model_runner as module
        from vllm.v1.worker.gpu_input_batch import InputBatch

        self.model_runner = model_runner
        self.plan: StepPlan | None = None
        add_request = InputBatch.add_request

        def add_with_outputs(batch: Any, request: Any) -> int:
            """V1's new requests have a prompt only; one that comes from another rank has made tokens there."""
            arrival = None if self.plan is None else self.plan.arrived.pop(request.req_id, None)
            if arrival is not None:
                request.output_token_ids.extend(arrival.tokens)
                if arrival.generator is not None:
                    state = torch.frombuffer(bytearray(arrival.generator), dtype=torch.uint8)
                    request.generator.set_state(state)
            return add_request(batch, request)

        InputBatch.add_request = add_with_outputs  # type: ignore[method-assign, assignment]
        mode = model_runner.compilation_config.cudagraph_mode
        if mode is None or mode == CUDAGraphMode.NONE:
            self._ask_ranks = module.coordinate_batch_across_dp
            module.coordinate_batch_across_dp = self._coordinate  # type: ignore[assignment]
        self.drafts: ModelDrafts | SpeculatorDrafts | None = None
        speculative = model_runner.speculative_config
        if speculative is not None and speculative.use_eagle():
            from .model_drafts import ModelDrafts

            self.drafts = ModelDrafts(model_runner, lambda: self.plan)

    def _coordinate(self, num_tokens_unpadded: int, *args: Any, **kwargs: Any) -> Any:
        if self.plan is None:
            return self._ask_ranks(num_tokens_unpadded, *args, **kwargs)
        tokens = torch.tensor([batch.num_tokens for batch in self.plan.batches], dtype=torch.int32)
        rank = self.model_runner.parallel_config.data_parallel_rank
        _check(num_tokens_unpadded == tokens[rank], num_tokens_unpadded, self.plan, rank)
        return False, tokens, CUDAGraphMode.NONE.value

    def batch_row(self, req_id: str) -> int:
        return int(self.model_runner.input_batch.req_id_to_index[req_id])

    def generator_states(self, req_ids: list[str]) -> dict[str, bytes]:
        known = self.model_runner.requests
        generators = {r: known[r].generator for r in req_ids if r in known and known[r].generator is not None}
        return {req_id: generator.get_state().numpy().tobytes() for req_id, generator in generators.items()}

    def run_idle(self, attention: bool) -> None:
        def run() -> None:
            with _adapters_kept(self.model_runner):
                self.model_runner._dummy_run(1, uniform_decode=True, force_attention=attention)

        run() if self.drafts is None else self.drafts.put_off(run)


class V2Runner:
    """``vllm/v1/worker/gpu/model_runner.py``. Its batch exists only inside a step: ``prepare_attn`` is handed it
    just before attention metadata is built, so the order of its requests is noted there. Its
    ``dispatch_cg_and_sync_dp`` is answered from the plan, and its manager of graphs is this package's."""

    def __init__(self, model_runner: Any) -> None:
        from vllm.v1.worker.gpu import model_runner as module

        from .sharded_graphs import NanoCPCudaGraphManager

        self.model_runner = model_runner
        self.plan: StepPlan | None = None
        self.drafts: ModelDrafts | SpeculatorDrafts | None = None
        self._rows: dict[str, int] = {}
        self._prepare_attn = model_runner.prepare_attn
        model_runner.prepare_attn = self._note_rows
        # What these runs need depends on what only their rank knows: adapters, encoder inputs.
        self._must_ask = model_runner.lora_config is not None or model_runner.is_encoder_decoder
        self._ask_ranks = module.dispatch_cg_and_sync_dp
        module.dispatch_cg_and_sync_dp = self._dispatch  # type: ignore[assignment]
        module.ModelCudaGraphManager = NanoCPCudaGraphManager  # type: ignore[misc]
        speculative = model_runner.speculative_config
        if speculative is not None and speculative.use_eagle():
            from .speculator_drafts import SpeculatorDrafts

            self.drafts = SpeculatorDrafts(model_runner, lambda: self.plan)

    def _note_rows(self, input_batch: Any) -> Any:
        self._rows = {req_id: row for row, req_id in enumerate(input_batch.req_ids)}
        if self.drafts is not None:
            self.drafts.note_batch(input_batch)
        return self._prepare_attn(input_batch)

    def _dispatch(
        self,
        manager: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        dp_size: int,
        dp_rank: int,
        **kwargs: Any,
    ) -> Any:
        """Stock's answer without its all-reduce, or a graph that knows shards.

        Where the ranks must be asked, sharded steps run attention outside of graphs.
        """
        from .dp_agreement import agree, capacity_of

        plan, step = self.plan, context.step
        if plan is None or self._must_ask:
            if step is not None:
                uniform_token_count = None
                kwargs |= dict(max_query_len=None, uniform_decode=False)
            return self._ask_ranks(manager, num_reqs, num_tokens, uniform_token_count, dp_size, dp_rank, **kwargs)
        mine = plan.batches[dp_rank]
        seen = Batch(num_reqs, num_tokens, uniform_token_count or 0)
        _check(seen == mine, tuple(seen), plan, dp_rank)
        visits = plan.most_visits(dp_size, context.queries) if step is not None else None
        desc, state = agree(manager, plan.batches, dp_rank, step is not None, visits)
        if step is not None and capacity_of(desc):
            step.capacity, step.captured = capacity_of(desc), True
        return desc, state

    def batch_row(self, req_id: str) -> int:
        return self._rows[req_id]

    def generator_states(self, req_ids: list[str]) -> dict[str, bytes]:
        return {}  # it samples by seed and position

    def run_idle(self, attention: bool) -> None:
        def run() -> None:
            with _adapters_kept(self.model_runner):
                self.model_runner._dummy_run(1, uniform_decode=True)  # always with attention

        run() if self.drafts is None else self.drafts.put_off(run)


@contextmanager
def _adapters_kept(model_runner: Any) -> Iterator[None]:
    """A pass without requests uses no LoRA adapter, and loads and unloads none.

    vLLM's loads stand-ins by the numbers 1 to ``max_loras`` and unloads all adapters behind it, as before serving.
    Where some of these numbers are adapters of requests, V2's cannot find the stand-ins for the others, and raises;
    else the requests' adapters are read from disk again in each step that follows one without tokens.
    """
    if model_runner.lora_config is None:
        yield
        return

    def without(lora_config: Any, num_scheduled_tokens: Any, *_: Any, **__: Any) -> Any:
        return model_runner.maybe_select_dummy_loras(lora_config, num_scheduled_tokens)

    model_runner.maybe_dummy_run_with_lora = without
    try:
        yield
    finally:
        del model_runner.maybe_dummy_run_with_lora


def _check(same: Any, seen: Any, plan: StepPlan, rank: int) -> None:
    """A rank that sees another batch than the plan says would leave the others waiting in a collective: say so now."""
    if not same:
        raise RuntimeError(f"nanocp: rank {rank} runs {seen} where the step plan has {plan.batches[rank]}")
