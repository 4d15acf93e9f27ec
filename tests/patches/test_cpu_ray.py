# SPDX-License-Identifier: Apache-2.0
"""`cpu_ray`: what vLLM's Ray executor asks of Ray for workers on CPU. Actors are in tests/ray."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nanocp.patches import Outcome, PatchError, cpu_ray
from vllm_nanocp.patches._guard import is_ours

pytest.importorskip("vllm")
pytest.importorskip("ray")


@pytest.fixture
def upstream(stock: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's platform, executor and actor."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

    assert not is_ours(RayExecutorV2._get_actor_resource_kwargs), "applied in this process"
    monkeypatch.setattr(CpuPlatform, "ray_device_key", CpuPlatform.ray_device_key)
    return SimpleNamespace(
        platform=CpuPlatform,
        executor=stock(RayExecutorV2, "_get_actor_resource_kwargs", "_build_runtime_env"),
        actor=stock(RayWorkerProc, "get_node_and_physical_gpu_ids"),
    )


def _environment(executor: Any) -> dict[str, str]:
    config = SimpleNamespace(ray_runtime_env=None, ray_workers_use_nsight=False)
    found: dict[str, str] = executor._build_runtime_env(SimpleNamespace(parallel_config=config))["env_vars"]
    return found


def test_upstream_has_no_cpus(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defects. If one is gone, look whether the patch can go."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert not upstream.platform.ray_device_key
    assert "OMP_NUM_THREADS" not in _environment(upstream.executor)
    monkeypatch.setattr(upstream.platform, "ray_device_key", "CPU")
    assert upstream.executor._get_actor_resource_kwargs()["resources"] == {"CPU": 1.0}, "which Ray refuses"


def test_workers_are_cpus(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("LD_PRELOAD", "")
    assert cpu_ray.apply() is Outcome.APPLIED
    assert upstream.platform.ray_device_key == "CPU"
    assert upstream.executor._get_actor_resource_kwargs() == {"num_gpus": 0}
    assert b"cpu_ray" in pickle.dumps(upstream.actor.get_node_and_physical_gpu_ids), "actors would look up vLLM's own"
    assert _environment(upstream.executor) == {"OMP_NUM_THREADS": "3", "LD_PRELOAD": ""}
    assert cpu_ray.apply() is Outcome.APPLIED


def test_a_worker_on_a_cpu_is_assigned_no_device(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than an empty list of them: vLLM 0.33's CPU worker takes it for the NUMA nodes that it may use."""
    from vllm_nanocp.executor.ray.actor import Meeting, RankActor

    assigned: list[Any] = []
    monkeypatch.setattr(upstream.actor, "initialize_worker", lambda self, *args: assigned.append(args[-1]))
    actor: Any = object.__new__(RankActor)
    actor._parallel_config = SimpleNamespace()
    for devices in ([], [3]):
        actor.initialize_worker(0, {}, Meeting("127.0.0.1", [1, 2]), None, devices)
    assert assigned == [None, [3]]


def test_not_needed_where_upstream_serves_cpus(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.platform, "ray_device_key", "CPU")
    function = upstream.executor._get_actor_resource_kwargs
    assert cpu_ray.apply() is Outcome.NOT_NEEDED
    assert upstream.executor._get_actor_resource_kwargs is function


def _other(*args: Any) -> Any: ...


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("executor", "_get_actor_resource_kwargs"),
        ("executor", "_build_runtime_env"),
        ("actor", "get_node_and_physical_gpu_ids"),
    ],
)
def test_apply_refuses_another_upstream(upstream: Any, monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    monkeypatch.setattr(getattr(upstream, owner), name, _other)
    with pytest.raises(PatchError, match=r"^cpu_ray: _other has changed upstream .*vLLM \d"):
        cpu_ray.apply()
    assert not upstream.platform.ray_device_key, "all or nothing"
