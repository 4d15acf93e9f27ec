# SPDX-License-Identifier: Apache-2.0
"""The snapshots as Prometheus metrics, in the registry that vLLM's own are in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from .. import config as nanocp_config
from .collector import Snapshot
from .transport import take

if TYPE_CHECKING:
    from prometheus_client.metrics import MetricWrapperBase
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

PREFIX = "vllm:nanocp_"
# As vLLM's gauges: each step's statistics go to one of several API servers, and the latest are the true ones.
_MODE: Any = "mostrecent"
_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ROOM = {True: "true", False: "false"}

# What is registered now. Making the metrics again replaces them, as it does vLLM's own.
_registered: list[MetricWrapperBase] = []


def _replace_registered() -> None:
    for metric in _registered:
        # vLLM's logger removes all metrics of its prefix, these included, when it is made.
        with contextlib.suppress(KeyError):
            REGISTRY.unregister(metric)
    _registered.clear()


class Metrics:
    """The metrics of one engine. Every series exists from the start, at zero.

    Args:
        model_name: value of the label of that name.
        num_ranks: N.
    """

    def __init__(self, model_name: str, num_ranks: int) -> None:
        _replace_registered()
        self._model = model_name
        ranks = [str(rank) for rank in range(num_ranks)]
        self.kv_usage = self._gauges("kv_cache_usage_perc", "Used part of a rank's KV cache, 1 is all.", ranks)
        self.running = self._gauges("num_requests_running", "Requests in a rank's batch.", ranks)
        self.waiting = self._gauges("num_requests_waiting", "Requests placed at a rank that have not started.", ranks)
        self.guests = self._gauges("guests", "Sharded requests that compute elsewhere with a part here.", ranks)
        self.shards = self._gauges("shards", "Shards of sharded requests that a rank holds.", ranks)
        self.kv_imbalance = self._gauge("kv_imbalance", "KV cache usage of the fullest rank over the ranks' mean.")
        self.batch_imbalance = self._gauge("batch_imbalance", "Running requests of the busiest rank over the mean.")
        self.degree = self._histogram(
            "request_degree",
            "Ranks that a request's KV cache was spread over when it was placed.",
            [*(bound for bound in _DEGREES if bound < num_ranks), num_ranks],
        )
        self.moves = self._counter("moves", "Times that a decoding request changed its home for balance.")
        self.spills = self._counter("spills", "Times that a decoding request changed its home because that was full.")
        self.prevented = self._counter(
            "prevented_preemptions", "Times a rank was short of blocks and spills made up for it."
        )
        self.drafts = self._counter("spec_decode_drafts", "Steps of sharded requests that had drafts.")
        self.draft_tokens = self._counter("spec_decode_draft_tokens", "Drafts of sharded requests.")
        self.accepted = self._counter("spec_decode_accepted_tokens", "Drafts of sharded requests that were right.")
        self.preemptions = self._counters(
            "preemptions",
            "Preempted requests, by whether other ranks had room.",
            "room_elsewhere",
            list(_ROOM.values()),
        )
        self.hits = self._counters(
            "prefix_hit_tokens",
            "Prompt tokens of placed requests that were cached at their home (local) or at other ranks (remote).",
            "distance",
            ["local", "remote"],
        )
        self.missed = self._counter("prefix_missed_tokens", "Prompt tokens of placed requests that were not cached.")
        self.coefficient = self._keep(
            Gauge(
                f"{PREFIX}cost_coefficient",
                "Coefficients of the cost model of a step, in seconds; feedback is a factor.",
                ["model_name", "coefficient"],
                multiprocess_mode=_MODE,
            )
        )

    def _keep(self, metric: Any) -> Any:
        _registered.append(metric)
        return metric

    def _gauges(self, name: str, text: str, ranks: Sequence[str]) -> list[Gauge]:
        gauge = self._keep(Gauge(PREFIX + name, text, ["model_name", "rank"], multiprocess_mode=_MODE))
        return [gauge.labels(self._model, rank) for rank in ranks]

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge: Gauge = self._keep(Gauge(PREFIX + name, text, ["model_name"], multiprocess_mode=_MODE))
        return gauge.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        counter: Counter = self._keep(Counter(PREFIX + name, text, ["model_name"]))
        return counter.labels(self._model)

    def _counters(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        counter = self._keep(Counter(PREFIX + name, text, ["model_name", label]))
        return {value: counter.labels(self._model, value) for value in values}

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        histogram: Histogram = self._keep(Histogram(PREFIX + name, text, ["model_name"], buckets=bounds))
        return histogram.labels(self._model)

    def observe(self, snapshot: Snapshot) -> None:
        """Set what is a state, add what is a count."""
        # Not strict: a metric is no reason to fail.
        for rank, state in enumerate(snapshot.ranks[: len(self.kv_usage)]):
            self.kv_usage[rank].set(state.kv_usage)
            self.running[rank].set(state.running)
            self.waiting[rank].set(state.waiting)
            self.guests[rank].set(state.guests)
            self.shards[rank].set(state.shards)
        self.kv_imbalance.set(snapshot.kv_imbalance)
        self.batch_imbalance.set(snapshot.batch_imbalance)
        for name, value in snapshot.coefficients.items():
            self.coefficient.labels(self._model, name).set(value)
        for degree, count in snapshot.degrees.items():
            for _ in range(count):
                self.degree.observe(degree)
        # Most steps have none of these; in multiprocess mode each addition writes to a file.
        for counter, count in (
            (self.moves, snapshot.moves),
            (self.spills, snapshot.spills),
            (self.prevented, snapshot.prevented_preemptions),
            (self.drafts, snapshot.sharded_drafts),
            (self.draft_tokens, snapshot.sharded_draft_tokens),
            (self.accepted, snapshot.sharded_accepted_tokens),
            (self.preemptions[_ROOM[True]], snapshot.preemptions_with_room),
            (self.preemptions[_ROOM[False]], snapshot.preemptions_without_room),
            (self.hits["local"], snapshot.local_hits),
            (self.hits["remote"], snapshot.remote_hits),
            (self.missed, snapshot.missed),
        ):
            if count:
                counter.inc(count)


class NanoCPStatLogger(AggregateStatLoggerBase):
    """A stat logger that stands beside vLLM's own, in each front-end of an engine with nanocp.

    Args:
        vllm_config: with nanocp's settings.
        engine_indexes: the engines of this front-end; nanocp has one.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        # vLLM takes the same for its label; with several names it is the first.
        model_name = vllm_config.model_config.served_model_name
        self.metrics = Metrics(str(model_name), nanocp_config.of(vllm_config).ranks)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Export the snapshot that the statistics carry, if any."""
        snapshot = take(scheduler_stats) if scheduler_stats is not None else None
        if snapshot is not None:
            self.metrics.observe(snapshot)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
