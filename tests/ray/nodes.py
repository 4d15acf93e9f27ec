# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on one machine: each with a raylet of its own, for vLLM two machines."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_nanocp.environment import variable

# Ray reads them when it is first imported, in every process.
SETTINGS = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_raylet_start_wait_time_s": "120",
}
# Ray's processes end when they have not reached Ray's server for so many seconds; 60 unless it is set.
GIVE_UP = "RAY_gcs_rpc_server_reconnect_timeout_s"
STORE_BYTES = 80 << 20
CPUS = 2
NOTICE_LIMIT_S = 90.0


class Nodes:
    """Two nodes. The first is that of the scheduler. ``close`` them."""

    def __init__(self) -> None:
        os.environ.update(SETTINGS)
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.second: Any = None
        try:
            self.cluster.add_node(num_cpus=CPUS, object_store_memory=STORE_BYTES, include_dashboard=False)
            self.add_second()
        except BaseException:
            self.close()
            raise
        self.address: str = self.cluster.address

    def add_second(self) -> None:
        self.second = self.cluster.add_node(num_cpus=CPUS, object_store_memory=STORE_BYTES)
        # Ray may not have noticed yet that the one before it is dead, and would place actors there.
        self.cluster.wait_for_nodes(NOTICE_LIMIT_S)

    def kill_second(self) -> None:
        """SIGKILL to the raylet of the second node, as when its machine goes."""
        self.raylet(self.second).kill()
        self.cluster.remove_node(self.second, allow_graceful=False)

    def kill_gcs(self) -> None:
        """SIGKILL to Ray's server on the head node: all raylets try to reach it for a while, and give up."""
        self._reap()
        self._head("gcs_server").kill()

    def kill_head(self) -> None:
        """SIGKILL to Ray's server and to the raylet beside it, as when the machine of the head node goes."""
        self._reap()
        self._head("raylet").kill()
        self._head("gcs_server").kill()

    def _head(self, kind: str) -> psutil.Process:
        return psutil.Process(self.cluster.head_node.all_processes[kind][0].process.pid)

    def _reap(self) -> None:
        """Let dead raylets vanish at once, as those of a real node: workers take one that is a zombie for alive."""
        for node in (self.cluster.head_node, self.second):
            for started in node.all_processes.values():
                for one in started:
                    threading.Thread(target=one.process.wait, daemon=True).start()

    @staticmethod
    def raylet(node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def workers(self, node: Any) -> list[psutil.Process]:
        """The engine's workers that run on a node."""
        found = []
        for process in self.raylet(node).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::RankActor"):
                    found.append(process)
        return found

    def all_workers(self) -> list[psutil.Process]:
        return [*self.workers(self.cluster.head_node), *self.workers(self.second)]

    def close(self) -> None:
        self.cluster.shutdown()


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        with variable("RAY_ADDRESS", nodes.address):
            yield nodes
    finally:
        nodes.close()
