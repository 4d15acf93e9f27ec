# SPDX-License-Identifier: Apache-2.0
"""What ``slo.py`` found: rates by phase, target and system, as a table and as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slo_search import over_seeds

if TYPE_CHECKING:
    from slo import Search

COLOURS = {"stock": "#c0392b", "tensor": "#e67e22", "nanocp": "#2471a3"}


def summary(search: Search, phase: str, number: int, system: str) -> dict[str, Any]:
    """Of one target: the highest rate of each seed, their median and range, over the reference's, and what was seen
    there."""
    args, target = search.args, search.targets(phase)[number]
    seeds, rates = args.seeds, [search.best(system, phase, seed, target) for seed in args.seeds]
    found = over_seeds(rates)
    theirs = over_seeds([search.best(search.reference, phase, seed, target) for seed in seeds])
    at = [
        search.record.probe(search.of[system, phase], phase, seed, rate)
        for seed, rate in zip(seeds, rates, strict=True)
        if rate
    ]
    return {
        "phase": phase,
        "target": args.targets[number].text,
        "target_ms": None if target is None else round(target, 3),
        "system": system,
        "unloaded_ms": search.record.unloaded(search.of[system, phase], phase),
        **found,
        "by_seed": dict(zip(map(str, seeds), rates, strict=True)),
        # There it may be higher than was tried.
        "at_highest_rate_tried": search.rates[-1] in rates,
        "over_reference": round(found["rate"] / theirs["rate"], 3) if found["rate"] and theirs["rate"] else None,
        **{name: [probe[name] for probe in at] for name in ("tpot_p50", "tpot_p99", "ttft_p50", "ttft_p99")},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a result."""
    rows = [
        ("phase", "TPOT P99 under", "system", "unloaded ms", "requests/s", "range", "over reference", "TTFT P99 ms")
    ]
    for one in results:
        more = "+" if one["at_highest_rate_tried"] else ""
        firsts = [value for value in one["ttft_p99"] if value is not None]
        rows.append(
            (
                one["phase"],
                f"{one['target']} ({one['target_ms']} ms)",
                one["system"],
                str(one["unloaded_ms"]),
                "not known" if one["rate"] is None else f"{one['rate']:g}{more}",
                "" if one["rate"] is None else f"{one['least']:g} to {one['most']:g}, {one['seeds']} seeds",
                "" if one["over_reference"] is None else f"{one['over_reference']:.2f}",
                f"{max(firsts):.0f}" if firsts else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(search: Search, folder: Path) -> list[Path]:
    """TPOT P99 by rate, a plot a phase, each seed a point; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for phase in search.args.phases:
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        targets = [target for target in search.targets(phase) if target is not None]
        top = 4 * max(targets, default=25.0)
        for system in search.args.systems:
            seen = [search.seen(system, phase, seed) for seed in search.args.seeds]
            rates = sorted({rate for one in seen for rate in one})
            points = [(rate, one[rate]) for one in seen for rate in one if math.isfinite(one[rate])]
            axes.scatter(*zip(*points, strict=True), s=14, color=COLOURS[system]) if points else None
            middle = [sorted(one[rate] for one in seen if rate in one) for rate in rates]
            axes.plot(rates, [min(top, one[len(one) // 2]) for one in middle], color=COLOURS[system], label=system)
        for target in targets:
            axes.axhline(target, color="grey", linestyle="--", linewidth=0.8)
        axes.set(xlabel="requests a second", ylabel="TPOT P99, ms", ylim=(0, top), title=phase)
        axes.legend()
        drawn.append(folder / f"slo-{phase}.svg")
        figure.savefig(drawn[-1], bbox_inches="tight")
        pyplot.close(figure)
    return drawn
