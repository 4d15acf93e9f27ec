# SPDX-License-Identifier: Apache-2.0
"""What a front-end says of the number of workers and ranks, which it takes from a configuration of one rank.

Trainers size their groups by ``/get_world_size`` (or ``LLM.get_world_size``). Touches, in vLLM 0.32:
``ParallelConfig.world_size_across_dp``, which both of them read; ``build_system_fingerprint``
(``vllm/entrypoints/serve/utils/fingerprint.py``), whose text names the degrees of parallelism; ``init_app_state``
(``vllm/entrypoints/launchers/api_server/``), which keeps the configuration for ``/server_info`` only; and
``AsyncLLM._scale_elastic_ep``, which compares a wanted number of ranks with the configuration's, so that
``/scale_elastic_ep`` would report one rank as reached.
"""

from __future__ import annotations

import functools
import sys
from copy import copy
from types import SimpleNamespace
from typing import Any

from .. import config as nanocp_config
from ..wrapping import to_wrap, wraps

_RANKS = "_nanocp_ranks"


def install(parallel_config: Any, ranks: int) -> None:
    """Let this process's front-end tell of all ranks.

    Args:
        parallel_config: of the engine; it knows one rank.
        ranks: how many there are.
    """
    from vllm.config import ParallelConfig

    setattr(parallel_config, _RANKS, ranks)
    across = to_wrap(ParallelConfig, "world_size_across_dp", __name__)
    if across is None:
        return

    @wraps(across, __name__)
    def world_size_across_dp(self: Any) -> int:
        """Process world size across TP, PCP, PP, and DP."""
        ranks = getattr(self, _RANKS, None)
        return int(across(self) if ranks is None else self.tensor_parallel_size * ranks)

    ParallelConfig.world_size_across_dp = property(world_size_across_dp)  # type: ignore[assignment,method-assign]
    _name_the_ranks()
    _show_the_ranks()
    _refuse_to_scale()


def _name_the_ranks() -> None:
    """In ``system_fingerprint``."""
    from vllm.entrypoints.serve.utils import fingerprint

    build = fingerprint.build_system_fingerprint

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

    fingerprint.build_system_fingerprint = build_system_fingerprint


def _show_the_ranks() -> None:
    """At ``/server_info``, of a server in this process."""
    entry: Any = sys.modules.get("vllm.entrypoints.launchers.api_server.entry")
    if entry is None:
        return
    init = entry.init_app_state

    @functools.wraps(init)
    async def init_app_state(engine_client: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        await init(engine_client, state, *args, **kwargs)
        ranks = getattr(state.vllm_config.parallel_config, _RANKS, None)
        if ranks is not None:
            state.vllm_config = copy(state.vllm_config)
            state.vllm_config.parallel_config = parallel = copy(state.vllm_config.parallel_config)
            parallel.data_parallel_size = parallel.data_parallel_size_local = ranks

    entry.init_app_state = init_app_state


def _refuse_to_scale() -> None:
    """At ``/scale_elastic_ep``, or by ``AsyncLLM.scale_elastic_ep``."""
    from vllm.v1.engine.async_llm import AsyncLLM

    scale = AsyncLLM._scale_elastic_ep

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

    AsyncLLM._scale_elastic_ep = scale_elastic_ep  # type: ignore[method-assign]
