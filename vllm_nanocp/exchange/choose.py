# SPDX-License-Identifier: Apache-2.0
"""Which exchange the ranks use."""

from __future__ import annotations

from ..errors import NanoCPConfigError


def choose(wanted: str, problem: str) -> tuple[str, str]:
    """The exchange, and why it.

    Args:
        wanted: the setting ``exchange``.
        problem: why the ranks cannot use ``routed``; empty if they can.

    Returns:
        Its name, not ``auto``; and a reason for the log.

    Raises:
        NanoCPConfigError: ``routed`` was asked for, and there is a problem.
    """
    if wanted == "collective":
        return wanted, "as set"
    if wanted == "routed" and problem:
        raise NanoCPConfigError(f"nanocp: exchange 'routed' is not supported: {problem}; use 'auto' or 'collective'")
    return ("collective", problem) if problem else ("routed", "the ranks' GPUs reach each other's memory")
