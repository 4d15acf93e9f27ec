# SPDX-License-Identifier: Apache-2.0
"""Draft tokens at one rank: they take only blocks that nobody else needs, and go with a request to its new home.

vLLM's scheduler preempts for the blocks of drafts, which most likely are given back in the next step. Here a rank with
too few blocks verifies fewer drafts instead: nobody is preempted or spilled for them, and a request that just fits its
rank ends there. Touches vLLM 0.32's ``Scheduler.num_spec_tokens``, ``_update_after_schedule``,
``Request.spec_token_ids`` and ``Request.spec_decode_metrics``.

With async scheduling, and with the V2 model runner, the drafts themselves are in the model runner's memory, and the
scheduler has only how many there are. They cannot go along: a request goes on without at its new home.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from ...placement import cdiv
from ...plan import is_keeper
from .interface import Decoding, Part
from .view_doors import ViewDoors


class Speculation(NamedTuple):
    """What speculative decoding keeps of a request.

    Attributes:
        drafts: tokens to verify in the next step.
        metrics: vLLM's ``RequestSpecDecodeMetrics``, if it keeps any.
    """

    drafts: list[int]
    metrics: Any

    @classmethod
    def of(cls, request: Request) -> Speculation:
        return cls(request.spec_token_ids, request.spec_decode_metrics)

    def apply(self, request: Request) -> None:
        request.spec_token_ids, request.spec_decode_metrics = self.drafts, self.metrics


class DraftDoors(ViewDoors):
    """Mixed into vLLM's scheduler: drafts where there is no block for them, and who may leave."""

    # Drafts a step, kept while ``num_spec_tokens`` says that there are none; and blocks that a step's placeholders of
    # drafts may take.
    _most_drafts = 0
    _room = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM takes blocks for what a draft model writes beyond the tokens of a step, and a member has none behind its
        # run. Drafts get blocks when they are verified (``fit_drafts``); till then the worker does without.
        self.num_lookahead_tokens = 0
        self._sharded = (0, 0, 0)

    @property
    def speculates(self) -> bool:
        """Whether requests are decoded with drafts."""
        return self.num_spec_tokens > 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if not self.speculates:
            return super().schedule(*args, **kwargs)
        self.fit_drafts()
        with self._padded_where_it_fits():
            return super().schedule(*args, **kwargs)

    @contextmanager
    def _padded_where_it_fits(self) -> Iterator[None]:
        """While it schedules, vLLM pads requests that start with one token left with as many placeholders as there may
        be drafts: else the batch is not uniform, and the step of all ranks runs its attention outside of graphs. Here
        it is told so request by request."""
        self._most_drafts, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            yield
        finally:
            self.num_spec_tokens = self._most_drafts

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Asked of each that waits, right before it may start."""
        ready = super()._handle_blocked_waiting_request(request)
        if self._most_drafts:
            self.num_spec_tokens = self._most_drafts if ready and self._takes_placeholders(request) else 0
        return ready

    def _takes_placeholders(self, request: Request) -> bool:
        """Whether one that may start with one token left is padded. Not a member: its blocks end with its run. Nobody
        waits for blocks that only placeholders need, and what cuts chunks must not cut them."""
        drafts, most = self._most_drafts, self.scheduler_config.long_prefill_token_threshold
        if not self.use_v2_model_runner or is_keeper(request.request_id) or request.has_encoder_inputs:
            return False
        if request.use_structured_output:  # what is behind a placeholder has no bitmask
            return False
        if 0 < most <= drafts:
            return False
        more = self._blocks_for(request, request.num_tokens, drafts)
        if more > self._room:
            return False
        self._room -= max(0, more)
        return True

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """The end of ``schedule``: with async scheduling by this number requests have their next drafts."""
        if self._most_drafts and self.dynamic_sd_lookup is None:
            scheduler_output.num_spec_tokens_to_schedule = self._most_drafts
        super()._update_after_schedule(scheduler_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """As vLLM's; and what of it is of sharded requests, which begin with vLLM's null block here."""
        held = self.held_blocks.get(request_id)
        if num_draft_tokens and held and held[0].is_null:
            invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            requests, drafts, accepted = self._sharded
            self._sharded = requests + 1, drafts + num_draft_tokens - invalid, accepted + num_accepted_tokens
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )

    def take_sharded(self) -> tuple[int, int, int]:
        """See ``Updated``; since this was last asked."""
        taken, self._sharded = self._sharded, (0, 0, 0)
        return taken

    def drop_drafts(self, request: Request) -> None:
        """Of a request that was out of its model runner's batch: drafts that lie there, or lay at another rank."""
        if self.use_v2_model_runner or isinstance(self, AsyncScheduler):
            request.spec_token_ids = []

    def fit_drafts(self) -> None:
        """Before a step: leave out drafts whose blocks are needed for tokens that are known. O(requests that run)."""
        self._room = 0
        drafted = [request for request in self.running if request.spec_token_ids]
        if not drafted and not self.waiting and not self.kv_holding_waiting:
            return
        view = self.view
        room = view.free_blocks - view.to_take - view.promised
        for request in drafted:
            have = max(request.num_tokens, request.num_computed_tokens + 1)  # those in flight, if all are right
            more = self._blocks_for(request, have, len(request.spec_token_ids))
            if more <= 0:
                continue
            if more <= room:
                room -= more
            else:
                kept = self._blocks_of(request, have) * self.block_size - have - self._behind
                request.spec_token_ids = request.spec_token_ids[: max(0, kept)]
        # Some are kept free of those that start.
        self._room = room - view.watermark

    @property
    def _behind(self) -> int:
        """With async scheduling the next step is scheduled before it is known which drafts are right, and takes a block
        for the token behind all."""
        return int(isinstance(self, AsyncScheduler))

    def _blocks_of(self, request: Request, have: int) -> int:
        """Blocks that a request has, or is about to, for so many tokens."""
        return max(len(self.held_blocks.get(request.request_id, ())), cdiv(have, self.block_size))

    def _blocks_for(self, request: Request, have: int, drafts: int) -> int:
        """Blocks beyond these that its drafts need."""
        return cdiv(have + drafts + self._behind, self.block_size) - self._blocks_of(request, have)

    def tell_drafts(self, part: Part, draft_token_ids: DraftTokenIds) -> None:
        """What the drafts are that a step was scheduled with unknown; before its bitmask is asked for."""
        assert not isinstance(part.payload, bytes)
        self.update_draft_token_ids_in_output(draft_token_ids, part.payload)

    def decoding(self) -> list[Decoding]:
        """Requests that run, have computed their prompt, and may leave: with drafts all, else those whose last block is
        full."""
        border = 1 if self.speculates else self.block_size
        return [
            self._decoding(request)
            for request in self.running
            if not request.num_computed_tokens % border and request.num_computed_tokens >= request.num_prompt_tokens
        ]

    def _decoding(self, request: Request) -> Decoding:
        have, done, block_size = request.num_tokens, request.num_computed_tokens, self.block_size
        blocks = len(self.held_blocks[request.request_id])
        computed = min(done, have) if self.speculates else done  # of what is in flight, drafts may be wrong
        return Decoding(
            request.request_id,
            computed,
            request.num_output_tokens + request.num_output_placeholders,
            have,
            missing=max(0, cdiv(max(have, done + 1), block_size) - blocks),
            rest=max(0, blocks - computed // block_size),
            flying=bool(request.num_in_flight_tokens or request.num_output_placeholders),
        )

    def give_up_rest(self, request: Request, keeper_id: str, first_block: int) -> None:
        """Of a request that leaves, free what its keeper has beyond full blocks: the last one may be partial, or for
        drafts only. What is in it is computed again where the request goes on."""
        blocks: list[Any] = self.held_blocks[keeper_id]
        full = request.num_computed_tokens // self.block_size - first_block
        self.block_pool.free_blocks(reversed(blocks[full:]))
        del blocks[full:]
