# SPDX-License-Identifier: Apache-2.0
"""What every patch module shares: its outcome, its error, the check that vLLM is as known, and the replacing."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

_MARK = "_nanocp_patch"


class PatchError(RuntimeError):
    """vLLM is not what a patch was written for, so the patch was not applied.

    The message is one line and names the patch module and the vLLM version.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module.rpartition('.')[2]}: {reason} (vLLM {vllm_version()}); the patch was not applied")


class Outcome(enum.Enum):
    """What `apply()` of a patch module did."""

    APPLIED = "applied"
    NOT_NEEDED = "not needed"


@dataclass(frozen=True)
class Guarded:
    """A function of vLLM that a patch has read, and what the patch makes of it.

    Attributes:
        owner: the class or module that has it, perhaps from a base.
        name: its name there; a static method or class method stays one.
        known: digests of its source with which the patch is right, or None if any will do.
        make: returns from the function (a class method's as a plain one) the one to put in its place;
            None if the patch only relies on it.
    """

    owner: Any
    name: str
    known: Collection[str] | None
    make: Callable[[Any], Callable[..., Any]] | None = None


def replace(module: str, *functions: Guarded) -> Outcome:
    """Put what a patch makes of functions in their place, of all or of none; once, however often it is asked.

    `module` is the patch's `__name__`. The first function with a `make` tells whether the patch has been applied.
    Raises `PatchError` if one of them is not as the patch has read it.
    """
    found = [(each, _stored(each)) for each in functions]
    if is_ours(next(function for each, (function, _) in found if each.make)):
        return Outcome.APPLIED
    for each, (function, _) in found:
        if each.known is not None:
            require_source(module, function, each.known)
    for each, (function, kind) in found:
        if each.make is not None:
            ours = each.make(function)
            # One that can be imported by its own name keeps it: Ray sends an actor's methods by their names.
            names = functools.WRAPPER_ASSIGNMENTS if "<locals>" in ours.__qualname__ else ()
            mark(functools.update_wrapper(ours, function, names))
            setattr(each.owner, each.name, ours if kind is None else kind(ours))
    return Outcome.APPLIED


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether a patch has put `function` in its place, whatever has been wrapped around it since."""
    return hasattr(function, _MARK)


def mark(function: Callable[..., Any]) -> None:
    """Say of a function that a patch has put it where it is."""
    setattr(function, _MARK, True)


def _stored(each: Guarded) -> tuple[Any, type | None]:
    """The plain function, and `staticmethod` or `classmethod` if it is kept in one."""
    found = inspect.getattr_static(each.owner, each.name)
    if isinstance(found, staticmethod | classmethod):
        return found.__func__, type(found)
    return found, None


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
