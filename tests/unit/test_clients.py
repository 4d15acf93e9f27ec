# SPDX-License-Identifier: Apache-2.0
"""Several API servers are several clients of the engine: what a request makes goes to the one that it came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.request import RequestStatus

from vllm_nanocp.metrics.collector import Snapshot
from vllm_nanocp.metrics.transport import take

from .scheduler_world import WorldError
from .world_shapes import vllm_config  # noqa: F401
from .worlds import InMode, World, in_mode  # noqa: F401

CLIENTS = 3


def snapshot_of(stats: SchedulerStats) -> Snapshot:
    """The plugin's part of statistics, which keep it."""
    snapshot = take(replace(stats, num_kv_fetch_reqs_by_stage=dict(stats.num_kv_fetch_reqs_by_stage)))
    assert snapshot is not None
    return snapshot


class ClientsWorld(World):
    """A world whose requests come from several clients."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.client_of = {name: at % CLIENTS for at, name in enumerate(self.asks)}
        for name, ask in self.asks.items():
            ask.request.client_index = self.client_of[name]
        update, finish = self.scheduler.update_from_output, self.scheduler.finish_requests

        def checked(*args: Any) -> dict[int, EngineCoreOutputs]:
            outputs = update(*args)
            for client, part in outputs.items():
                for answer in part.outputs:
                    if self.client_of[answer.request_id] != client:
                        raise WorldError(f"{answer.request_id} is answered to client {client}")
            self.check_counted_once(outputs)
            self.check_told()
            self.counts["clients"] = max(self.counts["clients"], len(outputs))
            return outputs

        def ended(ids: Any, status: RequestStatus) -> Any:
            requests = finish(ids, status)
            if requests and not self.scheduler.has_requests():
                raise WorldError(f"{ids} ended, but no step follows that would tell so")
            for request in requests:
                if self.client_of[request.request_id] != request.client_index:
                    raise WorldError(f"{request.request_id} ends for client {request.client_index}")
            return requests

        self.scheduler.update_from_output = checked  # type: ignore[method-assign]
        self.scheduler.finish_requests = ended  # type: ignore[method-assign]
        # What each client was told last.
        self.told: dict[int, SchedulerStats] = {}

    def check_counted_once(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What is counted in a step is told to one client, or it would be counted twice."""
        counted = 0
        for client, part in outputs.items():
            if (stats := part.scheduler_stats) is not None:
                self.told[client] = stats
                snapshot = replace(snapshot_of(stats), ranks=[], coefficients={})
                counted += snapshot != Snapshot([]) or stats.prefix_cache_stats != PrefixCacheStats()
        if counted > 1:
            raise WorldError("what was counted in a step came to several clients")

    def check_told(self) -> None:
        """What is shown of several clients' gauges is what was set last, by whichever. So where no step follows, all
        that were ever told must have been told last how the engine stands: each may read its messages late."""
        if self.flying or self.scheduler.has_requests():
            return
        running, waiting = self.scheduler.get_request_counts()
        usage = self.scheduler.get_kv_cache_usage()
        self.counts["rests"] += len(self.told) > 1
        for client, told in self.told.items():
            if (told.num_running_reqs, told.num_waiting_reqs) != (running, waiting):
                raise WorldError(f"client {client} was told {told}, but {running} run and {waiting} wait")
            by_rank = [state.kv_usage for state in snapshot_of(told).ranks]
            if told.kv_cache_usage != pytest.approx(usage) or by_rank != [
                r.view.kv_usage for r in self.scheduler.ranks
            ]:
                raise WorldError(f"client {client} was told {told}, but {usage} is held")


def test_each_client_gets_its_own(in_mode: InMode) -> None:  # noqa: F811
    """Sharded requests, requests that move, are preempted or aborted."""
    counts = in_mode.run(ClientsWorld, 6)
    assert counts["rows"] and counts["moves"] and counts["aborts"] and counts["clients"] > 6 and counts["rests"], counts


@pytest.mark.parametrize("paused", [PauseState.UNPAUSED, PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_a_step_follows_an_abort(in_mode: InMode, paused: PauseState) -> None:  # noqa: F811
    """Also that of a request that no rank has: else the metrics would show it as waiting until others come."""

    class OneAbort(ClientsWorld):
        def run(self) -> Counter[str]:
            scheduler, request = self.scheduler, next(iter(self.asks.values())).request
            scheduler.set_pause_state(paused)
            scheduler.add_request(request)
            scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
            self.ended.add(request.request_id)
            while scheduler.has_requests() or self.flying:
                self.step()
            if scheduler.log_stats:
                self.counts["waiting"] = self.told[0].num_waiting_reqs
            self.counts["told"] = len(self.told)
            return self.counts

    counts = in_mode.run(OneAbort, 2)
    assert counts["told"] == 1 and not counts["waiting"]
