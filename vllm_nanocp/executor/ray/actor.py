# SPDX-License-Identifier: Apache-2.0
"""A worker that is a Ray actor. Touches vLLM 0.32's ``RayWorkerProc``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from vllm.config import VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import Handle
from vllm.utils.network_utils import get_distributed_init_method, get_open_ports_list
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

from ... import patches
from ...worker.queues import in_the_world
from ..multiproc import NUM_PORTS


@dataclass(frozen=True)
class Meeting:
    """Where the workers build their process groups: on the node of the first one, which serves them."""

    host: str
    ports: list[int]


class RankActor(RayWorkerProc):
    """What vLLM's executor makes its actors of. It calls their methods one after the other."""

    def __init__(
        self,
        vllm_config: Any,
        rank: int,
        input_shm_handle: Handle,
        is_driver_worker: bool,
        is_driver_node: bool = False,
    ) -> None:
        patches.apply_all(patches.RAY_PATCHES)
        super().__init__(vllm_config, rank, input_shm_handle, is_driver_worker, is_driver_node)

    def create_dist_init_method(self) -> Meeting:  # type: ignore[override]
        """Asked of the first worker only. vLLM's ranks meet at the data-parallel master, which is its node here."""
        return Meeting(ray.util.get_node_ip_address(), get_open_ports_list(NUM_PORTS))

    def initialize_worker(  # type: ignore[override]
        self,
        local_rank: int,
        env_vars: dict[str, str],
        distributed_init_method: Meeting,
        driver_env_vars: dict[str, str] | None = None,
        assigned_physical_gpu_ids: list[int] | None = None,
    ) -> None:
        meeting = distributed_init_method
        self._parallel_config.data_parallel_master_ip = meeting.host
        self._parallel_config._data_parallel_master_port_list = list(meeting.ports)
        super().initialize_worker(
            local_rank,
            env_vars,
            get_distributed_init_method(meeting.host, meeting.ports[-1]),
            driver_env_vars,
            assigned_physical_gpu_ids or None,  # a worker on CPU has none, which 0.33 would take for no NUMA node
        )

    def _init_message_queues(self, input_shm_handle: Handle, vllm_config: VllmConfig) -> None:
        # Later, when all workers have come so far: where one fails, the others are killed, and with them what would
        # remove the names of their shared memory.
        self._queues_of = input_shm_handle, vllm_config

    def wait_for_init(self) -> dict[str, Any]:
        with in_the_world(self.worker.worker):
            super()._init_message_queues(*self._queues_of)
        answer: dict[str, Any] = super().wait_for_init()
        return answer
