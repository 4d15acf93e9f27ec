# SPDX-License-Identifier: Apache-2.0
"""All names of vLLM that are touched, what they look like in a vLLM, and how that differs from the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import ours
from .by_hand import BY_HAND
from .theirs import Tree

_HERE = Path(__file__).parent
# name -> version -> what it looks like there; None: it is not there, which ``compat`` or its users allow for.
RECORD = _HERE / "record.json"
# file -> class -> its attributes; written by ``tools/touch_types.py``.
INSTANCES = _HERE / "instances.json"
Record = dict[str, dict[str, str | None]]


@dataclass(frozen=True)
class Touched:
    """A name.

    Attributes:
        kinds: of ``ours.KINDS``, in that order.
        by_file: of this package, sorted, with the first of the kinds that a file does.
    """

    kinds: tuple[str, ...]
    by_file: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.by_file)


@dataclass(frozen=True)
class Break:
    """One line of the list of breaks."""

    name: str
    kinds: tuple[str, ...]
    files: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.name}  [{', '.join(self.kinds)}: {', '.join(self.files)}]  {self.what}"


def file_of(suffix: str, files: Iterable[str]) -> str:
    """The one file whose path ends so.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [file for file in files if file == suffix or file.endswith(f"/{suffix}")]
    exact = [file for file in found if file == suffix]
    if len(exact or found) != 1:
        raise ValueError(f"{suffix}: {len(found)} files of this package end so, expected one")
    return (exact or found)[0]


def declared() -> list[tuple[str, str, str]]:
    """(file's end, class or module of vLLM, attribute) of those that no import tells of."""
    instances = json.loads(INSTANCES.read_text())
    return [
        (file, owner, name)
        for table in (instances, BY_HAND)
        for file, owners in table.items()
        for owner, names in owners.items()
        for name in names.split()
    ]


def touched(tree: Tree, uses: ours.Uses | None = None) -> dict[str, Touched]:
    """All names that are touched, as far as this vLLM's own text says what belongs to what."""
    uses = uses or ours.read()
    names: dict[str, dict[str, set[str]]] = {}

    def add(name: str, kind: str, file: str) -> None:
        names.setdefault(name, {}).setdefault(kind, set()).add(file)

    for name, kinds in uses.names.items():
        for kind, files in kinds.items():
            for file in files:
                found, whole = _cut(tree, name)
                is_value = (there := tree.find(found)) is not None and there.kind == "value"
                add(found, "reads" if not whole else "sets" if kind == "replaces" and is_value else kind, file)
    for suffix, owner, name in declared():
        file = file_of(suffix, uses.attributes)
        for kind in uses.attributes[file].get(name, ()):
            replaces = kind == "sets" and _is_method(tree, f"{owner}.{name}")
            add(f"{owner}.{name}", "replaces" if replaces else kind, file)
    for name, cls in uses.classes.items():
        for base in _bases(name, uses):
            for method in cls.methods:
                definer = tree.definer(base, method) if base.startswith("vllm.") else None
                if definer is not None and _is_function(tree, f"{definer}.{method}"):
                    add(f"{definer}.{method}", "overrides", cls.file)
    for file, name, _ in uses.guards:
        add(name, "reads", file)
    return {name: _as_touched(kinds) for name, kinds in sorted(names.items())}


def _is_function(tree: Tree, name: str) -> bool:
    found = tree.find(name)
    return found is not None and found.kind == "function"


def _is_method(tree: Tree, name: str) -> bool:
    found = tree.find(name)
    return found is not None and found.kind == "function" and not tree.signature(found).startswith("property")


def _cut(tree: Tree, name: str) -> tuple[str, bool]:
    """A name without what belongs to an object, not to a module or class, at its end; whether nothing was cut."""
    parts = name.split(".")
    for end in range(2, len(parts)):
        found = tree.find(".".join(parts[:end]))
        if found is not None and found.kind in ("function", "value"):
            return ".".join(parts[:end]), False
    return name, True


def _bases(name: str, uses: ours.Uses) -> list[str]:
    """All bases of one of this package's classes, of the class's heirs too: what a mixin overrides is theirs."""
    heirs = [name, *(other for other, cls in uses.classes.items() if name in _ancestors(other, uses))]
    found = {base for heir in heirs for base in _ancestors(heir, uses)}
    return sorted(found)


def _ancestors(name: str, uses: ours.Uses) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        cls = uses.classes.get(waiting.pop())
        for base in cls.bases if cls else ():
            if base not in found:
                found.add(base)
                waiting.append(base)
    return found


def _as_touched(kinds: Mapping[str, set[str]]) -> Touched:
    some = [kind for kind in ours.KINDS if kind in kinds]
    first = {file: kind for kind in reversed(some) for file in kinds[kind]}
    said = some if some == ["reads"] else [kind for kind in some if kind != "reads"]
    return Touched(tuple(said), dict(sorted(first.items())))


def look(tree: Tree, name: str, kinds: tuple[str, ...]) -> str | None:
    """What a name looks like in a vLLM, as the record keeps it; None if it is not there."""
    found = tree.find(name)
    if found is None:
        return None
    if found.kind == "function":
        source = f" #{tree.digest(found)}" if {"replaces", "overrides"} & set(kinds) else ""
        return tree.signature(found) + source
    if found.kind == "class":
        abstract = sorted(tree.abstract(found)) if "subclasses" in kinds else []
        called = tree.signature(found) if {"calls", "subclasses"} & set(kinds) else ""
        return " ".join(filter(None, [called, f"abstract: {', '.join(abstract)}" if abstract else ""]))
    return ""


def load() -> Record:
    """The record; empty if there is none."""
    return dict(json.loads(RECORD.read_text())) if RECORD.is_file() else {}


def versions(record: Record) -> list[str]:
    """Those that were read, oldest first."""
    found = {version for seen in record.values() for version in seen}
    return sorted(found, key=lambda version: [int(part) for part in version.split(".") if part.isdigit()])


def note(tree: Tree, record: Record) -> Record:
    """The record with what the names look like in a vLLM that has been read; names that nothing touches are dropped."""
    names = touched(tree)
    others = {name: seen for name, seen in record.items() if name in names or set(seen) - {tree.version}}
    kept: Record = {}
    for name in sorted({*names, *others}):
        seen = {version: text for version, text in others.get(name, {}).items() if version != tree.version}
        kinds = names[name].kinds if name in names else ()
        kept[name] = dict(sorted({**seen, tree.version: look(tree, name, kinds)}.items()))
    return kept


def save(record: Record) -> None:
    """One line a name."""
    lines = [f"{json.dumps(name)}: {json.dumps(seen)}" for name, seen in sorted(record.items())]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def breaks(tree: Tree, since: str | None = None) -> list[Break]:
    """What is not as the record has it.

    Args:
        tree: the vLLM to look at.
        since: the version to compare with; by default its own if that was recorded, else the newest.

    Raises:
        ValueError: there is no such version in the record.
    """
    record = load()
    known = versions(record)
    if not known:
        raise ValueError("nothing was recorded of any vLLM")
    if since is None:
        since = tree.version if tree.version in known else known[-1]
    if since not in known:
        raise ValueError(f"nothing was recorded of vLLM {since}, only of {', '.join(known)}")
    uses = ours.read()
    found: list[Break] = []
    names = touched(tree, uses)
    for name, one in names.items():
        now = look(tree, name, one.kinds)
        if name not in record:
            found.append(Break(name, one.kinds, one.files, "is not in the record"))
        elif since not in record[name]:
            found.append(Break(name, one.kinds, one.files, f"is not in the record of {since}"))
        elif (before := record[name][since]) != now:
            found.append(Break(name, one.kinds, one.files, _difference(before, now)))
    gone = [name for name in record if name not in names and record[name].get(since) is not None]
    return [*found, *_not_overridden(tree, uses, gone), *_undefined(tree, uses), *_guards(tree, uses)]


def _not_overridden(tree: Tree, uses: ours.Uses, gone: Iterable[str]) -> list[Break]:
    """Methods that no base has any more: what is defined here in their place is never called."""
    found = []
    for name in gone:
        files = sorted({cls.file for cls in uses.classes.values() if name.rpartition(".")[2] in cls.methods})
        if files and tree.find(name) is None:
            found.append(Break(name, ("overrides",), tuple(files), "missing"))
    return found


def _difference(before: str | None, now: str | None) -> str:
    if now is None:
        return "missing"
    if before is None:
        return f"new: {now}"
    (old, _, _), (new, _, _) = before.partition(" #"), now.partition(" #")
    if old == new:
        return "source changed"
    gone, come = [" ".join(p for p in _parts(a) if p not in _parts(b)) for a, b in ((old, new), (new, old))]
    change = ", ".join(filter(None, [gone and f"no longer {gone}", come and f"now also {come}"]))
    return f"signature: {change}" if change else f"signature: {old} -> {new}"


def _parts(looks: str) -> list[str]:
    return looks.replace(",", " ").replace("(", " ").replace(")", " ").split()


def _undefined(tree: Tree, uses: ours.Uses) -> list[Break]:
    """Methods that vLLM's classes want defined, and that a class here which can be made does not define."""
    found = []
    inherited = {base for cls in uses.classes.values() for base in cls.bases}
    for name, cls in uses.classes.items():
        if name in inherited:
            continue
        line = {name, *_ancestors(name, uses)}
        here = {method for each in line if each in uses.classes for method in uses.classes[each].methods}
        bases = [base for each in line if each.startswith("vllm.") and (base := tree.find(each)) is not None]
        bases = [base for base in bases if base.kind == "class"]
        wanted = {method for base in bases for method in tree.abstract(base)}
        # One of several bases may define what another wants.
        for method in sorted(wanted - here):
            if all(method in tree.abstract(base) for base in bases if tree.member(base, method)):
                found.append(Break(name, ("subclasses",), (cls.file,), f"does not define {method}, which is abstract"))
    return found


def _guards(tree: Tree, uses: ours.Uses) -> list[Break]:
    """Functions that a patch has not read as they are."""
    found = []
    for file, name, known in uses.guards:
        function = tree.find(name)
        if function is None or function.kind != "function":
            found.append(Break(name, ("guard of a patch",), (file,), "missing"))
            continue
        digest = hashlib.sha256(tree.source(function).encode()).hexdigest()[:16]
        if digest not in known:
            found.append(Break(name, ("guard of a patch",), (file,), f"source changed (digest {digest})"))
    return found
