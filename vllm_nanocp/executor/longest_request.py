# SPDX-License-Identifier: Apache-2.0
"""How long a request may be: as many ranks' caches as it may be spread over.

vLLM 0.32 refuses to start when one worker's KV cache cannot hold one request of ``max_model_len`` tokens
(``vllm/v1/core/kv_cache_utils.py``, ``_check_enough_kv_cache_memory``; ``_auto_fit_max_model_len`` for
``--max-model-len -1``). Here a request may use ``degree`` such caches, so both are shown that much memory.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils

_check = kv_cache_utils._check_enough_kv_cache_memory
_auto_fit = kv_cache_utils._auto_fit_max_model_len


def install(degree: int) -> None:
    """Let this process's checks count ``degree`` caches of the size they are given. Idempotent."""

    def whole_blocks(memory: int, vllm_config: Any, groups: Any) -> int:
        """Bytes of ``degree`` caches: what is left of a block on one rank makes no block with another's."""
        per_block = kv_cache_utils._pool_bytes_per_block(vllm_config, groups)
        return memory // per_block * per_block * degree

    def check(available_memory: int, get_needed_memory: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config, groups = get_needed_memory.args  # vLLM binds exactly these
        return _check(whole_blocks(available_memory, vllm_config, groups), get_needed_memory, *args, **kwargs)

    def auto_fit(vllm_config: Any, groups: Any, available_memory: list[int]) -> Any:
        scaled = [
            whole_blocks(memory, vllm_config, some) if some else memory
            for memory, some in zip(available_memory, groups, strict=True)
        ]
        return _auto_fit(vllm_config, groups, scaled)

    kv_cache_utils._check_enough_kv_cache_memory = check  # type: ignore[assignment]
    kv_cache_utils._auto_fit_max_model_len = auto_fit  # type: ignore[assignment]
