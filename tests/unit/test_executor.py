# SPDX-License-Identifier: Apache-2.0
"""What the executor tells vLLM of the machine, and which answers it waits for."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tests.test_replies import FAILURE, OK, Queue
from vllm_nanocp.executor.multiproc import NanoCPMultiprocExecutor, RankGather
from vllm_nanocp.executor.replies import Replies

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


def executor_of(*queues: Queue) -> Any:
    """Whose workers have answered so."""
    executor: Any = NanoCPMultiprocExecutor.__new__(NanoCPMultiprocExecutor)
    executor.is_failed, executor.futures_queue, executor.rank_gather = False, deque(), RankGather(1)
    executor.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda _: None)
    executor.response_mqs = Replies(queues)
    return executor


def test_a_call_behind_a_step_that_failed_waits_for_nobody() -> None:
    """The other rank hangs in that step: it would be waited for for ever, by whatever is asked before the engine looks
    at the step's own answer."""
    executor = executor_of(Queue(), Queue((FAILURE, "why"), (FAILURE, "again"), (OK, "added"), (OK, None)))
    steps = [executor.execute_model("step", non_block=True), executor.sample_tokens(None, non_block=True)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="why"):
            executor.collective_rpc("add_lora", 3.0, ("adapter",))
    with pytest.raises(RuntimeError, match="why"):
        executor.take_draft_token_ids()
    for step in steps:
        with pytest.raises(RuntimeError, match=r"why|again"):
            step.result()


def test_a_call_behind_steps_has_its_own_answer() -> None:
    """Also behind a call that failed."""
    calls = [(FAILURE, "no such adapter"), (OK, "listed")]
    executor = executor_of(Queue((OK, None), (OK, "a"), *calls), Queue((OK, None), (OK, "b"), *calls))
    steps = [executor.execute_model("step", non_block=True), executor.sample_tokens(None, non_block=True)]
    with pytest.raises(RuntimeError, match="no such adapter"):
        executor.collective_rpc("add_lora", 3.0, ("adapter",))
    assert executor.collective_rpc("list_loras", 3.0) == ["listed"] * 2
    assert [step.result() for step in steps] == [None, ["a", "b"]]
