# SPDX-License-Identifier: Apache-2.0
"""What of vLLM this package touches and what of that another vLLM has otherwise; see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import manifest
from .theirs import Tree


@contextlib.contextmanager
def _source(given: str | None) -> Iterator[Path]:
    """The vLLM to read: a wheel or folder, a release to download for as long as it is read, or the installed one."""
    if given is None:
        found = importlib.util.find_spec("vllm")
        if found is None or found.origin is None:
            raise SystemExit("no vLLM is installed: name a wheel, a folder or a version")
        yield Path(found.origin).parent
    elif Path(given).exists():
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
            done = subprocess.run([*pip, f"vllm=={given}"], check=False)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                raise SystemExit(f"{given} is no file, no folder and no version of vLLM that pip can download")
            yield wheels[0]


def main() -> int:
    """Returns 1 if something is not as recorded, else 0."""
    parser = argparse.ArgumentParser(prog="python -m vllm_nanocp.vllm_touch", description=__doc__)
    parser.add_argument("vllm", nargs="?", help="a wheel, a folder or a version; by default what is installed")
    parser.add_argument("--since", metavar="VERSION", help="compare with what was recorded of this version")
    parser.add_argument("--record", action="store_true", help="this vLLM has been read: record what it looks like")
    parser.add_argument("--list", action="store_true", help="all names, what is done with them, and the files here")
    args = parser.parse_args()
    with _source(args.vllm) as source:
        tree = Tree(source)
        if args.list:
            for name, one in manifest.touched(tree).items():
                print(f"{name}  [{', '.join(one.kinds)}: {', '.join(one.files)}]")
            return 0
        if args.record:
            manifest.save(manifest.note(tree, manifest.load()))
        found = manifest.breaks(tree, args.since)
        for line in found:
            print(line)
        names = len(manifest.touched(tree))
        print(f"vLLM {tree.version or source}: {names} names touched, {len(found)} breaks", file=sys.stderr)
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
