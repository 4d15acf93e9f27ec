# SPDX-License-Identifier: Apache-2.0
"""How many visits between any two ranks CUDA graphs of sharded decode steps have room for.

The workers capture so many; the scheduler lets no more be, for a step with more runs outside of graphs.
"""

from __future__ import annotations

from typing import Any

from vllm.config.compilation import CUDAGraphMode

from . import config as nanocp_config
from .config import largest_capacity

# Most visits where vLLM has no graphs whose sizes would say.
_EAGER = 512
# With the collective exchange a graph exchanges as many rows as its capacity with each rank, used or not. So there are
# several capacities, and none that needs more rows than this over all ranks: the memory of more was never counted.
_COLLECTIVE, _COLLECTIVE_ROWS = (16, 64, 256), 8192
# What attends to latents takes all places of a capacity, used or not, whichever the exchange is. One long request
# beside short ones is the common case: with 128 heads and three drafts it has the longer gap by 9 % where 16 is the
# smallest (gpu_latent_speed_2xH200.json).
_LATENT = (4, *_COLLECTIVE)


def capacities(vllm_config: Any, routed: bool) -> tuple[int, ...]:
    """For how many visits between any two ranks there are tables and graphs, ascending: if not set, enough for a batch
    of vLLM's largest graph of which every request visits all other ranks.

    Args:
        vllm_config: finished.
        routed: whether a step costs what it exchanges, so that there need be only one.
    """
    config = nanocp_config.of(vllm_config)
    if config.graph_capacities is not None:
        return config.graph_capacities
    sizes, queries = vllm_config.compilation_config.cudagraph_capture_sizes, 1 + vllm_config.num_speculative_tokens
    largest = max(1, max(sizes) // queries) if sizes else _EAGER  # requests
    most = min(vllm_config.scheduler_config.max_num_seqs, largest, largest_capacity(config.ranks, queries))
    latent = vllm_config.model_config.use_mla
    if routed and not latent:
        return (most,)
    most = min(most, max(_COLLECTIVE[0], _COLLECTIVE_ROWS // (config.ranks * queries)))
    return (*(c for c in (_LATENT if latent else _COLLECTIVE) if c < most), most)


def replays(vllm_config: Any) -> bool:
    """Whether sharded steps may replay graphs: not where the ranks must ask each other which graph they take."""
    mode = vllm_config.compilation_config.cudagraph_mode
    full = mode is not None and mode.decode_mode() == CUDAGraphMode.FULL
    return full and vllm_config.lora_config is None and not vllm_config.model_config.is_encoder_decoder


def visit_room(vllm_config: Any) -> int | None:
    """Visits between any two ranks that graphs of the largest capacity have room for, whichever exchange the workers
    will take; None where there is no bound: sharded steps replay no graphs.

    Args:
        vllm_config: finished.
    """
    config = nanocp_config.of(vllm_config)
    if config.degree_limit == 1 or not vllm_config.use_v2_model_runner or not replays(vllm_config):
        return None
    found = capacities(vllm_config, routed=config.exchange == "routed")
    return found[-1] if found else None
