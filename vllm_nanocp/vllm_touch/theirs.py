# SPDX-License-Identifier: Apache-2.0
"""A vLLM as text: where a name is defined, through re-exports and base classes, and what it looks like."""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_RECORDS = {"dataclass", "config", "Struct", "NamedTuple", "BaseModel"}


@dataclass(frozen=True)
class Found:
    """A definition.

    Attributes:
        kind: what it is; "value" is any attribute, and what cannot be told from the text.
        module: the one that has it.
        node: its syntax tree; a module's for a module.
    """

    kind: Literal["module", "class", "function", "value"]
    module: str
    node: ast.AST


class Tree:
    """The Python source of one vLLM.

    Args:
        source: a wheel, a folder that has ``vllm`` in it, or that folder.

    Raises:
        ValueError: there is no vLLM in it.
    """

    def __init__(self, source: Path) -> None:
        self._wheel = zipfile.ZipFile(source) if source.is_file() else None
        self._root = source.parent if (source / "version.py").is_file() else source
        self._modules: dict[str, ast.Module | None] = {}
        self._texts: dict[str, str] = {}
        self._namespaces: dict[str, dict[str, ast.AST]] = {}
        self._packages: set[str] = set()
        self._finding: set[str] = set()
        # What was found before: these are asked for again and again.
        self._found: dict[str, Found | None] = {}
        self._members: dict[int, dict[str, ast.AST]] = {}
        self._bases: dict[int, list[Found]] = {}
        if self.module("vllm") is None:
            raise ValueError(f"{source} has no vllm/__init__.py")

    @property
    def version(self) -> str:
        """Without what builds add (``+cpu``); "" where the source does not say."""
        self.module("vllm._version")
        text = self._texts.get("vllm._version", "")
        found = re.search(r"^(?:__version__ = )?version = '([^'+]+)", text, re.MULTILINE)
        return found[1] if found else ""

    # -- modules -------------------------------------------------------------------------------------------------

    def module(self, name: str) -> ast.Module | None:
        """The syntax tree of a module or package; None where there is no source of it."""
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self._read(f"{path}/__init__.py")
            if text is not None:
                self._packages.add(name)
            else:
                text = self._read(f"{path}.py")
            self._modules[name] = None if text is None else ast.parse(text, f"{path}.py")
            self._texts[name] = text or ""
        return self._modules[name]

    def _read(self, path: str) -> str | None:
        if self._wheel is None:
            file = self._root / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        try:
            return self._wheel.read(path).decode()
        except KeyError:
            return None

    def _namespace(self, module: str) -> dict[str, ast.AST]:
        """What a module's own statements define, by name: imports too. Of several the first that says most."""
        if module not in self._namespaces:
            names: dict[str, ast.AST] = {}
            tree = self.module(module)
            for node in _statements(tree.body if tree else []):
                for name in _defined(node):
                    if name not in names or isinstance(names[name], (ast.Assign, ast.AnnAssign)):
                        names[name] = node
            self._namespaces[module] = names
        return self._namespaces[module]

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (module in self._packages)]
        return ".".join([*parts, node.module] if node.module else parts)

    # -- names ---------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Found | None:
        """Where a dotted name leads, from ``vllm`` on; None where it does not."""
        if name not in self._found:
            owner, _, last = name.rpartition(".")
            if owner:
                inner = self.find(owner)
                found = inner and self.member(inner, last)
            else:
                tree = self.module(last)
                found = Found("module", last, tree) if tree else None
            if self._finding:  # a circle of imports may have cut it short
                return found
            self._found[name] = found
        return self._found[name]

    def member(self, owner: Found, name: str) -> Found | None:
        """An attribute of a module or class, its bases' too."""
        key = f"{owner.module}:{getattr(owner.node, 'name', '')}:{name}"
        if key in self._finding:
            return None
        self._finding.add(key)
        try:
            if owner.kind == "module":
                return self._of_module(owner.module, name)
            return self._of_class(owner, name) if owner.kind == "class" else None
        finally:
            self._finding.discard(key)

    def _of_module(self, module: str, name: str) -> Found | None:
        node = self._namespace(module).get(name)
        if isinstance(node, ast.ImportFrom):
            return self._imported(module, node, name)
        if isinstance(node, ast.Import):
            target = next(a.name for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            return self.find(target) or Found("value", module, node)
        if node is not None:
            alias = _dotted(node.value) if isinstance(node, ast.Assign) else None
            return (alias and self._local(module, alias)) or _found(module, node)
        return self._lazy(module, name) or self._submodule(module, name) or self._starred(module, name)

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Found | None:
        source = self._absolute(module, node)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if not source.startswith("vllm"):
            return Found("value", module, node)
        return self.find(f"{source}.{original}")

    def _submodule(self, module: str, name: str) -> Found | None:
        tree = self.module(f"{module}.{name}")
        return Found("module", f"{module}.{name}", tree) if tree else None

    def _starred(self, module: str, name: str) -> Found | None:
        tree = self.module(module)
        for node in _statements(tree.body if tree else []):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                found = self.find(f"{self._absolute(module, node)}.{name}")
                if found is not None:
                    return found
        return None

    def _lazy(self, module: str, name: str) -> Found | None:
        """From a table of ``"name": ".module:name"``, as ``vllm/__init__.py`` has one for its ``__getattr__``."""
        for node in self._namespace(module).values():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                        relative = str(value.value)
                        return self.find(f"{module}{relative}".replace(":", ".")) if ":" in relative else None
        return None

    def _local(self, module: str, dotted: str) -> Found | None:
        """A name as it is written in a module."""
        first, *rest = dotted.split(".")
        found = self.member(Found("module", module, ast.Module([], [])), first)
        for part in rest:
            found = found and self.member(found, part)
        return found

    # -- classes -------------------------------------------------------------------------------------------------

    def _of_class(self, owner: Found, name: str) -> Found | None:
        for cls in self.bases(owner):
            assert isinstance(cls.node, ast.ClassDef)
            if id(cls.node) not in self._members:
                self._members[id(cls.node)] = _own_members(cls.node)
            inner = self._members[id(cls.node)].get(name)
            if inner is not None:
                return Found("value", cls.module, inner) if inner is cls.node else _found(cls.module, inner)
        return None

    def definer(self, cls: str, name: str) -> str | None:
        """The class, this one or one of its bases, that defines an attribute; None if none does."""
        owner = self.find(cls)
        for base in self.bases(owner) if owner and owner.kind == "class" else ():
            assert isinstance(base.node, ast.ClassDef)
            if self._of_class(Found("class", base.module, base.node), name) and name in self._members[id(base.node)]:
                return f"{base.module}.{base.node.name}"
        return None

    def bases(self, owner: Found) -> list[Found]:
        """A class, then those of vLLM that it inherits from, each once; nearly in the order that Python asks them."""
        if id(owner.node) not in self._bases:
            self._bases[id(owner.node)] = list(self._all_bases(owner))
        return self._bases[id(owner.node)]

    def _all_bases(self, owner: Found) -> Iterator[Found]:
        seen: set[int] = set()
        waiting = [owner]
        while waiting:
            cls = waiting.pop(0)
            if cls.kind != "class" or id(cls.node) in seen:
                continue
            seen.add(id(cls.node))
            yield cls
            assert isinstance(cls.node, ast.ClassDef)
            names = [_dotted(base.value if isinstance(base, ast.Subscript) else base) for base in cls.node.bases]
            found = [self._local(cls.module, name) for name in names if name]
            waiting = [base for base in found if base is not None] + waiting

    def abstract(self, owner: Found) -> set[str]:
        """Methods that a class says others must define."""
        seen: set[str] = set()
        abstract: set[str] = set()
        for cls in self.bases(owner):
            assert isinstance(cls.node, ast.ClassDef)
            for node in _statements(cls.node.body):
                names = set(_defined(node)) - seen
                if isinstance(node, _FUNCTIONS) and "abstractmethod" in _decorators(node):
                    abstract |= names
                seen |= names
        return abstract

    # -- what a name looks like ----------------------------------------------------------------------------------

    def signature(self, found: Found) -> str:
        """Parameters of a function, or of a class when it is called: names, ``=`` where there is a default."""
        if isinstance(found.node, _FUNCTIONS):
            return _signature(found.node)
        init = self._of_class(found, "__init__")
        if init is not None and isinstance(init.node, _FUNCTIONS):
            return _signature(init.node)
        fields: dict[str, str] = {}
        for cls in reversed(self.bases(found)):
            assert isinstance(cls.node, ast.ClassDef)
            bases = {(_dotted(base) or "").split(".")[-1] for base in cls.node.bases}
            if not _RECORDS & (bases | _decorators(cls.node)):
                continue
            for node in cls.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    fields[node.target.id] = "=" if node.value else ""
        return f"({', '.join(name + default for name, default in fields.items())})"

    def digest(self, found: Found) -> str:
        """Of a function's source without comments, blank lines and docstring."""
        return hashlib.sha256(self._normal(found).encode()).hexdigest()[:12]

    def _normal(self, found: Found) -> str:
        node = found.node
        assert isinstance(node, _FUNCTIONS)
        left_out: set[int] = set()
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            left_out = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        kept = [
            re.sub(r"\s+#.*$", "", line.rstrip())
            for number, line in self._lines(found)
            if number not in left_out and line.strip() and not line.strip().startswith("#")
        ]
        return textwrap.dedent("\n".join(kept))

    def source(self, found: Found) -> str:
        """A function as ``inspect.getsource`` gives it."""
        return textwrap.dedent("".join(f"{line}\n" for _, line in self._lines(found)))

    def _lines(self, found: Found) -> list[tuple[int, str]]:
        node = found.node
        assert isinstance(node, (*_FUNCTIONS, ast.ClassDef))
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = self._texts[found.module].split("\n")[first - 1 : node.end_lineno]
        return list(enumerate(lines, first))


def _found(module: str, node: ast.AST) -> Found:
    if isinstance(node, ast.ClassDef):
        return Found("class", module, node)
    return Found("function" if isinstance(node, _FUNCTIONS) else "value", module, node)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, inside of ``if``, ``try`` and ``with`` too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(node, part, []):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def _own_members(cls: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class defines; the class itself stands for what its methods set of ``self``."""
    own: dict[str, ast.AST] = {
        node.attr: cls
        for method in cls.body
        if isinstance(method, _FUNCTIONS) and method.args.args
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == method.args.args[0].arg
    }
    for node in ast.walk(cls):  # setattr(self, "name", ...), replace_parameter(self, "name", ...)
        if isinstance(node, ast.Call) and len(node.args) > 2 and _dotted(node.args[0]) == "self":
            name = node.args[1]
            if isinstance(name, ast.Constant):
                own[str(name.value)] = cls
    for node in _statements(cls.body):
        own.update(dict.fromkeys(_defined(node), node))
    return own


def _decorators(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    names = [_dotted(each.func if isinstance(each, ast.Call) else each) for each in node.decorator_list]
    return {name.split(".")[-1] for name in names if name}


def _dotted(node: ast.AST | None) -> str | None:
    """``a.b.c`` as text; None for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return None if inner is None else f"{inner}.{node.attr}"
    return None


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    texts = [arg.arg for arg in plain]
    for index in range(len(plain) - len(args.defaults), len(plain)):
        texts[index] += "="
    if args.vararg:
        texts.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        texts.append("*")
    texts += [a.arg + ("=" if default else "") for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        texts.append(f"**{args.kwarg.arg}")
    marks = sorted(_decorators(node) & {"property", "cached_property", "classmethod", "staticmethod"})
    marks += ["async"] if isinstance(node, ast.AsyncFunctionDef) else []
    return " ".join([*marks, f"({', '.join(texts)})"])
