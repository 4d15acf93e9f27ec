# SPDX-License-Identifier: Apache-2.0
"""Which exchange serves ranks on so many nodes."""

from __future__ import annotations


def choose(wanted: str, num_nodes: int) -> str:
    """The exchange that the ranks use.

    Args:
        wanted: the setting ``exchange``. What the user names is taken.
        num_nodes: on how many nodes the ranks are.

    Returns:
        Its name; not ``auto``.
    """
    if wanted != "auto":
        return wanted
    # The only one that reaches other nodes. ``routed`` goes here for ``num_nodes == 1``, once it was verified on GPUs.
    return "collective"
