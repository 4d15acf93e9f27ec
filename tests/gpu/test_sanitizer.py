# SPDX-License-Identifier: Apache-2.0
"""The kernel of the routed exchange under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import TWO_GPUS

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = [
    pytest.mark.gpu,
    TWO_GPUS,
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer (CUDA toolkit) is not installed"),
]


@pytest.mark.parametrize("tool", ["memcheck --report-api-errors no", "racecheck"])
def test_clean(tool: str) -> None:
    """Random routes between two ranks. Every tensor is an allocation of its own, for within torch's pools nothing is
    out of bounds."""
    env = os.environ | {"NANOCP_ROUTE_STEPS": "30", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = [SANITIZER, "--target-processes", "all", "--error-exitcode", "9", "--tool", *tool.split()]
    test = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*check, sys.executable, *test, f"{Path(__file__).with_name('test_attention.py')}::test_random_routes[2]"],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-2000:]}"
    assert "0 errors" in run.stdout, run.stdout[-2000:]
    assert "1 passed" in run.stdout, run.stdout[-2000:]
