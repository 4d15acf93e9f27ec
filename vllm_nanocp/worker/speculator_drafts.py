# SPDX-License-Identifier: Apache-2.0
"""Drafts that a model makes (EAGLE, MTP), beside V2's runner: every rank runs the same forwards of it.

What ``model_drafts.py`` says of V1's holds here, too; vLLM's code is another. Its speculator takes the target's
metadata for the first forward, with its tables of shards, and its sizes from what the ranks agreed on for the target,
without a question to them. So what is left to do is this: sharded steps draft from graphs that know shards, or from
none, and each later forward has tables of its own; nothing is written or read behind the blocks that a request has;
members draft from the token that follows them; and ranks without tokens draft when the others do.

Touches vLLM 0.32's ``TargetDependentARSpeculator`` (vllm/v1/worker/gpu/spec_decode/target_dependent_ar/speculator.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.mtp.speculator import MTPSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as module
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import TargetDependentARSpeculator

from ..attention.context import context
from ..errors import refuse
from ..plan import StepPlan
from .sharded_graphs import NanoCPDraftGraphManager, ShardedDescriptor


class HeldTables:
    """The runner's block tables as its speculator sees them: positions behind a request's blocks have no slot.

    Args:
        tables: vLLM's ``BlockTables``.
        keep: called with the slots, [groups, tokens] int64, and the positions, [tokens] int64, of a forward of so many
            requests with one query each.
    """

    def __init__(self, tables: Any, keep: Callable[[torch.Tensor, torch.Tensor, int], None]) -> None:
        self._tables, self._keep = tables, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tables, name)

    def compute_slot_mappings(
        self, idx_mapping: torch.Tensor, query_start_loc: torch.Tensor, positions: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        slots: torch.Tensor = self._tables.compute_slot_mappings(idx_mapping, query_start_loc, positions, *args)
        self._keep(slots, positions, len(idx_mapping))
        return slots


class SpeculatorDrafts:
    """The draft model of a rank's V2 runner.

    Args:
        model_runner: vLLM's, with such a speculator.
        plan: of the step that runs; None outside of one.

    Attributes:
        num_sharded: forwards of the draft model with rows that visit, or guests of others.
        num_routed: later ones of these that went over the routed exchange.
        num_captured: of ``num_sharded`` those that replayed a graph.
    """

    def __init__(self, model_runner: Any, plan: Callable[[], StepPlan | None]) -> None:
        self.model_runner, self._plan = model_runner, plan
        self.speculator = speculator = cast(TargetDependentARSpeculator, model_runner.speculator)
        if type(speculator) not in (EagleSpeculator, MTPSpeculator):
            refuse(
                f"drafts by {type(speculator).__name__}",
                "only EAGLE, EAGLE3 and MTP that attends as its target have been run",
                "use the method ngram_gpu, or leave it out",
            )
        self.num_sharded = self.num_routed = self.num_captured = 0
        # Tokens that fit a request's blocks, by its row in the batch. Graphs know the addresses.
        most = torch.iinfo(torch.int32).max
        self._held = torch.full((speculator.max_num_reqs,), most, dtype=torch.int32, device=speculator.device)
        self._ended = torch.zeros(speculator.max_num_reqs, dtype=torch.bool, device=speculator.device)
        self._postpones = False
        self._postponed: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._set_attn, self._run = speculator.set_attn, speculator.propose
        self._build = speculator._build_uniform_attn_metadata
        speculator.set_attn = self._attend_to_held  # type: ignore[method-assign, assignment]
        speculator.propose = self._propose  # type: ignore[method-assign, assignment]
        speculator._build_uniform_attn_metadata = self._build_later  # type: ignore[method-assign]
        self._fused = speculator._generate_fused_drafts
        speculator._generate_fused_drafts = self._generate  # type: ignore[method-assign]
        self._agree = module.dispatch_cg_and_sync_dp
        module.dispatch_cg_and_sync_dp = self._dispatch  # type: ignore[assignment]
        module.SpeculatorCudaGraphManager = NanoCPDraftGraphManager  # type: ignore[misc]

    def note_batch(self, input_batch: Any) -> None:
        """How far the blocks of a batch reach, while vLLM's numbers of them are this step's."""
        tables, count = self.speculator.block_tables, input_batch.num_reqs
        held = tables.num_blocks.gpu.index_select(1, input_batch.idx_mapping[:count])
        torch.amin(held * tables.block_sizes_tensor[:, None], 0, out=self._held[:count])

    def put_off(self, run: Callable[[], Any]) -> None:
        """Run vLLM's dummy batch without the drafting that is part of it: busy ranks draft when they sample."""
        self._postpones = True
        try:
            run()
        finally:
            self._postpones = False

    def run_idle(self) -> None:
        """The forwards that busy ranks run, on one without tokens: with its guests in a sharded step."""
        assert self._postponed is not None
        (args, kwargs), self._postponed = self._postponed, None
        self._propose(*args, **kwargs)

    @torch.inference_mode()
    def _propose(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """In place of vLLM's ``propose``."""
        if self._postpones:
            self._postponed = args, kwargs
            return None
        speculator = self.speculator
        self._tell_next()
        in_place = speculator.supports_decode_metadata_update
        if context.step is not None:
            self.num_sharded += speculator.num_speculative_steps
            if context.draft_step is not None and context.draft_step.capacity:
                self.num_routed += speculator.num_speculative_steps - 1
            # vLLM would go on with one forward's metadata, with new lengths; the rows that visit are not in these.
            speculator.supports_decode_metadata_update = False
        try:
            drafts: torch.Tensor = self._run(*args, **kwargs)
            return drafts
        finally:
            speculator.supports_decode_metadata_update = in_place

    def _tell_next(self) -> None:
        """A draft model takes in the token behind each one. Behind a member's run it is known, and no sample: what the
        member has sampled belongs to nobody."""
        plan, states = self._plan(), self.model_runner.req_states
        for req_id, token in plan.next_tokens.items() if plan is not None else ():
            row = states.req_id_to_index.get(req_id)
            if row is not None:
                states.last_sampled_tokens[row].fill_(token)
                states.next_prefill_tokens[0, row].fill_(token)

    def _dispatch(self, manager: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """In place of ``dispatch_cg_and_sync_dp``: in a sharded step a graph that knows shards, or none. All ranks find
        the same: the first forward goes by what they have found for the target, later ones by the most requests of any
        rank and a capacity that the plan says."""
        if context.step is None:
            return self._agree(manager, num_reqs, num_tokens, *args, **kwargs)
        first = manager is self.speculator.prefill_cudagraph_manager
        desc = (self._first_graph if first else self._later_graph)(manager, num_tokens)
        if desc is None:
            # Where the target's attention is outside of graphs, so is the first forward's: what the ranks have agreed
            # on leaves vLLM graphs of what is around it only.
            eager = kwargs.get("need_eager", False) or not first or context.step.captured
            return self._agree(manager, num_reqs, num_tokens, *args, **kwargs | dict(need_eager=eager))
        self.num_captured += 1 if first else self.speculator.num_speculative_steps - 1
        return desc, kwargs["dp_sync_state"]

    def _first_graph(self, manager: Any, num_tokens: int) -> ShardedDescriptor | None:
        """The graph of the target's size. Another would read other tables than those that its metadata has filled."""
        step = context.step
        if step is None or not step.captured:
            return None
        desc: ShardedDescriptor | None = manager.sharded_graph(num_tokens, step.capacity)
        same = desc is not None and (desc.num_tokens, desc.capacity) == (num_tokens, step.capacity)
        return desc if same else None

    def _later_graph(self, manager: Any, num_tokens: int) -> ShardedDescriptor | None:
        """One of a forward with a token a request. The step's tables become those of its capacity."""
        later = context.draft_step
        if manager is None or later is None or not later.capacity:
            return None
        desc: ShardedDescriptor | None = manager.sharded_graph(num_tokens, later.capacity)
        if desc is not None:
            later.capacity = desc.capacity
        return desc

    def _generate(self, *args: Any, **kwargs: Any) -> None:
        """vLLM records all later forwards as one graph. In a sharded step each has tables of its own, so there a graph
        is of one."""
        run = self._fused if context.draft_step is None else self.speculator._generate_draft
        run(*args, **kwargs)

    def _build_later(self, *args: Any, **kwargs: Any) -> Any:
        """Metadata of a forward after the first."""
        context.draft_index = kwargs["step"]
        try:
            return self._build(*args, **kwargs)
        finally:
            context.draft_index = 0

    def _attend_to_held(self, model_state: Any, kv_cache_config: Any, block_tables: Any, *args: Any) -> None:
        self._set_attn(model_state, kv_cache_config, HeldTables(block_tables, self._keep), *args)  # type: ignore[arg-type]

    def _keep(self, slots: torch.Tensor, positions: torch.Tensor, count: int) -> None:
        """Nobody takes blocks for drafts that are not verified yet, and a member has none behind its run: what has no
        block is not kept, and later drafts of the step do not see it."""
        held, ended, lengths = self._held[:count], self._ended[:count], self.speculator.input_buffers.seq_lens[:count]
        torch.ge(positions[:count], held, out=ended)
        slots[:, :count].masked_fill_(ended, PAD_SLOT_ID)
        torch.minimum(lengths, held, out=lengths)
