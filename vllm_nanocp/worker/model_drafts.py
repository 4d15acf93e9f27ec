# SPDX-License-Identifier: Apache-2.0
"""Drafts that a model makes (EAGLE, MTP), beside V1's runner: every rank runs the same forwards of it.

A step has as many forwards of the draft model as drafts, after the target's own. Its layers are in the target's KV
cache group, so its KV lies in the same shards, and each of its forwards is a sharded step of its own: the first with
the target's queries, the others with one query a row. So a sharded request's drafts are those of a request in one
place. The exchange that this takes is small beside the target's, since a draft model has few layers.

Whoever runs no tokens, and whoever drafts nothing, runs as many forwards: for the collectives of experts, and for its
guests. Touches vLLM 0.32's ``SpecDecodeBaseProposer`` (vllm/v1/spec_decode/llm_base_proposer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode import llm_base_proposer
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from ..attention.context import context
from ..errors import refuse
from ..plan import StepPlan


class ModelDrafts:
    """The draft model of a rank's V1 runner.

    Args:
        model_runner: vLLM's, with such a drafter.
        plan: of the step that runs; None outside of one.

    Attributes:
        num_sharded: forwards of the draft model with rows that visit, or guests of others.
        num_routed, num_captured: later ones of these that went over the routed exchange, and those from graphs; none
            with this runner.
    """

    def __init__(self, model_runner: Any, plan: Callable[[], StepPlan | None]) -> None:
        self.model_runner, self._plan = model_runner, plan
        self.drafter: EagleProposer = model_runner.drafter
        if type(self.drafter) is not EagleProposer:
            refuse(
                f"drafts by {type(self.drafter).__name__}",
                "only EAGLE, EAGLE3 and MTP that attends as its target have been run",
                "use the method ngram, or leave it out",
            )
        # Forwards whose sizes the ranks have agreed on in this step: the first one's, then one for all others.
        self._agreed = 0
        self._ask_ranks = llm_base_proposer.coordinate_batch_across_dp
        llm_base_proposer.coordinate_batch_across_dp = self._coordinate  # type: ignore[assignment]
        self._find_next = self.drafter.prepare_next_token_ids_padded
        next_tokens: Any = self._next_tokens
        self.drafter.prepare_next_token_ids_padded = next_tokens  # type: ignore[method-assign]
        self._advance = self.drafter._update_positions_dependent_metadata
        advance: Any = self._advance_within_blocks
        self.drafter._update_positions_dependent_metadata = advance  # type: ignore[method-assign]
        # A rank whose requests end soon drafts, too: the others count on its forwards, and on its guests'. What is
        # behind the longest request is written nowhere, and never verified.
        model_runner._input_fits_in_drafter = lambda common: common is not None
        self._dummy_run = self.drafter.dummy_run
        self.num_sharded = self.num_routed = self.num_captured = 0

    def note_batch(self, input_batch: Any) -> None:
        """V1's runner keeps its batch."""

    def put_off(self, run: Callable[[], Any]) -> None:
        """Run vLLM's dummy batch without the forwards of the draft model that are part of it: busy ranks draft when
        they sample, and the engine asks for that once all have answered."""
        self.drafter.dummy_run = lambda *args, **kwargs: None  # type: ignore[method-assign]
        try:
            run()
        finally:
            self.drafter.dummy_run = self._dummy_run  # type: ignore[method-assign]

    @torch.inference_mode()
    def run_idle(self) -> None:
        """The forwards that busy ranks run, on one without tokens: with its guests in a sharded step."""
        self._agreed = 0
        if context.step is None:
            self._dummy_run(1)
            return
        drafter, common = self.drafter, one_token(self.model_runner.device)
        for index in range(self.model_runner.num_spec_tokens):
            _, metadata = drafter.build_per_group_and_layer_attn_metadata(common, draft_index=index)
            if index <= 1:
                mode, size, across = drafter._determine_batch_execution_and_padding(1)
            with set_forward_context(
                metadata,
                drafter.vllm_config,
                num_tokens=size,
                num_tokens_across_dp=across,
                cudagraph_runtime_mode=mode,
                slot_mapping=drafter._get_slot_mapping(size, common.slot_mapping),
            ):
                drafter.model(
                    input_ids=drafter.input_ids[:size],
                    positions=drafter._get_positions(size),
                    inputs_embeds=None,
                    hidden_states=drafter.hidden_states[:size],
                )

    def _coordinate(self, num_tokens_unpadded: int, *args: Any, **kwargs: Any) -> Any:
        """What the ranks would ask each other before the first forward, and before the second, from the plan."""
        plan = self._plan()
        if plan is None:
            return self._ask_ranks(num_tokens_unpadded, *args, **kwargs)
        sizes = [batch.num_reqs if self._agreed else batch.num_tokens for batch in plan.batches]
        if context.step is not None:
            self.num_sharded += self.model_runner.num_spec_tokens - 1 if self._agreed else 1
        self._agreed += 1
        rank = self.drafter.dp_rank
        if num_tokens_unpadded != sizes[rank]:
            raise RuntimeError(f"nanocp: rank {rank} drafts for {num_tokens_unpadded} where the plan has {sizes[rank]}")
        return False, torch.tensor(sizes, dtype=torch.int32), CUDAGraphMode.NONE.value

    def _next_tokens(self, sampled: torch.Tensor, requests: Any, batch: Any, discarded: torch.Tensor) -> Any:
        """The token behind those that each request has computed. Where that is known it is no sample: in a prompt vLLM
        takes the last token for it, and a member's sample belongs to nobody."""
        self._agreed = 0
        tokens, counts = self._find_next(sampled, requests, batch, discarded)
        lengths = self.model_runner.optimistic_seq_lens_cpu
        for row in discarded[: batch.num_reqs].nonzero().flatten().tolist():
            tokens[row] = requests[batch.req_ids[row]].get_token_id(int(lengths[row]))
        plan = self._plan()
        for req_id, token in (plan.next_tokens if plan is not None else {}).items():
            row = batch.req_id_to_index.get(req_id)
            if row is not None:
                tokens[row] = token
        return tokens, counts

    def _advance_within_blocks(
        self, positions: torch.Tensor, common: Any, batch_size: int, input_batch_size: int, block_size: int
    ) -> torch.Tensor:
        """Go on to the next draft. Nobody takes blocks for drafts that are not verified yet, and a member has none
        behind its run: what has no block there is not kept, and later drafts of this step do not see it. Behind the
        longest request vLLM's kernel goes back to the first position, and would go on from there, in a block that
        others may share: it is told of the last position again."""
        last = self.drafter.max_model_len - 1
        ended = positions >= last
        positions = self._advance(positions, common, batch_size, input_batch_size, block_size)
        positions.masked_fill_(ended, last)
        table = self.model_runner.input_batch.block_table[self.drafter.kv_cache_gid]
        held = torch.from_numpy(table.num_blocks_per_row[:batch_size] * table.block_size)
        lengths, most = common.seq_lens[:batch_size], common.seq_lens_cpu_upper_bound
        if most is not None:
            torch.minimum(most[:batch_size], held.to(most.dtype), out=most[:batch_size])
        held = held.to(lengths)
        common.slot_mapping[:batch_size].masked_fill_(lengths > held, PADDING_SLOT_ID)
        torch.minimum(lengths, held, out=lengths)
        return positions


def one_token(device: torch.device) -> CommonAttentionMetadata:
    """vLLM's metadata of a batch of one token that sees itself only, in the null block."""
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=one,
        num_reqs=1,
        num_actual_tokens=1,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=torch.zeros((1, 1), dtype=torch.int32, device=device),
        slot_mapping=torch.full((1,), PADDING_SLOT_ID, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=one.cpu(),
    )
