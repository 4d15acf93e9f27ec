# SPDX-License-Identifier: Apache-2.0
"""The vLLM versions this plugin was read against, and what differs between them.

Each difference is one function or constant here, with the version that it is for. When 0.32 is supported no more (some
months after 0.33, which is of November 2026), those that say so go, and their callers take what 0.33 has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

SUPPORTED = ("0.32.0", "0.33.0")
RUN = "0.32.0"  # the newest of these with which engines have run on its own compiled code, and on GPUs
_FIRST = (0, 32, 0)
_NEXT = (0, 34, 0)


def _release(version: str) -> tuple[int, int, int] | None:
    """The leading ``X.Y.Z`` of a PEP 440 version, or None when there is none ("dev")."""
    parts: list[int] = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    if len(parts) < 2:
        return None
    return parts[0], parts[1], parts[2] if len(parts) > 2 else 0


def unsupported_reason(vllm_version: str) -> str | None:
    """Why ``--nanocp`` cannot be used with this vLLM, in one line; None when it can."""
    release = _release(vllm_version)
    if release is not None and _FIRST <= release < _NEXT:
        return None
    return (
        f"nanocp: vLLM {vllm_version} is not supported (supported: {', '.join(SUPPORTED)}); "
        f"install vllm=={RUN} or start without --nanocp"
    )


def kv_cache_planning() -> tuple[Any, Callable[..., int]]:
    """The module that checks at start whether the KV cache is large enough, and its function for the bytes of a block:
    of ``kv_cache_utils`` in 0.32. Can go with 0.32.

    Returns:
        The module, and the function of what its checks bind: the configuration and KV cache groups, in 0.33 after the
        builder of configurations.
    """
    try:
        from vllm.v1.core import kv_cache_planning  # type: ignore[attr-defined]
    except ImportError:
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils, kv_cache_utils._pool_bytes_per_block
    return kv_cache_planning, kv_cache_planning._pool_bytes_per_block_from_builder


@cache
def agreed_requests_are_padded() -> bool:
    """Whether ``DPSyncState.num_reqs`` is that of the graph, where one is replayed, and not the most of any rank: in
    0.32. Can go with 0.32."""
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

    return not hasattr(DPSyncState, "skip_drafts")  # new with the other meaning


def note_grammar_error(errors: Any, request_id: str) -> None:
    """Note a request whose grammar has failed, for vLLM's scheduler to end it. Can go with 0.32.

    Args:
        errors: ``Scheduler.grammar_compile_error_reqs``: a set in 0.32, and in 0.33 a dict with what clients are told;
            that there is an error, if nothing else.
        request_id: the request's.
    """
    if isinstance(errors, set):
        errors.add(request_id)
    else:
        errors[request_id] = None
