# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of faults again and again, and counts how often each has passed.

    python benchmarks/faults.py --rounds 20 --out benchmarks/results/faults.json

A round is all of ``tests/server/test_faults*.py``, the cases that differ only in the failing rank included. The JSON is
written after each round; one that is there already is continued. With ``NANOCP_FAULT_REPEATS`` each test runs so often
in a round, with one start of the server that those share which it survives. The exit code is 1 if a test has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from serving import ENDINGS, end, probe, write_json
from soak import machine

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/server/test_faults.py", "tests/server/test_faults_requests.py")


def run_round(extra: list[str], minutes: float) -> tuple[list[tuple[str, bool, float]], str]:
    """Each test's name, whether it passed, and its seconds; and what pytest said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *extra]
        env = {**os.environ, "NANOCP_FAULT_ALL": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as pytest:
            try:
                said, _ = pytest.communicate(timeout=60 * minutes)
            except subprocess.TimeoutExpired:
                return [("a round in time", False, 60 * minutes)], ""
            finally:
                if pytest.poll() is None:
                    # It ends its servers, which are in sessions of their own, only if it is interrupted.
                    pytest.send_signal(signal.SIGINT)
                    pytest.communicate()
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
        results = []
        for case in cases:
            if case.get("name") is None:  # where it was interrupted
                continue
            name = f"{str(case.get('classname')).rsplit('.', 1)[-1]}::{case.get('name')}"
            name = re.sub(r"\[again\d+\]|again\d+-|-again\d+", "", name)
            failed = case.find("failure") is not None or case.find("error") is not None
            if case.find("skipped") is None:
                results.append((name, not failed, float(case.get("time") or 0.0)))
        return results, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30.0, help="limit of one round")
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="or other arguments of pytest")
    args = parser.parse_args()
    for number in ENDINGS:
        signal.signal(number, end)
    result: dict[str, Any] = {"tests": {}, "failures": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    repeats = os.environ.get("NANOCP_FAULT_REPEATS")
    prefix = f"NANOCP_FAULT_REPEATS={repeats} " if repeats else ""
    result |= {
        "commands": [
            *result.get("commands", []),
            prefix + shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        ],
        "date": time.strftime("%Y-%m-%d"),
        "versions": probe()["versions"],
        "machine": machine(),
    }
    for _ in range(args.rounds):
        cases, said = run_round(args.tests, args.minutes)
        for name, passed, seconds in cases:
            entry = result["tests"].setdefault(name, {"runs": 0, "passed": 0, "seconds": []})
            entry["runs"] += 1
            entry["passed"] += passed
            entry["seconds"] = [*entry["seconds"], round(seconds, 1)]
            entry["seconds_median"] = round(statistics.median(entry["seconds"]), 1)
            if not passed:
                result["failures"].append({"test": name, "said": re.findall(r"^E .*", said, re.MULTILINE)[:10]})
        write_json(args.out, result)
        print(f"{sum(passed for _, passed, _ in cases)} of {len(cases)} passed", flush=True)
    return 1 if result["failures"] or not result["tests"] else 0


if __name__ == "__main__":
    sys.exit(main())
