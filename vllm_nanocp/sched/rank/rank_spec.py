# SPDX-License-Identifier: Apache-2.0
"""All that one rank's scheduler is made from, in whichever process."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.structured_output import StructuredOutputManager

from ... import config as nanocp_config
from . import kv_events
from .chunks import stripe_blocks
from .rank_scheduler import AsyncRankScheduler, RankScheduler

if TYPE_CHECKING:
    from vllm.multimodal import MultiModalRegistry


@dataclass
class RankSpec:
    """All that makes a rank's scheduler; plain data. ``block_size`` and the others are as vLLM's scheduler takes them.

    Attributes:
        rank: its number.
    """

    rank: int
    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    block_size: int
    hash_block_size: int | None
    include_finished_set: bool
    log_stats: bool

    def make(
        self, manager: StructuredOutputManager, mm_registry: MultiModalRegistry = MULTIMODAL_REGISTRY
    ) -> RankScheduler | AsyncRankScheduler:
        """The scheduler, in this process."""
        config = nanocp_config.of(self.vllm_config)
        # Each rank publishes its KV events on a port of its own, as vLLM's data-parallel engines do.
        rank_config = copy(self.vllm_config)
        rank_config.parallel_config = copy(self.vllm_config.parallel_config)
        rank_config.parallel_config.data_parallel_index = self.rank
        # By this the work of a GPU is estimated (``--enable-mfu-metrics``): the experts are spread over all ranks.
        rank_config.parallel_config.data_parallel_size = config.ranks
        cls = AsyncRankScheduler if self.vllm_config.scheduler_config.async_scheduling else RankScheduler
        scheduler = cls(
            vllm_config=rank_config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=manager,
            block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            mm_registry=mm_registry,
            include_finished_set=self.include_finished_set,
            log_stats=self.log_stats,
        )
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) == 1 and config.degree_limit > 1 and scheduler.enable_kv_cache_events:
            kv_events.install(scheduler.kv_cache_manager)
        # Other kinds of cache may hold more than their blocks have tokens; enough, as vLLM has made sure at start.
        counted = len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
        most = scheduler.num_blocks * self.block_size if counted else self.vllm_config.model_config.max_model_len
        scheduler.most_tokens = most
        if config.parallel_prefill:
            queries = 1 + self.vllm_config.num_speculative_tokens
            stripe = stripe_blocks(self.vllm_config.scheduler_config, self.block_size, config.chunk_tokens, queries)
            scheduler.whole_chunk = stripe * self.block_size
        return scheduler
