# SPDX-License-Identifier: Apache-2.0
"""Run all tests that need no GPU: ``python -m tools.run_tests [ARGUMENTS]``.

First those that start engines and servers, one after another: their processes spin while they wait, so that two of them
side by side take longer on two cores, and servers do not start in time. Then the unit tests, in two pytest processes
side by side, whose lines are told apart by what is before them. What failed is said once more at the end: a log may be
kept in part. Arguments are pytest's, for all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# Pytest's exit code where no test was selected, as happens in one part with ``-k``.
NOTHING = 5
# How pytest's summary names a failure: with the test and the last line of what was wrong.
FAILURES = ("FAILED ", "ERROR ")
interrupted = False
failed: list[str] = []


def stages() -> list[dict[str, list[str]]]:
    """What runs one after another; of each, what each process side by side is given to run, by its name."""
    early = sorted(glob("tests/unit/test_[a-m]*.py", root_dir=ROOT))
    rest = ["tests/unit", *(f"--ignore={file}" for file in early)]
    return [{"engines": ["tests", "--ignore=tests/unit"]}, {"units a-m": early, "units n-z": rest}]


def exit_code(codes: Sequence[int]) -> int:
    """The first failure; if there is none, 0 if any has run a test."""
    failures = [code for code in codes if code not in (0, NOTHING)]
    return failures[0] if failures else min(codes)


def _tell(name: str, lines: IO[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{name}: {line}")  # at once, so that lines of both stay whole
        sys.stdout.flush()
        if line.startswith(FAILURES):
            failed.append(line.rstrip()[:200])


def run(parts: dict[str, list[str]], arguments: Sequence[str]) -> list[int]:
    """Exit codes of pytest processes side by side."""
    # Unbuffered, so that what it says is seen at once.
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-m", "not gpu"]
    wide = os.environ | {"COLUMNS": "200"}  # so that the summary has room for what was wrong
    how: dict[str, Any] = dict(
        cwd=ROOT, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    processes = {name: subprocess.Popen([*command, *part, *arguments], **how) for name, part in parts.items()}

    def interrupt(number: int, _: object) -> None:
        """They end their engines and servers. Ctrl-C reaches them anyhow."""
        global interrupted
        interrupted = True
        if number != signal.SIGINT:
            for process in processes.values():
                process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    tellers = [
        threading.Thread(target=_tell, args=(name, process.stdout), daemon=True) for name, process in processes.items()
    ]
    for teller in tellers:
        teller.start()
    codes = [process.wait() for process in processes.values()]
    for teller in tellers:
        teller.join(5)  # what a test has left behind may hold the pipe
    return codes


def main(arguments: Sequence[str]) -> int:
    """All stages, unless one is interrupted: what fails in one says nothing of the next."""
    codes: list[int] = []
    for parts in stages():
        if not interrupted:
            codes += run(parts, arguments)
    for line in failed:
        print(line)
    return exit_code(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
