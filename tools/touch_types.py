# SPDX-License-Identifier: Apache-2.0
"""Which attributes of vLLM's objects this package uses, found with mypy's types: writes ``vllm_touch/instances.json``.

    python -m tools.touch_types

Takes minutes where ``.mypy_cache`` is empty (``make lint`` fills it), else seconds. What mypy cannot tell (objects of
type ``Any``) is in ``vllm_touch/by_hand.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mypy import build, nodes, types
from mypy.main import process_options

from vllm_nanocp.vllm_touch import ours
from vllm_nanocp.vllm_touch.manifest import INSTANCES

# Of mypy's nodes: what leads out of the file.
_ELSEWHERE = {"node", "info", "def_var", "original_def", "analyzed"}


def _within(node: Any, seen: set[int]) -> Iterator[nodes.MemberExpr]:
    """All attributes in a syntax tree of mypy's, whose visitors cannot be subclassed."""
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _within(each, seen)
    elif isinstance(node, nodes.Node) and not isinstance(node, (nodes.TypeInfo, nodes.Var)) and id(node) not in seen:
        seen.add(id(node))
        if isinstance(node, nodes.MemberExpr):
            yield node
        if isinstance(node, nodes.MypyFile):
            yield from _within(node.defs, seen)
            return
        for cls in type(node).__mro__:
            for name in set(getattr(cls, "__mypyc_attrs__", ())) - _ELSEWHERE:
                yield from _within(getattr(node, name, None), seen)


def _classes(of: types.Type | None) -> Iterator[nodes.TypeInfo]:
    """The classes that an expression of this type, or the class that it is, may be of."""
    found = types.get_proper_type(of)
    if isinstance(found, types.UnionType):
        for item in found.items:
            yield from _classes(item)
    elif isinstance(found, types.TypeVarType):
        yield from _classes(found.upper_bound)
    elif isinstance(found, types.TupleType):
        yield found.partial_fallback.type
    elif isinstance(found, types.TypeType):
        yield from _classes(found.item)
    elif isinstance(found, types.FunctionLike) and found.is_type_obj():
        yield found.type_object()
    elif isinstance(found, types.Instance):
        yield found.type


def _owner(cls: nodes.TypeInfo, name: str) -> str | None:
    """The class of vLLM to ask for an attribute: the object's own, or the base of it that defines the attribute."""
    definer = next((base.fullname for base in cls.mro if name in base.names), "")
    if not definer.startswith("vllm."):
        return None
    return cls.fullname if cls.fullname.startswith("vllm.") else definer


def main() -> None:
    """Read the package with mypy and write the file."""
    sources, options = process_options(["vllm_nanocp"])
    options.export_types = options.preserve_asts = True
    for source in sources:
        if source.path and source.module.startswith("vllm_nanocp"):
            source.text = Path(source.path).read_text()  # mypy keeps no types of what it has from its cache
    result = build.build(sources, options, flush_errors=lambda *_: None)
    every = ours.files()
    found: dict[str, dict[str, set[str]]] = {}
    for state in result.graph.values():
        if state.tree is None or not state.id.startswith("vllm_nanocp."):
            continue
        file = state.path.split("vllm_nanocp/", 1)[1] if state.path else ""
        if file not in every:
            continue
        alone = sum(other.rsplit("/", 1)[-1] == file.rsplit("/", 1)[-1] for other in every) == 1
        owners = found.setdefault(file.rsplit("/", 1)[-1] if alone else file, {})
        for member in _within(state.tree, set()):
            for cls in _classes(result.types.get(member.expr)):
                if owner := _owner(cls, member.name):
                    owners.setdefault(owner, set()).add(member.name)
    rows = []
    for file, owners in sorted(found.items()):
        lines = [f'  "{owner}": "{" ".join(sorted(names))}"' for owner, names in sorted(owners.items())]
        if lines:
            rows.append(f"{json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n}")
    INSTANCES.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{INSTANCES}: {sum(len(n.split()) for o in json.loads(INSTANCES.read_text()).values() for n in o.values())}")


if __name__ == "__main__":
    main()
