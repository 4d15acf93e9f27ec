# SPDX-License-Identifier: Apache-2.0
"""What can be checked of the documents: links, files of results, and the tables of settings."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from vllm_nanocp.config import NanoCPConfig
from vllm_nanocp.placement.moves import MoveConfig
from vllm_nanocp.placement.prefill_steps import PrefillGap

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = (ROOT / "docs" / "user-guide.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    missing = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_results_that_are_named_exist_and_all_are_named() -> None:
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    there = {path.name for path in RESULTS.glob("*.json")}
    assert there <= set(re.findall(r"[\w]+\.json", performance))
    there |= {path.name for path in (ROOT / "vllm_nanocp").rglob("*.json")}
    for page in PAGES:
        named = set(re.findall(r"`(?:benchmarks/results/)?(\w+\.json)`", page.read_text(encoding="utf-8")))
        assert named <= there, page


def test_what_python_blocks_import_is_there() -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S))
    found = re.findall(r"^from (vllm_nanocp\S*) import (\w+)$", code, re.M)
    assert found
    for package, name in found:
        module = importlib.import_module(package)
        assert hasattr(module, name) or importlib.util.find_spec(f"{package}.{name}") is not None, f"{package}.{name}"


def rows(heading: str) -> dict[str, list[str]]:
    """Cells of the guide's rows below a heading whose first cell is a name, by that name."""
    part = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in part.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in found}


def default(field: object) -> str:
    value = getattr(field, "default")  # noqa: B009
    return "" if value is MISSING else json.dumps(value).strip('"')


def test_every_setting_has_a_row_with_its_default() -> None:
    table = rows("Settings")
    names = {field.name for field in fields(NanoCPConfig)}
    assert names == {name for name in table if not name.startswith(("-", "true", "false", "{"))}
    for field in fields(NanoCPConfig):
        if default(field) not in ("", "null"):
            assert table[field.name][1].strip("`") == default(field)


def test_every_key_of_moves_has_a_row_with_its_default() -> None:
    table = rows("Home moves")
    wanted = {field.name: default(field) for field in fields(MoveConfig) if field.name != "max_degree"}
    assert {name: cells[1].strip("`") for name, cells in table.items()} == wanted


def test_every_key_of_prefill_gap_has_a_row_with_its_default() -> None:
    wanted = {field.name: default(field) for field in fields(PrefillGap)}
    assert {name: cells[1].strip("`") for name, cells in rows("Prompts beside decodes").items()} == wanted
