# SPDX-License-Identifier: Apache-2.0
"""vLLM's per-engine statistics, taken over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats


def merge_prefix_cache(parts: Sequence[PrefixCacheStats]) -> PrefixCacheStats:
    """Sum of the ranks' prefix-cache counters."""
    total = PrefixCacheStats()
    for part in parts:
        total.reset |= part.reset
        total.requests += part.requests
        total.queries += part.queries
        total.hits += part.hits
        total.preempted_requests += part.preempted_requests
        total.preempted_queries += part.preempted_queries
        total.preempted_hits += part.preempted_hits
    return total


def merge_scheduler_stats(parts: Sequence[SchedulerStats], num_waiting: int) -> SchedulerStats:
    """One engine's statistics: counts are sums, cache usage is the mean.

    Args:
        parts: one a rank; not empty.
        num_waiting: requests that wait for a placement.
    """
    waiting_loras: dict[str, int] = {}
    running_loras: dict[str, int] = {}
    for part in parts:
        for total, some in ((waiting_loras, part.waiting_lora_adapters), (running_loras, part.running_lora_adapters)):
            for name, count in some.items():
                total[name] = total.get(name, 0) + count
    return SchedulerStats(
        num_running_reqs=sum(p.num_running_reqs for p in parts),
        num_waiting_reqs=sum(p.num_waiting_reqs for p in parts) + num_waiting,
        num_skipped_waiting_reqs=sum(p.num_skipped_waiting_reqs for p in parts),
        kv_cache_usage=sum(p.kv_cache_usage for p in parts) / len(parts),
        prefix_cache_stats=merge_prefix_cache([p.prefix_cache_stats for p in parts]),
        kv_cache_eviction_events=[event for p in parts for event in p.kv_cache_eviction_events],
        waiting_lora_adapters=waiting_loras,
        running_lora_adapters=running_loras,
        cudagraph_stats=next((p.cudagraph_stats for p in parts if p.cudagraph_stats is not None), None),
        perf_stats=next((p.perf_stats for p in parts if p.perf_stats is not None), None),
    )
