# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on one machine: each with a raylet of its own, for vLLM two machines."""

from __future__ import annotations

import contextlib
import os
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
