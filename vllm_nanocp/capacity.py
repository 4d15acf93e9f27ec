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

    def check(available_memory: int, *args: Any, **kwargs: Any) -> Any:
        return _check(available_memory * degree, *args, **kwargs)

    def auto_fit(vllm_config: Any, groups: Any, available_memory: list[int]) -> Any:
        return _auto_fit(vllm_config, groups, [memory * degree for memory in available_memory])

    kv_cache_utils._check_enough_kv_cache_memory = check
    kv_cache_utils._auto_fit_max_model_len = auto_fit  # type: ignore[assignment]
