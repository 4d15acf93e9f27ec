# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks/soak.py`` judges from outside of a server: its log, its files, what is left of it."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

watch = pytest.importorskip("soak_watch")

REFUSED = """\
(ApiServer_1 pid=7) ERROR 11-29 12:08:50 [validation.py:151] Traceback (most recent call last):
(ApiServer_1 pid=7) ERROR 11-29 12:08:50 [validation.py:151]   File "routing.py", line 723, in app
(ApiServer_1 pid=7) ERROR 11-29 12:08:50 [validation.py:151] fastapi.exceptions.RequestValidationError: 4 errors:
"""
BARE = "Traceback (most recent call last):\n  File 'x.py', line 1\nKeyError: 'r1'\nValueError: not this one\n"


def warnings(count: int) -> str:
    return "".join(
        f"\x1b[1m(EngineCore pid={n}) WARNING 11-29 12:08:{n:02d} [x.py:{n}] {n} blocks\x1b[0m\n" for n in range(count)
    )


@pytest.mark.parametrize(
    ("text", "passes", "raised"),
    [
        (REFUSED, True, {"RequestValidationError": 1}),
        (REFUSED + BARE, False, {"RequestValidationError": 1, "KeyError": 1}),
        (warnings(watch.MOST_ALIKE), True, {}),
        (warnings(watch.MOST_ALIKE + 1), False, {}),
    ],
)
def test_log(text: str, passes: bool, raised: dict[str, int]) -> None:
    found = watch.log(text)
    assert (found["pass"], found["raised"]) == (passes, raised)
    if not raised:
        assert found["alike"] == {"WARNING [x.py:N] N blocks": text.count("\n")}


@pytest.mark.parametrize(
    ("end", "passes"),
    [({"a": [20 + watch.MORE_FILES, 3]}, True), ({"a": [21 + watch.MORE_FILES, 3]}, False), ({}, False)],
)
def test_files(end: dict[str, list[int]], passes: bool) -> None:
    """A process that is gone holds none, which is not what was there at the start."""
    found = watch.files([{"a": [6, 3]}, {"a": [20, 3]}, *[{"a": [90, 9]}] * 3, end])
    assert found["pass"] == passes
    assert found["most"] == {"a": [90, 9]}


def test_left(tmp_path: Path) -> None:
    """A process and a name of shared memory are seen while they are there, and not after."""
    memory = SharedMemory(create=True, size=64)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    (tmp_path / "3f0c1a2b-1d2e-4f00-8000-0123456789ab").touch()

    def members() -> list[Any]:
        return [psutil.Process(sleeper.pid)] if sleeper.poll() is None else []

    try:
        shared = watch.shared_memory([psutil.Process(os.getpid())])
        assert memory.name in shared
        found = watch.left(SimpleNamespace(members=members), shared, tmp_path, 0.0)
        assert not found["pass"] and len(found["processes"]) == 1 and memory.name in found["shared_memory"]
        assert found["temporary_files"] == {"*": 1}
    finally:
        sleeper.kill()
        sleeper.wait()
        memory.close()
        memory.unlink()
    assert watch.left(SimpleNamespace(members=members), {memory.name}, tmp_path, 0.0)["pass"]
