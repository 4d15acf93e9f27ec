# SPDX-License-Identifier: Apache-2.0
"""How long a request may be: as many ranks' caches as it may be spread over.

vLLM refuses to start when one worker's KV cache cannot hold one request of ``max_model_len`` tokens
(``_check_enough_kv_cache_memory``, in the module that ``compat`` names; ``_auto_fit_max_model_len`` for
``--max-model-len -1``). Here a request may use ``degree`` such caches, so both are shown that much memory.
"""

from __future__ import annotations

from typing import Any

from .. import compat

_planning, _bytes_per_block = compat.kv_cache_planning()
_check = _planning._check_enough_kv_cache_memory
_auto_fit = _planning._auto_fit_max_model_len


def install(degree: int) -> None:
    """Let this process's checks count ``degree`` caches of the size they are given. Idempotent."""

    def whole_blocks(memory: int, *planned: Any) -> int:
        """Bytes of ``degree`` caches: what is left of a block on one rank makes no block with another's."""
        per_block = _bytes_per_block(*planned)
        return memory // per_block * per_block * degree

    def check(available_memory: int, get_needed_memory: Any, *args: Any, **kwargs: Any) -> Any:
        planned = get_needed_memory.args  # vLLM binds exactly what the size of a block is asked with
        return _check(whole_blocks(available_memory, *planned), get_needed_memory, *args, **kwargs)

    def auto_fit(*args: Any) -> Any:
        *planned, groups, available_memory = args
        scaled = [
            whole_blocks(memory, *planned, some) if some else memory
            for memory, some in zip(available_memory, groups, strict=True)
        ]
        return _auto_fit(*planned, groups, scaled)

    _planning._check_enough_kv_cache_memory = check
    _planning._auto_fit_max_model_len = auto_fit
