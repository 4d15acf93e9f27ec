# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a step: what its scheduler says of it, and what its model runner answers."""

from __future__ import annotations

import pickle
from copy import copy
from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from ...plan import Batch
from .interface import Part


def batch_of(part: SchedulerOutput) -> Batch:
    """A rank's batch as its model runner will see it."""
    num_reqs, num_tokens = len(part.num_scheduled_tokens), part.total_num_scheduled_tokens
    # One token each; a request's first token is no decode, though it may be its only one.
    decode = (
        num_tokens == num_reqs
        and all(part.scheduled_cached_reqs.num_computed_tokens)
        and all(request.num_computed_tokens for request in part.scheduled_new_reqs)
    )
    return Batch(num_reqs, num_tokens, decode)


def part_of(output: SchedulerOutput) -> Part:
    """What one rank has scheduled, for who takes the ranks together."""
    return Part(
        tokens=output.total_num_scheduled_tokens,
        batch=batch_of(output),
        scheduled=output.num_scheduled_tokens,
        structured=output.has_structured_output_requests,
        pending=output.pending_structured_output_tokens,
        payload=output,
    )


def with_generators(output: ModelRunnerOutput, generators: dict[str, bytes]) -> ModelRunnerOutput:
    """A copy of a rank's output that carries states of generators, by request; see ``generators_in``."""
    output = copy(output)
    output.nanocp_generators = generators  # type: ignore[attr-defined]
    return output


@dataclass
class PackedOutput:
    """A rank's output on its way to a scheduler in another process: nobody in between decodes it.

    Attributes:
        data: vLLM's output, pickled.
        nanocp_generators: see ``with_generators``.
    """

    data: bytes
    nanocp_generators: dict[str, bytes]

    @classmethod
    def of(cls, output: ModelRunnerOutput) -> PackedOutput:
        return cls(pickle.dumps(output, -1), generators_in(output))


def generators_in(output: ModelRunnerOutput | PackedOutput) -> dict[str, bytes]:
    """What ``with_generators`` has put into an output."""
    found: dict[str, bytes] = getattr(output, "nanocp_generators", {})
    return found
