# SPDX-License-Identifier: Apache-2.0
"""Workers on CPU as Ray actors.

Wrong upstream: `CpuPlatform` (vllm/platforms/cpu.py) names no `ray_device_key`, so that `ray_utils` ends with
`ValueError: current platform cpu does not support ray`. With a key, `RayExecutorV2`
(vllm/v1/executor/ray_executor_v2.py) asks Ray for it as a custom resource, which Ray refuses for "CPU"; its actors look
it up among Ray's accelerators, where CPUs are not; and they start without the environment that decides, before Python
runs, on OpenMP and memory allocation. Worker processes of the multiprocess executor inherit it.

Versions: 0.32.0, 0.33.0.

Repair: a worker is one "CPU" of the placement group. An actor asks for nothing beyond its bundle, has no accelerators,
and starts with the driver's `LD_PRELOAD` and `OMP_NUM_THREADS`.

Can go: when vLLM's CPU platform has a `ray_device_key` and its Ray executor serves it.

Known upstream: https://github.com/vllm-project/vllm/issues/21602, closed without a change.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, is_ours, replace

_KNOWN_RESOURCES = {"c6fda4af16035a05"}  # 0.32.0
_KNOWN_ENVIRONMENT = {"4b2150f46375ed6e"}  # 0.32.0
_KNOWN_DEVICES = {"5fd5297bffb014e6"}  # 0.32.0
_BEFORE_PYTHON = ("LD_PRELOAD", "OMP_NUM_THREADS")


def apply() -> Outcome:
    """Let Ray place workers on CPUs. Idempotent; for the executor's process and its actors. Needs Ray.

    Raises `PatchError` if one of the functions it replaces is not the known one.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

    if CpuPlatform.ray_device_key and not is_ours(RayExecutorV2._get_actor_resource_kwargs):
        return Outcome.NOT_NEEDED
    outcome = replace(
        __name__,
        Guarded(RayExecutorV2, "_get_actor_resource_kwargs", _KNOWN_RESOURCES, lambda _: _actor_resources),
        Guarded(RayExecutorV2, "_build_runtime_env", _KNOWN_ENVIRONMENT, _with_environment),
        Guarded(RayWorkerProc, "get_node_and_physical_gpu_ids", _KNOWN_DEVICES, lambda _: _node_only),
    )
    CpuPlatform.ray_device_key = "CPU"
    return outcome


def _actor_resources() -> dict[str, Any]:
    return {"num_gpus": 0}


def _with_environment(original: Any) -> Any:
    def _build_runtime_env(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = original(self)
        variables = found.setdefault("env_vars", {})
        for name in _BEFORE_PYTHON:
            if name in os.environ:
                variables.setdefault(name, os.environ[name])
        return found

    return _build_runtime_env


def _node_only(self: Any) -> tuple[str, list[int]]:
    import ray

    return ray.get_runtime_context().get_node_id(), []
