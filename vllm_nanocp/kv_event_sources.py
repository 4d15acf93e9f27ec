# SPDX-License-Identifier: Apache-2.0
"""Front-ends know where each rank publishes its KV events (``/kv_event_sources``), as with one engine a rank.

vLLM's engine says where it publishes in the first message to each of its front-ends, and has one place to say. An
engine with N ranks says it here for each, in a field beside those of vLLM, which front-ends that do not know it skip.
Touches vLLM 0.32's ``EngineCoreProc._make_ready_response`` and ``MPClient._apply_ready_response``.
"""

from __future__ import annotations

from typing import Any

from .wrapping import to_wrap, wraps

_FIELD = "nanocp_kv_event_sources"


def install_engine() -> None:
    """Let this process's engine tell of all ranks. Idempotent; engines with vLLM's own scheduler are left alone."""
    from dataclasses import fields, make_dataclass

    from vllm.config.kv_events import KVEventsConfig
    from vllm.v1.engine import EngineCoreReadyResponse
    from vllm.v1.engine.core import EngineCoreProc

    make = to_wrap(EngineCoreProc, "_make_ready_response", __name__)
    if make is None:
        return
    sources = (_FIELD, list[KVEventsConfig | None])
    message = make_dataclass("NanoCPReadyResponse", [sources], bases=(EngineCoreReadyResponse,), kw_only=True)
    names = [field.name for field in fields(EngineCoreReadyResponse)]

    @wraps(make, __name__)
    def make_ready_response(self: Any) -> Any:
        response = make(self)
        tell = getattr(self.scheduler, "kv_event_publisher_configs", None)
        if tell is None:
            return response
        return message(**{name: getattr(response, name) for name in names}, **{_FIELD: tell()})

    EngineCoreProc._make_ready_response = make_ready_response  # type: ignore[method-assign]


def install_front_end() -> None:
    """Let this process's clients of engines take it in. Idempotent."""
    import msgspec
    from vllm.config.kv_events import KVEventsConfig
    from vllm.v1.engine.core_client import MPClient

    apply = to_wrap(MPClient, "_apply_ready_response", __name__)
    if apply is None:
        return
    message = msgspec.defstruct("Sources", [(_FIELD, list[KVEventsConfig | None], msgspec.field(default_factory=list))])

    @wraps(apply, __name__)
    def apply_ready_response(self: Any, payload: bytes) -> None:
        apply(self, payload)
        if payload:
            for rank, source in enumerate(getattr(msgspec.msgpack.decode(payload, type=message), _FIELD)):
                if source is not None:
                    self._kv_event_sources[rank] = source

    MPClient._apply_ready_response = apply_ready_response  # type: ignore[method-assign]
