# SPDX-License-Identifier: Apache-2.0
"""Run all tests that need no GPU, in two pytest processes side by side: ``python -m tools.run_tests [ARGUMENTS]``.

Engines leave cores idle while they start and end, and tests without engines use one core each. The halves take about
as long as each other; together they need about 16 GiB. Their lines are told apart by what is before them. Arguments
are pytest's, for both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# Pytest's exit code where no test was selected, as happens in one half with ``-k``.
NOTHING = 5


def halves() -> dict[str, list[str]]:
    """What each process is given to run, by its name."""
    early = sorted(glob("tests/unit/test_[a-m]*.py", root_dir=ROOT))
    rest = ["tests", "--ignore=tests/engine", *(f"--ignore={file}" for file in early)]
    return {"engines": ["tests/engine", *early], "servers": rest}


def exit_code(codes: Sequence[int]) -> int:
    """The first failure; if there is none, 0 if any has run a test."""
    failures = [code for code in codes if code not in (0, NOTHING)]
    return failures[0] if failures else min(codes)


def _tell(name: str, lines: IO[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{name}: {line}")  # at once, so that lines of both stay whole
        sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    # Unbuffered, so that what it says is seen at once.
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-m", "not gpu"]
    how: dict[str, Any] = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    processes = {name: subprocess.Popen([*command, *half, *arguments], **how) for name, half in halves().items()}

    def interrupt(*_: object) -> None:
        """Both end their engines and servers. Ctrl-C reaches them anyhow."""
        for process in processes.values():
            process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, lambda *_: None)
    tellers = [
        threading.Thread(target=_tell, args=(name, process.stdout), daemon=True) for name, process in processes.items()
    ]
    for teller in tellers:
        teller.start()
    codes = [process.wait() for process in processes.values()]
    for teller in tellers:
        teller.join(5)  # what a test has left behind may hold the pipe
    return exit_code(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
