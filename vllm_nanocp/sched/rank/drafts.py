# SPDX-License-Identifier: Apache-2.0
"""Draft tokens at one rank: they take only blocks that nobody else needs, and go with a request to its new home.

vLLM's scheduler preempts for the blocks of drafts, which most likely are given back in the next step. Here a rank with
too few blocks verifies fewer drafts instead: nobody is preempted or spilled for them, and a request that just fits its
rank ends there. Touches vLLM 0.32's ``Scheduler.num_spec_tokens``, ``Request.spec_token_ids`` and
``Request.spec_decode_metrics``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm.v1.request import Request

from ...placement import cdiv
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
    """Mixed into vLLM's scheduler: drafts where there is no block for them."""

    @property
    def speculates(self) -> bool:
        """Whether requests are decoded with drafts."""
        return self.num_spec_tokens > 0

    @contextmanager
    def unpadded(self) -> Iterator[None]:
        """While it schedules, vLLM pads requests that start with one token left with as many drafts as there may be,
        for the sake of graphs. The blocks of a member end with its run, and there is none for these."""
        most, self.num_spec_tokens = self.num_spec_tokens, 0
        try:
            yield
        finally:
            self.num_spec_tokens = most

    def fit_drafts(self) -> None:
        """Before a step: leave out drafts whose blocks are needed for tokens that are known. O(requests that run)."""
        drafted = [request for request in self.running if request.spec_token_ids]
        if not drafted:
            return
        view, held, block_size = self.view, self.held_blocks, self.block_size
        room = view.free_blocks - view.to_take - view.promised
        for request in drafted:
            have = request.num_tokens
            blocks = max(len(held[request.request_id]), cdiv(have, block_size))  # it has them, or is about to
            more = cdiv(have + len(request.spec_token_ids), block_size) - blocks
            if more <= 0:
                continue
            if more <= room:
                room -= more
            else:
                request.spec_token_ids = request.spec_token_ids[: max(0, blocks * block_size - have)]
