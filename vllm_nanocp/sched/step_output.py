# SPDX-License-Identifier: Apache-2.0
"""The scheduler's output for all ranks, in the shape EngineCore expects of one."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from ..placement.cost import StepLoad
from ..plan import Batch, StepPlan
from ..step_messages import StepMessage
from .rank.interface import Part


@dataclass
class NanoCPSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler outputs, one a rank, and the step plan.

    The inherited fields are the ranks' taken together: what EngineCore, its logs and its metrics read.

    Attributes:
        parts: what each rank has scheduled.
        plan: the same for all ranks.
        work: what each rank's running requests read and compute in this step; stays with the scheduler.
        scheduled: when, by ``time.monotonic``.
    """

    parts: list[Part] = field(default_factory=list)
    plan: StepPlan = field(default_factory=StepPlan)
    work: list[StepLoad] = field(default_factory=list)
    scheduled: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker reads its own rank's part and the plan, and decodes no more.
        parts = [p.payload if isinstance(p.payload, bytes) else pickle.dumps(p.payload, -1) for p in self.parts]
        return StepMessage, (parts, self.plan)


def merge(parts: Sequence[Part], plan: StepPlan) -> NanoCPSchedulerOutput:
    """Take the ranks' outputs together."""
    cached = CachedRequestData.make_empty()
    out = NanoCPSchedulerOutput(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={},
        total_num_scheduled_tokens=sum(part.tokens for part in parts),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(),
        free_encoder_mm_hashes=[],
        parts=list(parts),
        plan=plan,
    )
    out.has_structured_output_requests = any(part.structured for part in parts)
    out.pending_structured_output_tokens = any(part.pending for part in parts)
    for part in parts:
        if isinstance(part.payload, SchedulerOutput):
            _add(out, part.payload)
    return out


def _add(out: NanoCPSchedulerOutput, part: SchedulerOutput) -> None:
    """Add what EngineCore's logs say of a step in detail; ranks that are elsewhere do not tell."""
    cached = out.scheduled_cached_reqs
    out.num_scheduled_tokens.update(part.num_scheduled_tokens)
    out.scheduled_spec_decode_tokens.update(part.scheduled_spec_decode_tokens)
    out.scheduled_new_reqs.extend(part.scheduled_new_reqs)
    cached.req_ids.extend(part.scheduled_cached_reqs.req_ids)
    cached.resumed_req_ids |= part.scheduled_cached_reqs.resumed_req_ids
    cached.new_block_ids.extend(part.scheduled_cached_reqs.new_block_ids)
    cached.num_computed_tokens.extend(part.scheduled_cached_reqs.num_computed_tokens)
    cached.num_output_tokens.extend(part.scheduled_cached_reqs.num_output_tokens)
    out.finished_req_ids |= part.finished_req_ids
    encoder, part_encoder = out.scheduled_encoder_input_stats, part.scheduled_encoder_input_stats
    if encoder is None:
        out.scheduled_encoder_input_stats = copy(part_encoder)
    elif part_encoder is not None:
        encoder.num_inputs += part_encoder.num_inputs
        encoder.output_tokens += part_encoder.output_tokens
    if part.scheduled_encoder_inputs:
        out.scheduled_encoder_inputs.update(part.scheduled_encoder_inputs)


def batches_of(parts: Sequence[Part], idle: Batch) -> list[Batch]:
    """The ranks' batches, as their model runners will see them; empty when there are no tokens at all.

    Args:
        parts: the ranks'.
        idle: what a rank runs that has none beside one that has.
    """
    if not any(part.tokens for part in parts):
        return []
    return [part.batch if part.tokens else idle for part in parts]
