# SPDX-License-Identifier: Apache-2.0
"""What the executor tells vLLM of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_nanocp.executor.multiproc import NanoCPMultiprocExecutor

RANKS, CORES = 2, 8


def test_ranks_share_all_cores_whatever_the_number_of_api_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM divides the cores by engines, and takes the number of API servers for theirs."""
    cores = [LogicalCPUInfo(id=core, physical_core=core, numa_node=0) for core in range(CORES)]
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: cores)
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_visible_memory_node", lambda *_: [0])
    bound: list[int] = []

    def start(executor: NanoCPMultiprocExecutor) -> None:
        manager = OMPProcessManager(executor.vllm_config)
        bound.append(len(manager.reserved_cpu_list) + sum(map(len, manager.cpu_lists)))

    monkeypatch.setattr(MultiprocExecutor, "_init_executor", start)
    for api_servers in (1, RANKS, 4):
        parallel = SimpleNamespace(
            _api_process_count=api_servers,
            local_world_size=RANKS,
            data_parallel_rank_local=0,
            assigned_physical_gpu_ids=None,
        )
        executor = NanoCPMultiprocExecutor.__new__(NanoCPMultiprocExecutor)
        executor.parallel_config = parallel  # type: ignore[assignment]
        executor.vllm_config = SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)  # type: ignore[assignment]
        executor._init_executor()
        assert parallel._api_process_count == api_servers, "the front-end's caches go by it"
    assert bound == [CORES] * 3
