# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM loads in every process, before its command line is built."""

from __future__ import annotations


def register() -> None:
    """Add ``--nanocp`` to vLLM. Without the flag nothing in vLLM behaves differently. May be called repeatedly."""
    from .entry import cli

    cli.install()
