# SPDX-License-Identifier: Apache-2.0
"""What is touched in vLLM is known, and the installed vLLM has it as it was read."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tools import touch_page
from vllm_nanocp.compat import SUPPORTED
from vllm_nanocp.vllm_touch import manifest, ours
from vllm_nanocp.vllm_touch.__main__ import main
from vllm_nanocp.vllm_touch.manifest import Touched
from vllm_nanocp.vllm_touch.theirs import Tree


@pytest.fixture(scope="module")
def uses() -> ours.Uses:
    return ours.read()


@pytest.fixture(scope="module")
def installed() -> Tree:
    return touch_page.installed()


@pytest.fixture(scope="module")
def names(installed: Tree, uses: ours.Uses) -> dict[str, Touched]:
    return manifest.touched(installed, uses)


def test_the_installed_vllm_is_as_it_was_read(
    installed: Tree, uses: ours.Uses, names: dict[str, Touched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name is touched that is not in the record, and all look as recorded of this version."""
    monkeypatch.setattr(ours, "read", lambda: uses)
    monkeypatch.setattr(manifest, "touched", lambda *_: names)
    assert [str(line) for line in manifest.breaks(installed)] == []


def test_all_supported_versions_are_recorded(installed: Tree, names: dict[str, Touched]) -> None:
    record = manifest.load()
    assert tuple(manifest.versions(record)) == SUPPORTED
    assert [name for name in names if not set(SUPPORTED) <= set(record[name])] == []
    of_this = {name for name, seen in record.items() if seen.get(installed.version) is not None}
    assert sorted(of_this - set(names)) == [], "recorded, but nothing touches them any more"


def test_declared_names_are_used(uses: ours.Uses) -> None:
    unused = [
        (file, owner, name)
        for file, owner, name in manifest.declared()
        if name not in uses.attributes[manifest.file_of(file, uses.attributes)]
    ]
    assert unused == []


def test_every_patch_that_replaces_has_a_guard(uses: ours.Uses) -> None:
    guarded = {file for file, _, known in uses.guards if known}
    replacing = {
        file for kinds in uses.names.values() for file in kinds.get("replaces", ()) if file.startswith("patches/")
    }
    assert replacing - guarded == {"patches/cpu_gatherv.py"}  # adds what is missing; compares parameters


def test_the_page_is_up_to_date(installed: Tree, uses: ours.Uses, names: dict[str, Touched]) -> None:
    if installed.version != SUPPORTED[0]:
        pytest.skip("it is of the oldest version")
    assert touch_page.PAGE.read_text() == touch_page.page(installed, names, uses), "python -m tools.touch_page"


# -- of a small vLLM ------------------------------------------------------------------------------------------------

OLD = {
    "__init__": '_LAZY = {"Late": ".late:Late"}\nfrom .base import *\n',
    "_version": "__version__ = version = '1.0.0'\n",
    "late": "class Late:\n    def __init__(self, size: int = 3) -> None:\n        self.size = size\n",
    "base": """
from abc import ABC, abstractmethod

class Base(ABC):
    '''Says little.'''
    field: int = 0

    @abstractmethod
    def wanted(self, a): ...

    def method(self, a, b=1):
        '''A comment.'''
        # another
        self.made = a
        return b
""",
    "heir": "from .base import Base as B\n\nclass Heir(B):\n    def wanted(self, a):\n        return a\n",
    "tools": "if True:\n    from .heir import Heir\n\ndef helper(x, *, y=2): ...\n",
}
PLUGIN = """
import sys
from vllm import Late
from vllm.base import Base
from vllm.tools import Heir, helper

def use(heir, late: Late) -> None:
    from vllm import tools as helper_module
    helper(1, y=3)
    Late(size=4)
    method = Heir.method
    Heir.method = lambda self, a, b=1: method(self, a, b)
    helper_module.gone = 1
    entry = sys.modules.get("vllm.tools")
    entry.helper(2)

class Mine(Base):
    def wanted(self, a):
        return a
"""


def write(folder: Path, modules: dict[str, str]) -> Tree:
    (folder / "vllm").mkdir(parents=True)
    for name, text in modules.items():
        (folder / "vllm" / f"{name}.py").write_text(text)
    return Tree(folder)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one file, and the record of the small vLLM that it uses."""
    package = tmp_path / "vllm_nanocp"
    package.mkdir()
    (package / "plugin.py").write_text(PLUGIN)
    monkeypatch.setattr(ours, "PACKAGE", package)
    monkeypatch.setattr(manifest, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(manifest, "INSTANCES", tmp_path / "instances.json")
    instances = {"plugin.py": {"vllm.heir.Heir": "method", "vllm.late.Late": "size"}}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    monkeypatch.setattr(manifest, "BY_HAND", {})
    manifest.save(manifest.note(write(tmp_path / "old", OLD), {}))
    return tmp_path


def test_names_are_found_where_they_are_defined(small: Path) -> None:
    seen = {name: versions["1.0.0"] for name, versions in manifest.load().items()}
    assert seen["vllm.Late"] == "(self, size=)" and seen["vllm.late.Late.size"] == ""
    assert seen["vllm.tools.helper"] == "(x, *, y=)"
    assert (seen["vllm.tools.Heir.method"] or "").startswith("(self, a, b=) #"), "it replaces what Base defines"
    assert seen["vllm.base.Base"] == "() abstract: wanted"
    assert (seen["vllm.base.Base.wanted"] or "").startswith("(self, a) #")
    assert seen["vllm.tools.gone"] is None
    tree = Tree(small / "old")
    assert tree.find("vllm.Heir") is None and tree.find("vllm.Base.made") is not None
    assert manifest.breaks(tree) == []


@pytest.mark.parametrize(
    ("module", "old", "new", "found"),
    [
        ("base", "return b\n", "return b + 1\n", ["vllm.heir.Heir.method", "vllm.tools.Heir.method"]),
        ("base", "# another", "# yet another", []),
        ("base", "'''A comment.'''", "'''Says more.'''", []),
        ("base", "b=1", "b=1, c=2", ["vllm.heir.Heir.method", "vllm.tools.Heir.method"]),
        ("base", "    def method", "    @abstractmethod\n    def more(self): ...\n\n    def method",
         ["vllm.base.Base", "vllm_nanocp.plugin.Mine"]),
        ("tools", "helper", "helper_2", ["vllm.tools.helper"]),
        ("base", "    @abstractmethod\n    def wanted(self, a): ...\n", "",
         ["vllm.base.Base", "vllm.base.Base.wanted"]),
        ("late", "size", "length", ["vllm.Late", "vllm.late.Late.size"]),
        ("tools", "from .heir", "from .base", ["vllm.tools.Heir"]),
    ],
)  # fmt: skip
def test_breaks(small: Path, module: str, old: str, new: str, found: list[str]) -> None:
    changed = {**OLD, module: OLD[module].replace(old, new), "_version": OLD["_version"].replace("1.0", "1.1")}
    tree = write(small / "new", changed)
    names = {line.name for line in manifest.breaks(tree)}
    assert names == set(found) or (new == "from .base" and names == {"vllm.tools.Heir", "vllm.tools.Heir.method"})


def test_a_name_that_is_new_here(small: Path) -> None:
    plugin = small / "vllm_nanocp" / "plugin.py"
    plugin.write_text(plugin.read_text() + "from vllm.heir import Heir as Other\n")
    assert [(line.name, line.what) for line in manifest.breaks(Tree(small / "old"))] == [
        ("vllm.heir.Heir", "is not in the record")
    ]


def test_a_version_of_which_a_name_was_not_recorded(small: Path) -> None:
    record = manifest.load()
    manifest.save(record | {"vllm.Late": {"0.9.0": "(self, size=)"}})
    (line,) = manifest.breaks(Tree(small / "old"))
    assert (line.name, line.what) == ("vllm.Late", "is not in the record of 1.0.0")
    manifest.save({})
    with pytest.raises(ValueError, match="nothing was recorded"):
        manifest.breaks(Tree(small / "old"))


def test_what_is_recorded_was_shown(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recording a version that lacks a name says so once; a tree without a version is not recorded."""
    changed = {**OLD, "late": "", "_version": OLD["_version"].replace("1.0", "1.1")}
    write(small / "new", changed)
    command = [str(small / "new"), "--record"]
    assert main(command) == 1 and "vllm.late.Late.size" in capsys.readouterr().out
    assert main(command) == 0 and manifest.load()["vllm.Late"] == {"1.0.0": "(self, size=)", "1.1.0": None}
    before = manifest.RECORD.read_text()
    write(small / "none", {**OLD, "_version": ""})
    assert main([str(small / "none"), "--record"]) == 2 and manifest.RECORD.read_text() == before
    assert "does not say its version" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.whl").write_text("no wheel")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "broken", {**OLD, "_version": "def ("})
    for given, says in (
        (["text.whl"], "is no wheel"),
        (["empty"], "has no vllm/__init__.py"),
        (["none.whl"], "is no file, no folder and no version"),
        ([""], "'' is no file, no folder and no version"),
        (["broken"], "invalid syntax (_version.py, line 1)"),
        (["--since", "0.1"], "nothing was recorded of vLLM 0.1"),
    ):
        given = [str(tmp_path / given[0]) if given[0] and not given[0].startswith("-") else given[0], *given[1:]]
        assert main(given) == 2, given
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("vllm_nanocp.vllm_touch: ") and says in line and not said.out


def test_the_guard_of_a_patch(small: Path) -> None:
    """The digest is the one that the patch itself would find."""
    patch = small / "vllm_nanocp" / "guarded.py"
    text = "from vllm.base import Base\n_KNOWN = {'%s'}\ndef apply():\n    Guarded(Base, 'method', _KNOWN)\n"
    patch.write_text(text % ("0" * 16))
    tree = Tree(small / "old")
    (line,) = [line for line in manifest.breaks(tree) if "guard of a patch" in line.kinds]
    digest = line.what.split()[-1].rstrip(")")
    patch.write_text(text % digest)
    assert not [line for line in manifest.breaks(tree) if "guard of a patch" in line.kinds]


def test_the_command(tmp_path: Path) -> None:
    """Of a wheel, which is not unpacked; it says what is missing, and ends with 1."""
    wheel = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in OLD.items():
            archive.writestr(f"vllm/{name}.py", text.replace("1.0.0", "9.9.9"))
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nanocp.vllm_touch", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("vllm.v1.core.sched.scheduler.Scheduler ")]
    assert line.endswith("missing")
    assert "vLLM 9.9.9" in done.stderr and "Traceback" not in done.stderr
