# SPDX-License-Identifier: Apache-2.0
"""Executors that are refused, and Ray where it is not installed."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_nanocp.entry.engine_config import EXECUTORS, check_flags
from vllm_nanocp.errors import NanoCPConfigError


def check(backend: Any) -> None:
    check_flags(SimpleNamespace(distributed_executor_backend=backend))


@pytest.mark.parametrize("backend", ["uni", "external_launcher", "some.other.Executor", object])
def test_other_executors(backend: Any) -> None:
    with pytest.raises(NanoCPConfigError, match="use mp or ray, or leave it out"):
        check(backend)


@pytest.mark.parametrize("backend", ["ray", EXECUTORS["ray"]])
def test_ray_is_not_installed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NanoCPConfigError) as raised:
        check(backend)
    text = str(raised.value)
    assert "\n" not in text and "not installed" in text and "pip install 'vllm-nanocp[ray]'" in text
    check("mp")
    check(None)


def test_ray_is_installed() -> None:
    pytest.importorskip("ray")
    check("ray")
