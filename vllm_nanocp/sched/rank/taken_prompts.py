# SPDX-License-Identifier: Apache-2.0
"""Prompts that a benchmark takes as computed: their blocks are allocated, and they begin with their last token.

Those that wait here for room are taken so when it is there, in the order and with the room in which vLLM's scheduler
would start them, as it does with vLLM's DecodeBenchConnector. Touches vLLM 0.32's
``Scheduler._handle_blocked_waiting_request``, which its scheduler asks of each waiting request once those that run have
had their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request

from ...placement import cdiv
from .allowance import AllowanceDoors

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash


class TakenDoors(AllowanceDoors):
    """Mixed into vLLM's scheduler: requests that take no prefill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Tokens to take as computed, of requests that wait here without blocks, by id.
        self.to_take_as_computed: dict[str, int] = {}

    @property
    def kept_blocks(self) -> int:
        """Free blocks that are not for requests that wait; ``ChunkDoors`` knows."""
        raise NotImplementedError

    def adopt_cached(self, member_id: str, hashes: Sequence[BlockHash]) -> int:
        """See ``RankDoors``."""
        raise NotImplementedError

    def allocate(self, member_id: str, num_blocks: int) -> None:
        """See ``RankDoors``."""
        raise NotImplementedError

    def take_as_computed(self, request: Request, tokens: int, kept: int = 0) -> None:
        """Give a request that waits here its blocks, with so many tokens computed; or remember it if they are not
        free.

        Args:
            request: holds no blocks.
            tokens: of it; 0: it is computed as any other.
            kept: free blocks that are not for it.
        """
        self.to_take_as_computed.pop(request.request_id, None)
        if not tokens:
            return
        blocks = cdiv(request.num_tokens, self.block_size)
        if self.kv_cache_manager.block_pool.get_num_free_blocks() - kept < blocks:
            self.to_take_as_computed[request.request_id] = tokens
            return
        self.adopt_cached(request.request_id, [])
        self.allocate(request.request_id, blocks)
        request.num_computed_tokens = tokens

    def forget_taken(self, request_id: str) -> None:
        """A request has ended, or waits here no more."""
        self.to_take_as_computed.pop(request_id, None)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        ready = super()._handle_blocked_waiting_request(request)
        if ready and self.to_take_as_computed:
            tokens = self.to_take_as_computed.get(request.request_id, 0)
            if tokens:
                self.take_as_computed(request, tokens, self.kept_blocks)
        return ready

    def cut_chunk(self, request: Request, computed: int, most: int) -> int:
        """See ``AllowanceDoors``."""
        if request.request_id in self.to_take_as_computed:
            return 0  # it waits, and those behind it do
        return super().cut_chunk(request, computed, most)
