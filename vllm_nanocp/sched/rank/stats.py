# SPDX-License-Identifier: Apache-2.0
"""vLLM's per-engine statistics, taken over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

# A rank's statistics where they say no more than how it stands, as mostly: requests that run, wait and are deferred,
# and cache usage.
PlainStats = tuple[int, int, int, float]


class Updated(NamedTuple):
    """What has come of a rank's output.

    Attributes:
        outputs: of vLLM's scheduler, by client, without statistics.
        client: the front-end that is to have the statistics.
        stats: the rank's, if it makes any.
        sharded: of sharded requests, how many had drafts, how many drafts, and how many of them were accepted.
    """

    outputs: dict[int, EngineCoreOutputs]
    client: int = 0
    stats: SchedulerStats | PlainStats | None = None
    sharded: tuple[int, int, int] = (0, 0, 0)


def take_stats(outputs: dict[int, EngineCoreOutputs]) -> Updated:
    """Take the statistics out of what vLLM's scheduler returns, which puts them to one client's."""
    for client, some in outputs.items():
        if some.scheduler_stats is not None:
            stats, some.scheduler_stats = some.scheduler_stats, None
            return Updated(outputs, client, _plain(stats))
    return Updated(outputs)


def _plain(stats: SchedulerStats) -> SchedulerStats | PlainStats:
    running, waiting, skipped = stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs
    whole = SchedulerStats(
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_skipped_waiting_reqs=skipped,
        num_kv_fetch_reqs_by_stage=stats.num_kv_fetch_reqs_by_stage,  # all zero: there are no connectors
        kv_cache_usage=stats.kv_cache_usage,
    )
    return (running, waiting, skipped, stats.kv_cache_usage) if stats == whole else stats


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


def merge_drafts(parts: Sequence[SpecDecodingStats]) -> SpecDecodingStats | None:
    """Sum of the ranks' counters of drafts; None of none."""
    if not parts:
        return None
    total = SpecDecodingStats.new(parts[0].num_spec_tokens)
    for part in parts:
        total.num_drafts += part.num_drafts
        total.num_draft_tokens += part.num_draft_tokens
        total.num_accepted_tokens += part.num_accepted_tokens
        for sums, some in (
            (total.num_accepted_tokens_per_pos, part.num_accepted_tokens_per_pos),
            (total.num_draft_tokens_per_pos, part.num_draft_tokens_per_pos),
        ):
            sums[:] = map(add, sums, some)
    return total


def merge_scheduler_stats(parts: Sequence[SchedulerStats | PlainStats], num_waiting: int) -> SchedulerStats:
    """One engine's statistics: counts are sums, cache usage is the mean.

    Args:
        parts: one a rank; not empty.
        num_waiting: requests that wait for a placement.
    """
    plain = [part for part in parts if isinstance(part, tuple)]
    running, waiting, skipped, usage = map(sum, zip(*plain, strict=True)) if plain else (0, 0, 0, 0.0)
    whole = [part for part in parts if not isinstance(part, tuple)]
    total = _merge_whole(whole) if whole else SchedulerStats()
    total.num_running_reqs += running
    total.num_waiting_reqs += waiting + num_waiting
    total.num_skipped_waiting_reqs += skipped
    total.kv_cache_usage = (total.kv_cache_usage + usage) / len(parts)
    return total


def _merge_whole(parts: Sequence[SchedulerStats]) -> SchedulerStats:
    """All of them summed up, cache usage too."""
    waiting_loras: dict[str, int] = {}
    running_loras: dict[str, int] = {}
    for part in parts:
        for total, some in ((waiting_loras, part.waiting_lora_adapters), (running_loras, part.running_lora_adapters)):
            for name, count in some.items():
                total[name] = total.get(name, 0) + count
    return SchedulerStats(
        num_running_reqs=sum(p.num_running_reqs for p in parts),
        num_waiting_reqs=sum(p.num_waiting_reqs for p in parts),
        num_skipped_waiting_reqs=sum(p.num_skipped_waiting_reqs for p in parts),
        kv_cache_usage=sum(p.kv_cache_usage for p in parts),
        prefix_cache_stats=merge_prefix_cache([p.prefix_cache_stats for p in parts]),
        spec_decoding_stats=merge_drafts([p.spec_decoding_stats for p in parts if p.spec_decoding_stats is not None]),
        kv_cache_eviction_events=[event for p in parts for event in p.kv_cache_eviction_events],
        waiting_lora_adapters=waiting_loras,
        running_lora_adapters=running_loras,
        cudagraph_stats=next((p.cudagraph_stats for p in parts if p.cudagraph_stats is not None), None),
        perf_stats=next((p.perf_stats for p in parts if p.perf_stats is not None), None),
    )
