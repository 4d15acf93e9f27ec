# SPDX-License-Identifier: Apache-2.0
"""The package as it is built for others: what the tree has is in the wheel, and vLLM finds the plugin in it."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vllm_nanocp

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a folder `build` left in the tree would bring along modules that are gone."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("vllm_nanocp", "patches"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_all_modules_are_in_it(wheel: Path) -> None:
    """Also the patches, which are in the package through a symbolic link."""
    package = ROOT / "vllm_nanocp"
    wanted = {
        f"vllm_nanocp/{path.relative_to(package)}" for kind in ("py", "json") for path in package.rglob(f"*.{kind}")
    }
    wanted |= {f"vllm_nanocp/{path.relative_to(ROOT)}" for path in (ROOT / "patches").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == wanted


def test_its_version_is_that_of_the_package_and_of_the_change_log(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert metadata["Version"] == vllm_nanocp.__version__ == newest
    needed = {"gpu": ["flashinfer-python"], "ray": ["ray"], "sim": ["numpy"], "plot": ["numpy", "matplotlib"]}
    assert metadata.get_all("Requires-Dist", []) == [
        f'{name}; extra == "{extra}"' for extra, names in needed.items() for name in names
    ]


def test_entry_points_load_from_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(archive.read(name).decode())
    assert set(points) == {"DEFAULT", "vllm.general_plugins", "vllm.platform_plugins"}
    values = [value for section in points.values() for value in section.values()]
    # A wheel is an archive that Python imports from; vLLM is not needed to load what it will call.
    code = (
        "import sys, importlib.metadata as m\n"
        "points = [m.EntryPoint('', v, '') for v in sys.argv[2:]]\n"
        "assert all(callable(p.load()) for p in points)\n"
        "import vllm_nanocp.patches as p\n"
        "assert p.__file__.startswith(sys.argv[1]), p.__file__\n"
        "import importlib\n"
        "for one in (*p.PATCHES, *p.CONFIG_PATCHES, *p.RAY_PATCHES):\n"
        "    assert callable(importlib.import_module(f'vllm_nanocp.patches.{one.name}').apply)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    subprocess.run([sys.executable, "-c", code, str(wheel), *values], cwd=wheel.parent, env=env, check=True, timeout=60)
