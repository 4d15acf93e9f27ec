# SPDX-License-Identifier: Apache-2.0
"""What this package's own source does with names of vLLM, as far as imports lead to them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# From what changes most with vLLM to what changes least.
KINDS = ("replaces", "overrides", "subclasses", "sets", "calls", "reads")
# An attribute of these is one of what they stand for.
_SAME = ("__func__", "__wrapped__")


@dataclass
class Class:
    """One of this package's.

    Attributes:
        bases: dotted names, of vLLM or of this package.
        methods: that it defines.
    """

    file: str
    bases: list[str]
    methods: set[str]


@dataclass
class Uses:
    """Of all files.

    Attributes:
        names: dotted name of vLLM -> kind of use -> files, relative to the package.
        classes: this package's, by dotted name.
        attributes: file -> attribute -> kinds of use, whatever the object.
        guards: of patches: (file, dotted name of a function of vLLM, digests of its source that are known).
    """

    names: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    attributes: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    guards: list[tuple[str, str, frozenset[str]]] = field(default_factory=list)

    def add(self, name: str, kind: str, file: str) -> None:
        self.names.setdefault(name, {}).setdefault(kind, set()).add(file)


def files() -> list[str]:
    """This package's modules, but for these that are about vLLM's names."""
    own = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    found = {path.as_posix() for path in own if path.parts[0] != "vllm_touch"}
    patches = {f"patches/{path.name}" for path in (PACKAGE / "patches").glob("*.py")}  # a link, which rglob passes by
    return sorted(found | patches)


def read() -> Uses:
    """Read all of this package's source."""
    uses = Uses()
    for file in files():
        _File(file, uses).visit_all()
    return uses


class _File:
    """One module: scopes of names, from the innermost out, and what is done with them."""

    def __init__(self, file: str, uses: Uses) -> None:
        self.file, self.uses = file, uses
        parts = ["vllm_nanocp", *file.removesuffix(".py").split("/")]
        self.package = parts[:-1]
        self.module = ".".join(self.package if parts[-1] == "__init__" else parts)
        self.scopes: list[dict[str, str]] = []
        self.constants: dict[str, frozenset[str]] = {}

    def visit_all(self) -> None:
        tree = ast.parse((PACKAGE / self.file).read_text())
        attributes = self.uses.attributes.setdefault(self.file, {})
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                attributes.setdefault(node.attr, set()).add(_kind(node, called))
            elif isinstance(node, ast.keyword) and node.arg:
                attributes.setdefault(node.arg, set()).add("reads")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                attributes.setdefault(node.value, set()).add("reads")
        for node in tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Set):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                known = frozenset(str(each.value) for each in node.value.elts if isinstance(each, ast.Constant))
                self.constants[ast.unparse(target)] = known
        self._block(tree.body, called, set())

    # -- names ---------------------------------------------------------------------------------------------------

    def resolve(self, node: ast.AST | None) -> str | None:
        """The dotted name that an expression stands for, if it is one that an import leads to."""
        if isinstance(node, ast.Name):
            for scope in reversed(self.scopes):
                if node.id in scope:
                    return scope[node.id] or None
            return None
        if isinstance(node, ast.Attribute):
            inner = self.resolve(node.value)
            return inner if inner is None or node.attr in _SAME else f"{inner}.{node.attr}"
        if isinstance(node, ast.Call) and node.args:
            function, first = ast.unparse(node.func), node.args[0]
            if function == "inspect.unwrap":
                return self.resolve(first)
            if function in ("sys.modules.get", "importlib.import_module") and isinstance(first, ast.Constant):
                return first.value if isinstance(first.value, str) else None
            if function == "getattr" and isinstance(node.args[1], ast.Constant) and (owner := self.resolve(first)):
                return f"{owner}.{node.args[1].value!s}"
        return None

    def _bind(self, node: ast.stmt, scope: dict[str, str]) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                scope[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            source = ([*self.package[: len(self.package) - node.level + 1]] if node.level else []) + (
                [node.module] if node.module else []
            )
            for alias in node.names:
                scope[alias.asname or alias.name] = ".".join([*source, alias.name])
        elif isinstance(node, ast.ClassDef):
            scope.setdefault(node.name, f"{self.module}.{node.name}")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target, value = node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value
            pairs: list[tuple[ast.expr, ast.expr]] = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for left, right in pairs:
                name = self.resolve(right)
                if isinstance(left, ast.Name) and left.id not in scope and name:
                    scope[left.id] = name

    # -- uses ----------------------------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], called: set[int], hidden: set[str]) -> None:
        """The statements of a module, class or function; ``hidden``: its parameters."""
        scope = dict.fromkeys(hidden, "")
        self.scopes.append(scope)
        for node in _own(body):
            if isinstance(node, ast.stmt):
                self._bind(node, scope)
        for statement in body:
            self._use(statement, called)
        self.scopes.pop()

    def _use(self, node: ast.AST, called: set[int]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            outer: list[ast.AST] = [*args.defaults, *(d for d in args.kw_defaults if d)]
            outer += [arg.annotation for arg in every if arg and arg.annotation]
            if not isinstance(node, ast.Lambda):
                outer += [*node.decorator_list, *([node.returns] if node.returns else [])]
            for each in outer:
                self._use(each, called)
            body: list[ast.stmt] = [ast.Expr(node.body)] if isinstance(node, ast.Lambda) else node.body
            self._block(body, called, {arg.arg for arg in every if arg})
            return
        if isinstance(node, ast.ClassDef):
            self._class(node)
            for each in (*node.bases, *node.decorator_list):
                self._use(each, called)
            for statement in node.body:  # what a class's body defines is not seen by its methods
                self._use(statement, called)
            return
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module and not node.level and node.module.split(".")[0] == "vllm":
                    self.uses.add(f"{node.module}.{alias.name}", "reads", self.file)
        elif isinstance(node, ast.Call):
            self._call(node)
        name = self.resolve(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if name is not None and name.split(".")[0] == "vllm" and not (name == "vllm" and isinstance(node, ast.Name)):
            stored = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
            kind = "replaces" if stored else "calls" if id(node) in called else "reads"
            name = name.removesuffix(".__new__")
            if not isinstance(getattr(node, "ctx", None), ast.Store) or stored:
                self.uses.add(name, kind, self.file)
            return
        for each in ast.iter_child_nodes(node):
            self._use(each, called)

    def _call(self, node: ast.Call) -> None:
        """``setattr`` and its like with a name of vLLM's, and the guards of patches."""
        function = ast.unparse(node.func)
        if len(node.args) < 2:
            return
        first, second = self.resolve(node.args[0]), node.args[1]
        if isinstance(second, ast.Constant) and isinstance(second.value, str) and (first or "").startswith("vllm."):
            only_read = function in ("getattr", "hasattr") or (function == "Guarded" and len(node.args) < 4)
            self.uses.add(f"{first}.{second.value}", "reads" if only_read else "replaces", self.file)
            if function == "Guarded" and (known := ast.unparse(node.args[2])) != "None":
                digests = self.constants.get(known, frozenset())
                self.uses.guards.append((self.file, f"{first}.{second.value}", digests))

    def _class(self, node: ast.ClassDef) -> None:
        bases = [name for base in node.bases if (name := self.resolve(base))]
        methods = {each.name for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
        self.uses.classes[f"{self.module}.{node.name}"] = Class(self.file, bases, methods)
        for base in bases:
            if base.startswith("vllm."):
                self.uses.add(base, "subclasses", self.file)


def _kind(node: ast.Attribute, called: set[int]) -> str:
    if not isinstance(node.ctx, ast.Load):
        return "sets"
    return "calls" if id(node) in called else "reads"


def _own(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes of a block, but not inside of its functions and classes."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting = list(ast.iter_child_nodes(node)) + waiting
