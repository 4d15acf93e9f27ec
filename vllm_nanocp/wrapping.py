# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM that are wrapped: each once by each module here, however often its ``install`` is called.

A wrapper carries the names of all modules here that are in it. So several of them may wrap one function, whoever comes
first, and what a test puts back can be wrapped again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

logger = init_logger("vllm.nanocp")

Wrapper = TypeVar("Wrapper", bound=Callable[..., Any])
_BY = "_nanocp_wrapped_by"


def to_wrap(owner: Any, name: str, by: str) -> Any:
    """What a module is to wrap.

    Args:
        owner: a class or module of vLLM.
        name: of a function, method, static method, class method or property there.
        by: the module's ``__name__``.

    Returns:
        The function, also of a class method or a property; None if this module has wrapped it.

    Raises:
        AttributeError: there is no such name.
    """
    found = inspect.getattr_static(owner, name)
    function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    return None if by in getattr(function, _BY, ()) else function


def wraps(function: Callable[..., Any], by: str) -> Callable[[Wrapper], Wrapper]:
    """``functools.wraps`` for a wrapper of what ``to_wrap`` gave to the same module."""

    def note(wrapper: Wrapper) -> Wrapper:
        functools.update_wrapper(wrapper, function)
        setattr(wrapper, _BY, (*getattr(function, _BY, ()), by))
        logger.debug("nanocp: %s.%s is wrapped by %s", function.__module__, function.__qualname__, by)
        return wrapper

    return note
