# SPDX-License-Identifier: Apache-2.0
"""What a front-end says of the number of workers and ranks, which it takes from a configuration of one rank.

Trainers size their groups by ``/get_world_size`` (or ``LLM.get_world_size``). Touches, in vLLM 0.32:
``ParallelConfig.world_size_across_dp``, which both of them read; ``build_system_fingerprint``
(``vllm/entrypoints/serve/utils/fingerprint.py``), whose text names the degrees of parallelism; and
``AsyncLLM._scale_elastic_ep``, which compares a wanted number of ranks with the configuration's, so that
``/scale_elastic_ep`` would report one rank as reached.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from . import config as nanocp_config

_MARK = "_nanocp_installed"
_RANKS = "_nanocp_ranks"


def install(parallel_config: Any, ranks: int) -> None:
    """Let this process's front-end tell of all ranks.

    Args:
        parallel_config: of the engine; it knows one rank.
        ranks: how many there are.
    """
    setattr(parallel_config, _RANKS, ranks)
    _install_once()


def _install_once() -> None:
    from vllm.config import ParallelConfig
    from vllm.entrypoints.serve.utils import fingerprint
    from vllm.v1.engine.async_llm import AsyncLLM

    if getattr(ParallelConfig, _MARK, False):
        return
    setattr(ParallelConfig, _MARK, True)
    across, build, scale = (
        ParallelConfig.world_size_across_dp.fget,  # type: ignore[attr-defined]
        fingerprint.build_system_fingerprint,
        AsyncLLM._scale_elastic_ep,
    )

    def world_size_across_dp(self: Any) -> int:
        """Process world size across TP, PCP, PP, and DP."""
        ranks = getattr(self, _RANKS, None)
        return int(across(self) if ranks is None else self.tensor_parallel_size * ranks)

    @functools.wraps(build)
    def build_system_fingerprint(vllm_config: Any, *args: Any, **kwargs: Any) -> str | None:
        parallel = getattr(vllm_config, "parallel_config", None)
        ranks = getattr(parallel, _RANKS, None)
        if ranks is None:
            return build(vllm_config, *args, **kwargs)
        names = ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel")
        degrees = SimpleNamespace(data_parallel_size=ranks, **{name: getattr(parallel, name) for name in names})
        told = SimpleNamespace(parallel_config=degrees, compute_hash=vllm_config.compute_hash)
        return build(told, *args, **kwargs)

    @functools.wraps(scale)
    async def scale_elastic_ep(self: Any, new_data_parallel_size: int, drain_timeout: int) -> None:
        if not nanocp_config.wanted(self.vllm_config.additional_config):
            return await scale(self, new_data_parallel_size, drain_timeout)
        ranks = getattr(self.vllm_config.parallel_config, _RANKS)
        if new_data_parallel_size != ranks:
            raise ValueError(
                f"nanocp: scaling from {ranks} to {new_data_parallel_size} ranks is not supported: their number is "
                "fixed at start; start the server again with another --data-parallel-size"
            )

    ParallelConfig.world_size_across_dp = property(world_size_across_dp)  # type: ignore[assignment,method-assign]
    fingerprint.build_system_fingerprint = build_system_fingerprint
    AsyncLLM._scale_elastic_ep = scale_elastic_ep  # type: ignore[method-assign]
