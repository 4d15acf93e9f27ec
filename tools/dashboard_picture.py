#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws a Grafana dashboard from what a Prometheus server has: a stand-in for a screenshot, where there is no Grafana.

    python tools/dashboard_picture.py --prometheus http://127.0.0.1:9090 --dashboard examples/grafana/nanocp.json \
        --start 2026-01-31T12:00:00Z --end 2026-01-31T12:03:00Z --out docs/dashboard.png

Every expression of every panel is asked of the server as it stands in the dashboard, and drawn where ``gridPos`` puts
the panel, with its title, unit, limits and legend. What Grafana itself would make of the file is not shown by this.
Rows and time series are drawn, as lines; the project's dashboard has no other panels, and any other is refused.

Variables are resolved more simply than Grafana does:

- a query variable, which must be ``label_values(SELECTOR, LABEL)``, is its ``allValue`` if it has "All", else the first
  value in alphabetical order that the time range has;
- ``$__interval`` is the time range over 400 points, rounded up to seconds, and at least the scrape interval;
- ``$__rate_interval`` is the larger of ``$__interval`` plus the scrape interval and four scrape intervals;
- others, the data source among them, do not occur in the dashboard's expressions.

Says on stderr which expressions had no data. Needs matplotlib, which the project does not install.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# A dashboard's grid in pixels, as Grafana's at this width: columns, cells of 30 with 8 between them.
WIDTH, COLUMNS, CELL, GAP, HEADER = 1600, 24, 30, 8, 72
DPI = 100
POINTS = 400
TICKS = (1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
TIMEOUT_S = 60
COLOURS = ("#3f9142", "#d9a300", "#3274d9", "#e0562b", "#8f3bb8", "#c4162a", "#1b9aaa", "#6b7280")
INK, DIM, LINES, CARD, PAGE = "#24292e", "#6b7280", "#e4e7eb", "#ffffff", "#f4f5f5"


@dataclass(frozen=True)
class Series:
    """One line of a panel: its legend and its points, without those that have no value; times in seconds since 1970."""

    legend: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus server and the time range it is asked about, in seconds."""

    url: str
    start: float
    end: float
    step: int

    def _get(self, path: str, **query: Any) -> Any:
        url = f"{self.url.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{query}: {error.read().decode(errors='replace')}") from error
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"{self.url} does not answer as Prometheus does: {error}") from error

    def label_values(self, selector: str, label: str) -> list[str]:
        """Values of a label in the time range, sorted."""
        query = {"match[]": selector, "start": self.start, "end": self.end}
        return sorted(self._get(f"label/{urllib.parse.quote(label)}/values", **query))

    def series(self, expression: str, legend: str) -> list[Series]:
        """What an expression has; ``{{label}}`` in the legend stands for a label's value."""
        found = []
        data = self._get("query_range", query=expression, start=self.start, end=self.end, step=self.step)
        for result in data["result"]:
            labels: dict[str, str] = result["metric"]
            name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), legend)  # noqa: B023
            points = {at: float(value) for at, value in result["values"] if math.isfinite(float(value))}
            if points:
                found.append(Series(name or json.dumps(labels), list(points), list(points.values())))
        return found


def resolve(board: dict[str, Any], server: Prometheus, scrape: int) -> dict[str, str]:
    """Values of a dashboard's variables, as the module's docstring says."""
    values = {"__interval": f"{server.step}s", "__rate_interval": f"{max(server.step + scrape, 4 * scrape)}s"}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        name, query = variable["name"], variable["query"]["query"]
        asked = re.fullmatch(r"label_values\((.*),\s*(\w+)\)", query)
        if asked is None:
            raise SystemExit(f"variable {name}: not of the form label_values(SELECTOR, LABEL): {query}")
        found = server.label_values(substitute(asked[1], values), asked[2])
        if not found:
            raise SystemExit(f"variable {name}: {query} has no values between {server.start} and {server.end}")
        values[name] = variable.get("allValue") or ".*" if variable.get("includeAll") else found[0]
    return values


def substitute(text: str, values: dict[str, str]) -> str:
    """Replaces ``$name`` and ``${name}`` of all names in ``values``; others stay."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: values.get(match[1] or match[2], match[0]), text)


def unit_format(unit: str) -> Callable[[float], str]:
    """How an axis writes values of a Grafana unit.

    Raises:
        SystemExit: a unit that no panel of the project's dashboard has.
    """

    def plain(value: float) -> str:
        for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
            if abs(value) >= size:
                return f"{value / size:.4g}{suffix}"
        return f"{value:.4g}"

    def seconds(value: float) -> str:
        for size, suffix in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= size:
                return f"{value / size:.4g} {suffix}"
        return f"{value:.4g} s"

    formats: dict[str, Callable[[float], str]] = {
        "none": lambda value: f"{value:.4g}",
        "sci": lambda value: f"{value:.0e}",
        "short": plain,
        "cps": lambda value: f"{plain(value)} c/s",
        "percentunit": lambda value: f"{100 * value:.4g}%",
        "s": seconds,
    }
    if unit not in formats:
        raise SystemExit(f"unit {unit} is not known here")
    return formats[unit]


class Page:
    """The picture: a matplotlib figure in which places are pixels from the top left."""

    def __init__(self, height: int, start: float, end: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.limits = start, end
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=PAGE)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Text whose left end is at x, in the middle of y."""
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, va="center", **{"color": INK, **style})

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        return self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))

    def panel(self, panel: dict[str, Any], lines: list[Series]) -> None:
        """A row's title, or a panel with its series."""
        column = (WIDTH - GAP) / COLUMNS
        grid = panel["gridPos"]
        x, y = GAP + grid["x"] * column, HEADER + grid["y"] * (CELL + GAP)
        if panel["type"] == "row":
            self.text(x + 4, y + CELL / 2, panel["title"], 15, weight="bold")
            return
        width, height = grid["w"] * column - GAP, grid["h"] * (CELL + GAP) - GAP
        card = self.axes(x, y, width, height)
        card.set(xticks=[], yticks=[], facecolor=CARD)
        card.spines[:].set_color(LINES)
        self.text(x + 12, y + 20, panel["title"], 13, weight="bold")
        axes = self.axes(x + 88, y + 44, width - 112, height - 112)
        axes.set_facecolor(CARD)
        self._scale(axes, panel["fieldConfig"]["defaults"], lines)
        for colour, line in zip(COLOURS * len(lines), lines, strict=False):
            axes.plot(line.times, line.values, color=colour, linewidth=1.3, label=line.legend)
        if lines:
            # In one line, like Grafana's: smaller where it is long. A character of 11 points is about 9 pixels wide.
            size = min(11.0, 11 * width / (9 * sum(len(line.legend) + 5 for line in lines)))
            card.legend(
                *axes.get_legend_handles_labels(), loc="lower left", ncols=len(lines), frameon=False, fontsize=size,
                labelcolor=INK, handlelength=1.0, columnspacing=1.0, handletextpad=0.4,
            )  # fmt: skip
        else:
            axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", color=DIM, fontsize=13)

    def _scale(self, axes: Any, defaults: dict[str, Any], lines: list[Series]) -> None:
        values = [value for line in lines for value in line.values]
        if defaults["custom"].get("scaleDistribution", {}).get("type") == "log":
            axes.set_yscale("log")
            axes.minorticks_off()
        elif values:
            low, high = defaults.get("min", min(values)), defaults.get("max", max(values))
            axes.set_ylim(low, high + (0.0 if "max" in defaults else 0.06 * (high - low) or 1.0))
        write = unit_format(defaults.get("unit", "none"))
        axes.yaxis.set_major_formatter(lambda value, _: write(value))
        axes.set_xlim(*self.limits)
        axes.set_xticks(self._ticks())
        axes.xaxis.set_major_formatter(lambda at, _: f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}")
        axes.grid(color=LINES, linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=DIM, labelsize=11, length=0, pad=7)

    def _ticks(self) -> list[float]:
        """At most six times, on full seconds, minutes or hours."""
        start, end = self.limits
        every = next((step for step in TICKS if (end - start) / step <= 5), TICKS[-1])
        return [float(at) for at in range(math.ceil(start / every) * every, math.floor(end) + 1, every)]

    def save(self, out: Path) -> None:
        """Write it as a PNG, with few colours: a third as large."""
        from PIL import Image

        full = io.BytesIO()
        self.figure.savefig(full, dpi=DPI)
        # By the default method, the colours of short lines would be lost.
        picture = Image.open(full).convert("RGB")
        few = picture.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        few.save(out, "PNG", optimize=True)


def draw(board: dict[str, Any], server: Prometheus, scrape: int, out: Path) -> int:
    """Asks for all panels and writes the picture; the number of expressions that had no data."""
    values = resolve(board, server, scrape)
    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    page = Page(HEADER + rows * (CELL + GAP), server.start, server.end)
    day = f"{datetime.fromtimestamp(server.start, UTC):%Y-%m-%d}"
    shown = {v["name"]: "All" if v.get("includeAll") else values.get(v["name"]) for v in board["templating"]["list"]}
    chosen = "    ".join(f"{name}: {value}" for name, value in shown.items() if value)
    page.text(GAP + 4, 24, board["title"], 18, weight="bold")
    page.text(GAP + 4, 54, f"{chosen}    rate over {values['__rate_interval']}    {day}, UTC", 12, color=DIM)
    empty = 0
    for panel in panels:
        if panel["type"] not in ("row", "timeseries"):
            raise SystemExit(f"panel {panel['title']}: {panel['type']} is not drawn here")
        lines: list[Series] = []
        for target in panel.get("targets", ()):
            found = server.series(substitute(target["expr"], values), target["legendFormat"])
            if not found:
                print(f"no data: {panel['title']}: {target['expr']}", file=sys.stderr)
                empty += 1
            lines += found
        page.panel(panel, lines)
    page.save(out)
    return empty


def moment(text: str) -> float:
    """Seconds since 1970 of themselves, or of an ISO 8601 time, which is UTC unless it says otherwise."""
    try:
        return float(text)
    except ValueError:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a Grafana dashboard from a Prometheus server, without Grafana.")
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--dashboard", required=True, type=Path, metavar="FILE", help="the dashboard's JSON")
    parser.add_argument("--start", required=True, type=moment, help="ISO 8601 or seconds since 1970")
    parser.add_argument("--end", required=True, type=moment)
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("--scrape-interval", type=int, default=15, metavar="SECONDS", help="default: %(default)s")
    args = parser.parse_args()
    if args.end <= args.start or args.scrape_interval < 1:
        parser.error("the end must be after the start, and the scrape interval at least a second")
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        raise SystemExit("matplotlib is missing: pip install matplotlib, in an environment of its own") from None
    step = max(args.scrape_interval, math.ceil((args.end - args.start) / POINTS))
    server = Prometheus(args.prometheus, args.start, args.end, step)
    empty = draw(json.loads(args.dashboard.read_text(encoding="utf-8")), server, args.scrape_interval, args.out)
    print(f"{args.out}: {empty} expressions without data")


if __name__ == "__main__":
    main()
