# SPDX-License-Identifier: Apache-2.0
"""What of vLLM this package touches, and what of that another vLLM has otherwise. A vLLM is read as text: nothing of
it is imported, and of a release only the wheel is downloaded. Exit code 0: nothing; 1: something is not as recorded;
2: there is nothing to read, or to compare with."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import manifest
from .theirs import Tree


class InputError(ValueError):
    """What was named cannot be read; the text is one line."""


@contextlib.contextmanager
def _source(given: str | None) -> Iterator[Path]:
    """The vLLM to read: a wheel or folder, a release to download for as long as it is read, or the installed one."""
    if given is None:
        found = importlib.util.find_spec("vllm")
        if found is None or found.origin is None:
            raise InputError("no vLLM is installed; name a wheel, a folder or a version")
        yield Path(found.origin).parent
    elif given and Path(given).exists():
        yield Path(given)
    elif not re.fullmatch(r"\d+(\.\d+)*(\.?[a-z]+\d*)*(\+[\w.]+)?", given):
        raise InputError(f"{given!r} is no file, no folder and no version")
    else:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
            done = subprocess.run([*pip, f"vllm=={given}"], check=False, stderr=subprocess.PIPE, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it has no wheel"]
                raise InputError(f"vllm=={given} cannot be downloaded ({said[-1]})")
            yield wheels[0]


def _tree(source: Path) -> Tree:
    try:
        return Tree(source)
    except zipfile.BadZipFile:
        raise InputError(f"{source} is no wheel") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_nanocp.vllm_touch", description=__doc__)
    add = parser.add_argument
    add("vllm", nargs="?", help="a wheel, a folder or a version; by default what is installed")
    add("--since", metavar="VERSION", help="compare with this version; by default its own if recorded, else the newest")
    add("--record", action="store_true", help="after that record what it looks like: somebody has read each line")
    add("--list", action="store_true", help="all names, what is done with them, and the files here")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code, see above."""
    args = _parser().parse_args(given)
    try:
        with _source(args.vllm) as source:
            tree = _tree(source)
            if args.list:
                for name, one in manifest.touched(tree).items():
                    print(f"{name}  [{', '.join(one.kinds)}: {', '.join(one.files)}]")
                return 0
            if args.record and not tree.version:
                raise InputError(f"{source} does not say its version (vllm/_version.py); it cannot be recorded")
            found = manifest.breaks(tree, args.since)
            for line in found:
                print(line)
            if args.record:
                manifest.save(manifest.note(tree, manifest.load()))
            names = len(manifest.touched(tree))
            print(f"vLLM {tree.version or source}: {names} names touched, {len(found)} breaks", file=sys.stderr)
            return 1 if found else 0
    except (ValueError, SyntaxError, OSError) as error:  # text that is no Python of this version or no UTF-8, too
        print(f"vllm_nanocp.vllm_touch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
