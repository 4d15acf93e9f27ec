# SPDX-License-Identifier: Apache-2.0
"""docs/structure.md names every room once, and imports run one way."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_nanocp"
ROOMS = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" and path.relative_to(PACKAGE).parts[0] not in ("patches", "vllm_touch")
}
# Folders, and files at the root, with the floor that each is on. Imports run downwards only.
FLOORS = [
    ("plugin.py",),
    ("entry",),
    ("executor", "status.py"),
    ("worker", "sched"),
    ("attention", "metrics", "rank_hint.py", "graph_capacities.py"),
    ("exchange", "config.py", "step_messages.py", "sim"),
    ("placement", "plan.py", "errors.py", "environment.py", "compat.py", "kv_event_sources.py"),
    ("wrapping.py",),
]


def test_every_room_has_one_line() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "docs" / "structure.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(ROOMS)


def _imports(room: str) -> set[str]:
    """Rooms that one imports, for types or within functions, too."""
    here = room.split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else ())]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_nanocp"):
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for path in (base, *([*base, alias.name] for alias in node.names)):
            if (name := "/".join(path) + ".py") in ROOMS:
                found.add(name)
    return found


def test_no_circle() -> None:
    TopologicalSorter({room: _imports(room) for room in ROOMS}).prepare()


def test_imports_run_downwards() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    for room in ROOMS:
        mine = floor[room.split("/")[0]]
        for other in _imports(room):
            theirs = floor[other.split("/")[0]]
            same = room.split("/")[0] == other.split("/")[0]
            assert theirs > mine or same, f"{room} imports {other}"


def _has(package: str, name: str) -> bool:
    """Whether a module of this package, or a folder of it, has this name."""
    path = ROOT / package.replace(".", "/")
    if (path / f"{name}.py").exists() or (path / name).is_dir():
        return True
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (
        file.exists()
        and re.search(rf"^(?:def |class |from .*\b|    )?{name}\b", file.read_text(), re.MULTILINE) is not None
    )


def test_what_programs_in_texts_import_is_there() -> None:
    """Tests and benchmarks start programs that they have as text, many only where a variable is set: no checker of
    types sees what these import."""
    found = 0
    for path in (path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for package, names in re.findall(r"from (vllm_nanocp[\w.]*) import ([^\n;()]+)", node.value):
                    for name in (part.split(" as ")[0].strip() for part in names.split(",")):
                        assert _has(package, name), f"{path.relative_to(ROOT)}: {package} has no {name}"
                        found += 1
    assert found > 5
