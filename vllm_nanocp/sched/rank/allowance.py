# SPDX-License-Identifier: Apache-2.0
"""Doors for prefill steps (``placement.prefill_steps``): how much of prompts a rank may compute in a step.

Touches vLLM 0.32's ``Scheduler._reserve_prefill_lookahead``, which its scheduler asks of each request, running or
waiting, how many of so many tokens it may compute: none lets a running one be passed over, and those that wait go on
waiting. It is asked of each that decodes, so the doors' answer (``cut_chunk``) takes vLLM's place only for a part of a
step: with something allowed for all of it, else from ``_handle_blocked_waiting_request`` on, which vLLM asks of each
request that waits once those that run have had their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from ...placement.prefill_steps import Allowance, pairs_of
from .interface import Allowed, Part

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class AllowanceDoors(_Base):
    """Mixed into vLLM's scheduler: what is computed of prompts."""

    # Part of what is allowed that is for prompts which are short, while there are any; ``ChunkDoors`` knows.
    short_part = 0.0
    # Tokens of prompts that get less of a step than they could take, by id; ``ChunkDoors`` knows.
    shares: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allowance: Allowance | None = None

    def is_long(self, request: Request) -> bool:
        """Whether a prompt leaves a part of a step to short ones; ``ChunkDoors`` knows."""
        raise NotImplementedError

    def allow(self, allowed: Allowed) -> None:
        """Before a step."""
        self._allowance = None if allowed is None else Allowance(*allowed, first=allowed[0] > 0)

    @property
    def held_back(self) -> bool:
        """Whether the step at hand computes no prompts."""
        return self._allowance is not None and self._allowance.tokens == 0 and not self._allowance.first

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._allowance is not None or self.shares:
            self._cut_chunks()
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.__dict__.pop("_reserve_prefill_lookahead", None)

    def _cut_chunks(self) -> None:
        """From here on in this step vLLM's scheduler asks the doors."""
        self._reserve_prefill_lookahead = self.cut_chunk  # type: ignore[method-assign, assignment]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        self._cut_chunks()
        return super()._handle_blocked_waiting_request(request)

    def cut_chunk(self, request: Request, computed: int, most: int) -> int:
        """How many tokens a request may compute in the step at hand.

        Args:
            request: runs, or would start now.
            computed: tokens of it.
            most: tokens that it could compute.

        Returns:
            None at all: it is passed over, or goes on waiting.
        """
        tokens = Scheduler._reserve_prefill_lookahead(self, request, computed, most)
        # Chunks of models with a recurrent state end where it is kept, and an encoder's input is chosen for its chunk.
        if self._allowance is None or self.need_mamba_block_aligned_split or request.has_encoder_inputs:
            return tokens
        if self._decodes(request, computed):
            return tokens
        if self.short_part and self.is_long(request):
            return self._allowance.take_part(1 - self.short_part, computed, tokens)
        return self._allowance.take(computed, tokens)

    def _decodes(self, request: Request, computed: int) -> bool:
        """Whether no prompt is left; one that has come with drafts may compute a part of a block again."""
        left = request.num_tokens - computed
        return left <= 1 or (left <= self.block_size and request.num_output_tokens > 0)

    def part_of(self, output: SchedulerOutput) -> Part:
        """The step as the other ranks' scheduler sees it. Drafts are no prompts."""
        part, drafts = Part.of(output), output.scheduled_spec_decode_tokens
        if part.tokens > len(output.num_scheduled_tokens) + sum(map(len, drafts.values())):
            for request_id, tokens in output.num_scheduled_tokens.items():
                if tokens > 1 + len(drafts.get(request_id, ())):
                    request = self.requests[request_id]
                    at = request.num_computed_tokens - tokens
                    if not self._decodes(request, at):
                        part.prompt_tokens += tokens
                        part.prompt_pairs += pairs_of(at, tokens)
        return part
