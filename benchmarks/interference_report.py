# SPDX-License-Identifier: Apache-2.0
"""From the files that ``decode_interference.py`` leaves to its table of ratios."""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from serving import write_json

SYSTEMS = ("stock", "collective", "routed", "moves")


def failures(record: dict[str, Any]) -> list[str]:
    failed = [f"{s}: {run['failed']}" for s, runs in record["scenarios"].items() for run in runs if "failed" in run]
    return [*failed, *record["errors"]]


def median_of(record: dict[str, Any], scenario: str, figure: str = "p50") -> float | None:
    """The median over repeats of a figure of the shorts' gaps."""
    found = [run["short"][figure] for run in record["scenarios"].get(scenario, []) if "failed" not in run]
    return round(statistics.median(found), 3) if found else None


def ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 3) if value is not None and base else None


def compare(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per scenario and system: p50, its ratio to the system's own A, and to stock's p50 (below 1: faster)."""
    stock = records.get("stock")
    rows: dict[str, Any] = {}
    for scenario in ("A", "B", "C"):
        base = median_of(stock, scenario) if stock else None
        rows[scenario] = {
            name: {
                "p50_ms": (value := median_of(record, scenario)),
                "mean_ms": median_of(record, scenario, "mean"),
                "to_own_A": ratio(value, median_of(record, "A")),
                "to_stock": ratio(value, base),
            }
            for name, record in records.items()
        }
    seconds = {name: record["starts"][-1]["seconds"] for name, record in records.items()}
    rows["startup"] = {n: {"seconds": s, "to_stock": ratio(s, seconds.get("stock"))} for n, s in seconds.items()}
    return rows


def other_lines(name: str, record: dict[str, Any]) -> list[str]:
    """What does not fit the table: capacity, trace, prefill, load, and failures."""
    lines = []
    for run in record["scenarios"].get("capacity", []):
        if "failed" not in run:
            said = run.get("error") or f"gap p50 {run['long']['p50']} ms"
            lines.append(f"capacity, {name}: {record['settings']['capacity']} tokens: HTTP {run['status']}, {said}")
    for run in record["scenarios"].get("trace", []):
        if "failed" not in run:
            lines.extend(f"trace {scenario}, {name}: {json.dumps(run[scenario]['per_step'])}" for scenario in "AB")
    for run in record["scenarios"].get("prefill", []):
        if "failed" not in run:
            short, before = run["short"], run["before"]
            lines.append(
                f"prefill, {name}: {record['settings']['prefill']} tokens: first token after {run['long']['ttft']} ms; "
                f"shorts' gaps before p50 {before['p50']} ms, meanwhile p50 {short['p50']} p99 {short['p99']} ms"
            )
    for run in record["scenarios"].get("load", []):
        if "failed" not in run:
            lines.append(f"load, {name}: {json.dumps(run['load'] | run['counters'])}")
    for scenario in ("A", "B", "C"):
        shorts = [run["short"] for run in record["scenarios"].get(scenario, []) if "short" in run]
        if any(short["bunched"] > short["gaps"] / 20 for short in shorts):
            counts = " ".join(f"{short['bunched']}/{short['gaps']}" for short in shorts)
            lines.append(f"{scenario}, {name}: client or API server late, tokens came bunched: {counts}; see the means")
    return lines + [f"FAILED, {name}: {text.splitlines()[0]}" for text in failures(record)]


def report(folder: Path) -> None:
    """Print the table of what is in the folder, and write it with all figures and commands to report.json."""
    paths = {name: folder / f"{name}.json" for name in SYSTEMS}
    records = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not records:
        raise SystemExit(f"no {', '.join(path.name for path in paths.values())} in {folder}")
    rows = compare(records)
    print("gap p50 of the shorts, ms; /A: to the same system's A; /stock: to stock's (below 1: faster)")
    print(f"{'':10}" + "".join(f"{name:>12}{'/A':>8}{'/stock':>8}" for name in records))
    for row, cells in rows.items():
        values = [(c.get("p50_ms", c.get("seconds")), c.get("to_own_A"), c["to_stock"]) for c in cells.values()]
        texts = [["-" if v is None else f"{v:.2f}" for v in cell] for cell in values]
        label = "start-up s" if row == "startup" else row
        print(f"{label:10}" + "".join(f"{a:>12}{b:>8}{c:>8}" for a, b, c in texts))
    lines = [line for name, record in records.items() for line in other_lines(name, record)]
    print("\n".join(lines))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(folder / "report.json", {"date": date, "ratios": rows, "also": lines, "systems": records})
