# SPDX-License-Identifier: Apache-2.0
"""What a user sees: a table, and a plot where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .trace import InputError

_COLUMNS = (
    ("TTFT p50, ms", "ttft_p50", ".0f"),
    ("p99", "ttft_p99", ".0f"),
    ("TPOT p50, ms", "tpot_p50", ".1f"),
    ("p99", "tpot_p99", ".1f"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("preempted", "preemptions", "d"),
    ("KV mean", "kv_mean", ".0%"),
    ("fullest", "kv_fullest", ".0%"),
    ("refused", "refused", "d"),
)
Point = Mapping[str, Any]


def table(points: Sequence[Point]) -> str:
    """One line a point: its load, its system, and its figures; the best TPOT p99 of a load has a star.

    Args:
        points: with ``load``, ``system`` and the figures.
    """
    rows = [["load", "system", *(title for title, _, _ in _COLUMNS)]]
    for point in points:
        others = [p["tpot_p99"] for p in points if p["load"] == point["load"] and p["tpot_p99"] is not None]
        cells = ["-" if point[key] is None else format(point[key], form) for _, key, form in _COLUMNS]
        if point["tpot_p99"] is not None and len(others) > 1 and point["tpot_p99"] == min(others):
            cells[3] += "*"
        rows.append([str(point["load"]), str(point["system"]), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def verdict(points: Sequence[Point]) -> str:
    """For each load, in one line, whether the plugin's best setting is faster than the best of stock's systems."""
    lines = []
    for load in dict.fromkeys(point["load"] for point in points):
        here = [point for point in points if point["load"] == load and point["tpot_p99"] is not None]
        ours = [point for point in here if point["system"].startswith("nanocp")]
        theirs = [point for point in here if not point["system"].startswith("nanocp")]
        if ours and theirs:
            mine, other = (min(those, key=lambda p: p["tpot_p99"]) for those in (ours, theirs))
            ratios = [
                f"{name} {mine[key] / other[key]:.2f}"
                for name, key in (("TPOT p99", "tpot_p99"), ("TTFT p99", "ttft_p99"), ("tokens/s", "tokens_per_s"))
                if other[key]
            ]
            lines.append(f"{load}: {mine['system']} over {other['system']}: {', '.join(ratios)}")
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Before anything is simulated, whether there can be a plot.

    Raises:
        InputError: matplotlib is not installed, or there is no such folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed; install it or leave --plot out")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no such folder")


def plot(points: Sequence[Point], path: Path) -> None:
    """TPOT and TTFT p99 over the loads, a line a system, as SVG.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    style = {"svg.hashsalt": "nanocp", "axes.spines.top": False, "axes.spines.right": False}
    loads = list(dict.fromkeys(str(point["load"]) for point in points))
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axis, key, title in zip(axes, ("tpot_p99", "ttft_p99"), ("TPOT p99, ms", "TTFT p99, ms"), strict=True):
            for system in dict.fromkeys(point["system"] for point in points):
                mine = [p for p in points if p["system"] == system and p[key] is not None]
                axis.plot([loads.index(str(p["load"])) for p in mine], [p[key] for p in mine], "o-", label=system)
            axis.set_xticks(range(len(loads)), loads)
            axis.set_title(f"{title} (simulated)", fontsize=10)
            axis.set_ylim(bottom=0)
        axes[0].legend(frameon=False, fontsize=9)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        pyplot.close(figure)
