# SPDX-License-Identifier: Apache-2.0
"""What every patch module shares: its outcome, its error, and the check that vLLM is as known."""

from __future__ import annotations

import enum
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Collection
from typing import Any


class PatchError(RuntimeError):
    """vLLM is not what a patch was written for, so the patch was not applied.

    The message is one line and names the patch module and the vLLM version.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {reason} (vLLM {vllm_version()}); the patch was not applied")


class Outcome(enum.Enum):
    """What `apply()` of a patch module did."""

    APPLIED = "applied"
    NOT_NEEDED = "not needed"


def vllm_version() -> str:
    """The running vLLM's version, "unknown" where it cannot be imported."""
    try:
        from vllm import version
    except ImportError:
        return "unknown"
    return str(version.__version__)


def source_digest(function: Callable[..., Any]) -> str:
    """The first 16 hex digits of the SHA-256 of a function's dedented source text.

    Raises `OSError` where the source is not available.
    """
    text = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_source(module: str, function: Callable[..., Any], known: Collection[str]) -> None:
    """Raise `PatchError` unless the digest of `function`'s source is among `known`.

    A patch replaces a function whose body it has read. When upstream rewrites the body, replacing
    it blindly could undo the change or meet other callers, so a person has to look first.
    """
    name = getattr(function, "__qualname__", repr(function))
    try:
        digest = source_digest(function)
    except (OSError, TypeError) as error:
        raise PatchError(module, f"cannot read the source of {name}: {error}") from error
    if digest not in known:
        raise PatchError(module, f"{name} has changed upstream (source digest {digest})")


def require_parameters(module: str, function: Callable[..., Any], names: Collection[str]) -> None:
    """Raise `PatchError` unless `function` takes exactly the parameters `names`, in that order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(names):
        name = getattr(function, "__qualname__", repr(function))
        raise PatchError(module, f"{name} takes {found}, expected {tuple(names)}")
