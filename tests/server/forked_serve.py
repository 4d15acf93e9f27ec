# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm``, with processes that start in half the time (``tests/forked.py``)."""

from __future__ import annotations

from multiprocessing import forkserver

if __name__ == "__main__":
    from tests import forked  # noqa: F401

    forkserver.ensure_running()  # it imports while this process does
    from vllm.entrypoints.cli.main import main

    main()
