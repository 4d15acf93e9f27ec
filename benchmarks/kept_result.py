# SPDX-License-Identifier: Apache-2.0
"""What every kept result says of how it came to be, and how it is written."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def about(*modules: ModuleType) -> dict[str, Any]:
    """The command, today's date, the commit of this tree (with what was not committed: ``-dirty``), Python's version
    and those of the modules."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write JSON to a file, or print it if there is none."""
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    else:
        print(text)
