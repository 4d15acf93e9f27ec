# SPDX-License-Identifier: Apache-2.0
"""vLLM as it is without patches, whatever has been applied in this process before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from vllm_nanocp.patches._guard import is_ours


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Called with a class or module of vLLM and names there: for this test they are what they are without patches.

    It returns the class or module, to which the test may apply a patch.
    """

    def unpatched(owner: Any, *names: str) -> Any:
        for name in names:
            found = inspect.getattr_static(owner, name)
            function = found.__func__ if (bound := isinstance(found, staticmethod | classmethod)) else found
            while function is not None and is_ours(function):
                function = getattr(function, "__wrapped__", None)
            monkeypatch.setattr(owner, name, type(found)(function) if bound else function)
            bases = inspect.getmro(owner)[1:] if inspect.isclass(owner) else ()
            if function is None or any(vars(base).get(name) is function for base in bases):
                monkeypatch.delattr(owner, name)  # added by a patch, or inherited
        return owner

    return unpatched


@pytest.fixture
def on_cpu() -> None:
    """For tests of what vLLM does on its CPU platform, with its kernels."""
    current_platform = pytest.importorskip("vllm.platforms").current_platform
    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU platform")
    current_platform.import_kernels()
