#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of docs/performance.md from benchmarks/results/.

    python tools/result_plots.py

Writes docs/plot-long.svg, docs/plot-short.svg and docs/plot-curves.svg, the same bytes for the same results. Needs
matplotlib, which the project does not install.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STOCK, PLUGIN, FLOOR, INK, DIM = "#8c959f", "#e8833a", "#1f2328", "#24292e", "#6b7280"
MACHINES = (("4xH200", 4, "400,000"), ("2xH200", 2, "300,000"), ("2xH100", 2, "300,000"))
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#d0d7de",
    "xtick.color": INK,
    "ytick.color": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "nanocp",
    "svg.fonttype": "path",
}


def load(name: str) -> Any:
    """A result by its file's name."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def draw_long(plot: Any) -> Any:
    """Gaps of 16 short requests, alone and beside a long one."""
    figure, axes = plot.subplots(1, len(MACHINES), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (machine, ranks, tokens) in zip(axes, MACHINES, strict=True):
        ratios = load(f"gpu_interference_{machine}.json")["ratios"]
        alone, beside = ratios["A"], ratios["B"]
        for offset, system, label, colour in ((-0.2, "stock", "stock", STOCK), (0.2, "routed", "--nanocp", PLUGIN)):
            values = [case[system]["p50_ms"] for case in (alone, beside)]
            bars = axis.bar([offset, 1 + offset], values, 0.38, color=colour, label=label)
            axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=1, fontsize=9)
        base = alone["stock"]["p50_ms"]
        floor = base + (beside["stock"]["p50_ms"] - base) / ranks
        axis.hlines(floor, 1.01, 1.39, color=FLOOR, linestyle=":", label="least there can be")
        axis.set_title(f"{ranks} {machine[2:]}", fontsize=10, color=INK)
        axis.set_xticks([0, 1], ["alone", f"beside one of\n{tokens} tokens"])
    axes[0].set_ylabel("gap p50 of 16 short requests, ms")
    axes[1].legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def draw_short(plot: Any) -> Any:
    """The plugin over stock with more and more short requests that begin at once."""
    ratios = load("gpu_control_plane_4xH200.json")["ratios"]
    loads = sorted((int(name.split(":")[1]), runs) for name, runs in ratios.items() if name.startswith("flat:"))
    kinds = (
        ("tpot_p50", "time per output token p50", "lower is better"),
        ("tokens_per_s", "tokens a second", "higher is better"),
        ("ttft_p50", "time to first token p50", "lower is better"),
    )
    figure, axes = plot.subplots(1, len(kinds), figsize=(9, 2.9), layout="constrained")
    for axis, (key, title, better) in zip(axes, kinds, strict=True):
        places = range(len(loads))
        runs = [[run[key]["ratio"] for run in runs] for _, runs in loads]
        axis.plot(places, [sum(values) / len(values) for values in runs], color=PLUGIN)
        for place, values in zip(places, runs, strict=True):
            axis.plot([place] * len(values), values, "o", color=PLUGIN, markersize=4)
        axis.axhline(1, color=STOCK, linewidth=1)
        axis.set_xticks(places, [str(count) for count, _ in loads])
        axis.set_ylim(0, max(1.3, *(max(values) + 0.2 for values in runs)))
        axis.set_title(f"{title} ({better})", fontsize=9, color=INK)
        axis.set_xlabel("short requests")
    axes[0].set_ylabel("--nanocp over stock")
    return figure


def draw_curves(plot: Any) -> Any:
    """Request rate against time per output token: measured points, and what the simulator says, with its range."""
    points = load("simulated_curves.json")["curves"]
    kinds = (
        ("nanocp 65536", "--nanocp", PLUGIN),
        ("stock", "stock, data parallel", STOCK),
        ("tensor", "stock, tensor parallel", INK),
    )
    figure, axes = plot.subplots(1, len(kinds), figsize=(9, 2.9), sharey=True, layout="constrained")
    for axis, (system, title, colour) in zip(axes, kinds, strict=True):
        mine = [point for point in points if point["system"] == system]
        rates = [point["rate"] for point in mine]
        low, high = zip(*(point["range"] for point in mine), strict=True)
        axis.fill_between(rates, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.plot(rates, [p["simulated_tpot_p99"] for p in mine], color=colour, label="simulated, and its range")
        axis.plot(rates, [p["measured_tpot_p99"] for p in mine], "x", color=FLOOR, label="measured")
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel("requests a second")
        axis.set_ylim(0, 110)
    axes[0].set_ylabel("time per output token p99, ms")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plot

    plot.rcParams.update(STYLE)
    for name, draw in (("plot-long", draw_long), ("plot-short", draw_short), ("plot-curves", draw_curves)):
        draw(plot).savefig(ROOT / "docs" / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
