# SPDX-License-Identifier: Apache-2.0
"""Which names of vLLM this package touches, by file and by module of vLLM: docs/touch.md, which this writes.

    python -m tools.touch_page            # writes it
    python -m tools.touch_page --check    # fails if it is not up to date

The names are those of the oldest version that is supported, which must be installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from vllm_nanocp.vllm_touch import manifest, ours
from vllm_nanocp.vllm_touch.theirs import Tree

PAGE = Path(__file__).parent.parent / "docs" / "touch.md"
_HEAD = """# What is touched in vLLM

<!-- Written by tools/touch_page.py: change the sources that it reads. -->

{names} names of {modules} modules of vLLM {version}, as `python -m vllm_nanocp.vllm_touch --list` prints them, with the
names of the other versions that are supported. For what follows see [the design](design.md#what-is-touched-in-vllm).

| | | what is recorded of it, and compared |
|---|---|---|
| replaces | {replaces} | parameters and source: a function stands in for vLLM's, in a class, a module or one object |
| overrides | {overrides} | parameters and source, of the class that defines the method |
| subclasses | {subclasses} | parameters to make one with, and abstract methods |
| calls | {calls} | parameters |
| sets, reads | {other} | that there is such a name |

## By file
"""


def installed() -> Tree:
    """The vLLM of this environment.

    Raises:
        RuntimeError: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("no vLLM is installed")
    return Tree(Path(spec.origin).parent)


def page(tree: Tree, names: dict[str, manifest.Touched], uses: ours.Uses) -> str:
    """The whole text of docs/touch.md.

    Args:
        tree: the vLLM that the names are of.
        names: as ``manifest.touched`` finds them.
        uses: what they were found in.
    """
    kinds = [one.kinds[0] for one in names.values()]
    counts = {kind: kinds.count(kind) for kind in ours.KINDS}
    modules = {_module(tree, name) for name in names}
    counts["other"] = counts["sets"] + counts["reads"]
    text = [_HEAD.format(names=len(names), modules=len(modules), version=tree.version, **counts)]
    for file in sorted({file for one in names.values() for file in one.files}):
        rows: dict[str, dict[str, list[str]]] = {}
        for name, one in names.items():
            if file in one.by_file:
                module = _module(tree, name)
                rows.setdefault(module, {}).setdefault(one.by_file[file], []).append(name.removeprefix(f"{module}."))
        text.append(f"\n### `{file}`\n\n| of | |\n|---|---|\n")
        for module, by_kind in sorted(rows.items()):
            said = [f"{kind} {_listed(by_kind[kind])}" for kind in ours.KINDS if kind in by_kind]
            text.append(f"| `{module}` | {'; '.join(said)} |\n")
    return "".join(text) + _patches(uses)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _module(tree: Tree, name: str) -> str:
    """The module that a name is asked of."""
    parts = name.split(".")
    while len(parts) > 1 and tree.module(".".join(parts)) is None:
        parts.pop()
    return ".".join(parts)


def _patches(uses: ours.Uses) -> str:
    rows: dict[str, dict[str, set[str]]] = {}
    for file, name, known in uses.guards:
        rows.setdefault(file, {}).setdefault(name, set()).update(known)
    text = [
        "\n## Guards of the patches\n\nA patch is applied only where these functions are as it was written for: the "
        "first 16 digits of the SHA-256 of their source.\n\n| patch | function | source |\n|---|---|---|\n"
    ]
    for file, functions in sorted(rows.items()):
        for name, known in sorted(functions.items()):
            text.append(f"| `{Path(file).stem}` | `{name}` | {_listed(known)} |\n")
    return "".join(text)


def main() -> None:
    """Write the page, or check it."""
    tree, uses = installed(), ours.read()
    text = page(tree, manifest.touched(tree, uses), uses)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        raise SystemExit(f"{PAGE} is not up to date: python -m tools.touch_page")


if __name__ == "__main__":
    main()
