# SPDX-License-Identifier: Apache-2.0
"""What is wrapped is wrapped once by each module, in any order, and again when it was put back."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_nanocp.wrapping import to_wrap, wraps


class Owner:
    def method(self) -> list[str]:
        return []

    @classmethod
    def of_class(cls) -> list[str]:
        return []

    @property
    def number(self) -> list[str]:
        return []


def install(by: str, name: str) -> bool:
    """A module's ``install``."""
    function = to_wrap(Owner, name, by)
    if function is None:
        return False

    @wraps(function, by)
    def wrapper(self: Any) -> list[str]:
        return [*function(self), by]

    kind: Any = {"of_class": classmethod, "number": property}.get(name, lambda made: made)
    setattr(Owner, name, kind(wrapper))
    return True


@pytest.mark.parametrize("name", ["method", "of_class", "number"])
def test_once_by_each(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stock = inspect.getattr_static(Owner, name)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Owner, name, stock)
            assert [install(by, name) for by in ("a", "b", "a", "b", "a")] == [True, True, False, False, False]
            found = getattr(Owner(), name)
            assert (found() if callable(found) else found) == ["a", "b"]
            assert to_wrap(Owner, name, "a") is None and to_wrap(Owner, name, "c") is not None
        monkeypatch.undo()


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="gone"):
        to_wrap(Owner, "gone", "a")


@pytest.mark.parametrize(
    ("module", "install", "owner", "name"),
    [
        ("kv_event_sources", "install_engine", "vllm.v1.engine.core:EngineCoreProc", "_make_ready_response"),
        ("kv_event_sources", "install_front_end", "vllm.v1.engine.core_client:MPClient", "_apply_ready_response"),
        ("rank_hint", "install_front_end", "vllm.v1.engine.input_processor:InputProcessor", "process_inputs"),
        ("rank_hint", "install_engine", "vllm.v1.request:Request", "from_engine_core_request"),
        ("entry.http_limits", "install", "vllm.v1.engine.input_processor:InputProcessor", "process_inputs"),
        ("entry.cli", "install", "vllm.engine.arg_utils:EngineArgs", "create_engine_config"),
        ("entry.exit_code", "_install", "vllm.v1.engine.core_client:BackgroundResources", "validate_alive"),
        ("executor.failed_start", "install", "vllm.v1.engine.core:EngineCore", "__init__"),
        ("metrics.install", "install", "vllm.v1.metrics.loggers:StatLoggerManager", "__init__"),
        ("sched.rank.outlets", "install_engine", "vllm.v1.engine.core:EngineCoreProc", "process_output_sockets"),
        ("worker.queues", "install", "vllm.v1.executor.multiproc_executor:WorkerProc", "_init_message_queues"),
    ],
)
def test_installed_twice_is_installed_once(module: str, install: str, owner: str, name: str) -> None:
    where, _, kind = owner.partition(":")
    upstream = getattr(importlib.import_module(where), kind)
    ours = importlib.import_module(f"vllm_nanocp.{module}")
    getattr(ours, install)()
    first = inspect.getattr_static(upstream, name)
    assert to_wrap(upstream, name, ours.__name__) is None
    getattr(ours, install)()
    assert inspect.getattr_static(upstream, name) is first
