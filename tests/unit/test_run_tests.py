# SPDX-License-Identifier: Apache-2.0
"""The two halves of ``make test`` are all of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_tests

ROOT = Path(__file__).parents[2]


def files_of(half: list[str]) -> set[Path]:
    """By pytest's rules for what is given and ignored."""
    given = [ROOT / part for part in half if not part.startswith("--")]
    ignored = [ROOT / part.removeprefix("--ignore=") for part in half if part.startswith("--ignore=")]
    assert len(given) + len(ignored) == len(half) and all(path.exists() for path in (*given, *ignored))
    found = {file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py"))}
    return {file for file in found if not any(path == file or path in file.parents for path in ignored)}


def test_each_file_is_in_one_half() -> None:
    first, second = map(files_of, run_tests.halves().values())
    assert first and second and not first & second
    assert first | second == set((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((0, 5), 0), ((5, 0), 0), ((5, 5), 5), ((1, 0), 1), ((0, 2), 2), ((5, 1), 1)]
)
def test_one_half_may_have_nothing_to_run(codes: tuple[int, int], code: int) -> None:
    assert run_tests.exit_code(codes) == code


def test_arguments_go_to_both() -> None:
    command = [sys.executable, "-m", "tools.run_tests", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert sorted(line.split()[:2] for line in done.stdout.splitlines()) == [
        ["engines:", "pytest"],
        ["servers:", "pytest"],
    ]
