# SPDX-License-Identifier: Apache-2.0
"""What travels between the scheduler and the workers in a step: parts of it, bitmasks, outputs. Its plan is beside."""

from __future__ import annotations

import pickle
from copy import copy
from dataclasses import dataclass

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from .plan import StepPlan


@dataclass
class StepMessage:
    """A step as it comes to the workers.

    Attributes:
        parts: for each rank, vLLM's scheduler output for its model runner, pickled.
        plan: the same for all ranks.
    """

    parts: list[bytes]
    plan: StepPlan

    def part(self, rank: int) -> SchedulerOutput:
        output: SchedulerOutput = pickle.loads(self.parts[rank])
        return output


@dataclass
class NanoCPGrammarOutput:
    """Bitmasks for structured output, one entry a rank (None: no such request there); pickled if from elsewhere."""

    ranks: list[GrammarOutput | bytes | None]

    def part(self, rank: int) -> GrammarOutput | None:
        bitmask = self.ranks[rank]
        return pickle.loads(bitmask) if isinstance(bitmask, bytes) else bitmask


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
