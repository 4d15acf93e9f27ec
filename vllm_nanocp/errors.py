# SPDX-License-Identifier: Apache-2.0
"""Errors a user can cause. Each carries one line: what is refused, why, and what to do instead."""

from typing import NoReturn


class NanoCPConfigError(ValueError):
    """A flag, a config key, a model or a vLLM feature that cannot work with ``--nanocp``."""


class NanoCPError(RuntimeError):
    """Something that nobody can repair at run time; the engine ends with it."""


def refuse(what: str, why: str, instead: str) -> NoReturn:
    """Raises NanoCPConfigError with one line."""
    raise NanoCPConfigError(f"nanocp: {what} is not supported: {why}; {instead}")
