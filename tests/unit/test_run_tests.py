# SPDX-License-Identifier: Apache-2.0
"""The parts of ``make test`` are all of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_tests

ROOT = Path(__file__).parents[2]


def files_of(part: list[str]) -> set[Path]:
    """By pytest's rules for what is given and ignored."""
    given = [ROOT / name for name in part if not name.startswith("--")]
    ignored = [ROOT / name.removeprefix("--ignore=") for name in part if name.startswith("--ignore=")]
    assert len(given) + len(ignored) == len(part) and all(path.exists() for path in (*given, *ignored))
    found = {file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py"))}
    return {file for file in found if not any(path == file or path in file.parents for path in ignored)}


def test_each_file_is_in_one_part() -> None:
    parts = [files_of(part) for stage in run_tests.stages() for part in stage.values()]
    assert len(parts) == 3 and all(parts)
    assert sorted(file for part in parts for file in part) == sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((0, 5), 0), ((5, 0), 0), ((5, 5), 5), ((1, 0), 1), ((0, 2), 2), ((5, 1), 1)]
)
def test_one_part_may_have_nothing_to_run(codes: tuple[int, int], code: int) -> None:
    assert run_tests.exit_code(codes) == code


def test_what_failed_is_said_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A failure of the first stage is not lost above what the second prints."""
    (tmp_path / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n")
    (tmp_path / "test_b.py").write_text("def test_good(): pass\n")
    monkeypatch.setattr(run_tests, "failed", [])
    monkeypatch.setattr(
        run_tests, "stages", lambda: [{"a": [f"{tmp_path}/test_a.py"]}, {"b": [f"{tmp_path}/test_b.py"]}]
    )
    assert run_tests.main(["-p", "no:cacheprovider", f"--rootdir={tmp_path}"]) == 1
    *_, before, last = capfd.readouterr().out.splitlines()
    assert before.startswith("b: 1 passed") and last.startswith("FAILED ")
    assert last.endswith("test_a.py::test_bad - AssertionError: one is not two")


def test_arguments_go_to_all() -> None:
    command = [sys.executable, "-m", "tools.run_tests", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert sorted(line.partition(": ")[0::2] for line in done.stdout.splitlines()) == [
        (name, f"pytest {pytest.__version__}") for name in ("engines", "units a-m", "units n-z")
    ]
