# SPDX-License-Identifier: Apache-2.0
"""The search for the highest rate under a target (``benchmarks/slo.py``): arithmetic, bisection, resuming."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

slo = pytest.importorskip("slo")
search = pytest.importorskip("slo_search")

MACHINE = {"gpus": 2, "gpu": "a GPU", "machine": "x", "versions": {}}
RATES = search.grid(1, 16, 1)
FREE: Any = SimpleNamespace(process=SimpleNamespace(poll=lambda: None), url="")


def stream(sent: float, first: float, gap: float, tokens: int, error: str | None = None) -> dict[str, Any]:
    """As a client has seen it; seconds."""
    times = [sent + first + gap * i for i in range(tokens)]
    return {"name": "r", "sent": sent, "times": times, "error": error, "tokens": tokens}


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_percentiles_are_over_requests_and_not_over_gaps() -> None:
    """199 requests of three tokens, 10 ms each, and one with a thousand of 50 ms: most gaps are slow, P50 is not."""
    streams = [stream(i / 10, 0.5, 0.010, 3) for i in range(199)] + [stream(20.0, 0.5, 0.050, 1000)]
    found = search.figures(streams, 0.0)
    assert found["tpot_p50"] == found["tpot_p99"] == 10.0 and found["requests"] == 200
    slow = [stream(20.0 + i, 2.0, 0.050, 9) for i in range(3)]
    found = search.figures(streams[:199] + slow, 0.0)
    assert found["tpot_p99"] == 50.0 and found["tpot_p90"] == 10.0, "three of 202 are more than a hundredth"
    assert found["ttft_p50"] == 500.0 and found["ttft_p99"] == 2000.0


def test_of_few_requests_the_largest_counts() -> None:
    assert search.figures([stream(i, 0.1, 0.001 * (i + 1), 5) for i in range(40)], 0.0)["tpot_p99"] == 40.0


def test_what_comes_early_or_makes_one_token_does_not_count() -> None:
    streams = [stream(0.0, 0.1, 9.0, 5), stream(3.0, 0.1, 0.020, 5), stream(4.0, 0.3, 0.0, 1)]
    found = search.figures(streams, 2.0)
    assert found["tpot_p99"] == 20.0 and found["requests"] == 2 and found["sent"] == 3 and found["ttft_p99"] == 300.0


def test_what_does_not_end_is_infinitely_slow() -> None:
    """One of 100 is not yet more than a hundredth of 101; two are. And JSON has no infinity."""
    fine = [stream(i, 0.1, 0.010, 5) for i in range(100)]
    stuck = [stream(50.0, 0.1, 0.010, 4, "ended after 4 chunks"), stream(51.0, 0.0, 0.0, 0, "ended after 0 chunks")]
    assert search.figures(fine + stuck[:1], 0.0)["tpot_p99"] == 10.0
    found = search.figures(fine + stuck, 0.0)
    assert found["tpot_p99"] == math.inf and found["unfinished"] == 2 and len(found["errors"]) == 2
    assert found["ttft_p99"] == 100.0
    assert search.plain(found)["tpot_p99"] is None and json.dumps(search.plain(found), allow_nan=False)


def test_targets() -> None:
    times, ms = search.Target.parse("1.5x"), search.Target.parse("25")
    assert times.of(8.0) == 12.0 and times.of(None) is None and ms.of(None) == ms.of(8.0) == 25.0
    for text in ("0x", "-1", "x", "nan", "fast"):
        with pytest.raises(ValueError):
            search.Target.parse(text)


def test_a_grid_has_both_ends() -> None:
    assert search.grid(0.5, 2, 0.5) == [0.5, 1.0, 1.5, 2.0] and search.grid(3, 3, 1) == [3]
    assert search.grid(0.1, 0.5, 0.1) == [0.1, 0.2, 0.3, 0.4, 0.5]


# -- bisection --------------------------------------------------------------------------------------------------------


def searched(curve: Any, targets: list[float], seen: dict[float, float]) -> int:
    """Try rates until all is known; returns how many."""
    tried = 0
    for target in targets:
        while (rate := search.next_rate(RATES, seen, target)) is not None:
            assert rate in RATES and rate not in seen
            seen[rate] = curve(rate)
            tried += 1
    return tried


@given(st.floats(0.5, 17), st.floats(0.5, 17))
def test_bisection_finds_the_highest_rate(first: float, second: float) -> None:
    """For rising curves, with as few probes as halving needs; what one target has seen serves the next."""
    low, high = sorted((first, second))
    seen: dict[float, float] = {}
    tried = searched(lambda rate: rate, [low], seen)
    assert tried <= math.ceil(math.log2(len(RATES) + 1))
    tried += searched(lambda rate: rate, [high], seen)
    for target in (low, high):
        assert search.best_rate(RATES, seen, target) == max((rate for rate in RATES if rate <= target), default=0.0)
    assert tried <= 2 * math.ceil(math.log2(len(RATES) + 1)) - (1 if low < high else 0)


@given(st.lists(st.floats(1, 100), min_size=len(RATES), max_size=len(RATES)), st.floats(1, 100))
def test_bisection_ends_also_on_noise(values: list[float], target: float) -> None:
    """Of what was seen, the rate that is found meets the target, and the next one misses it."""
    seen: dict[float, float] = {}
    searched(lambda rate: values[RATES.index(rate)], [target], seen)
    best = search.best_rate(RATES, seen, target)
    assert best is not None
    assert best == 0.0 or seen[best] <= target
    at = RATES.index(best) + 1 if best else 0
    assert at == len(RATES) or seen[RATES[at]] > target


def test_nothing_is_known_before_the_end() -> None:
    assert search.best_rate(RATES, {8: 1.0}, 2.0) is None
    assert search.best_rate(RATES, {1: math.inf}, 2.0) == 0.0


# -- resuming ---------------------------------------------------------------------------------------------------------


def curve(system: str, rate: float, seed: int) -> float:
    return 8.0 + rate * {"stock": 2.0, "tensor": 1.5, "nanocp": 0.8}[system] + 0.3 * seed


class Fake(slo.Search):  # type: ignore[misc]
    """Probes that take no time; ``left`` may be made before one fails."""

    left = 10**6
    tried: list[Any]

    def unloaded(self, driver: Any, system: str, phase: str) -> None:
        self._note((system, phase))
        self.record.add(self.of[system, phase], system, phase, None, 0.0, {"tpot_p50": 8.0})

    def probe(self, driver: Any, system: str, phase: str, seed: int, rate: float) -> None:
        self._note((system, phase, seed, rate))
        found = {"tpot_p50": 8.0, "tpot_p99": curve(system, rate, seed), "ttft_p50": 1.0, "ttft_p99": 2.0}
        self.record.add(self.of[system, phase], system, phase, seed, rate, found)

    def _note(self, what: Any) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.tried.append(what)

    def all(self) -> None:
        for system in self.args.systems:
            if self.missing(system):
                for phase in self.args.phases:
                    self.phase(None, system, phase, FREE)


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str, left: int = 10**6) -> Fake:
    arguments = ["--out", str(folder), "--model", "m", "--targets", "1.5x,20", "--seeds", "0,1", "--rates", "1:12:1"]
    monkeypatch.setattr(sys, "argv", ["slo.py", *arguments, *more])
    found = Fake(slo.parse_args(), MACHINE)
    found.left, found.tried = left, []
    return found


@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_a_run_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: list[str]) -> None:
    """Wherever it was: nothing is tried twice, and the results are those of one run."""
    whole = make(tmp_path / "whole", monkeypatch, *compare)
    whole.args.out.mkdir()
    whole.all()
    assert len(set(whole.tried)) == len(whole.tried) > 20
    for cut in range(0, len(whole.tried), 13):
        folder = tmp_path / str(cut)
        folder.mkdir()
        first = make(folder, monkeypatch, *compare, left=cut)
        with pytest.raises(KeyboardInterrupt):
            first.all()
        second = make(folder, monkeypatch, *compare)
        second.all()
        assert first.tried + second.tried == whole.tried
        assert second.results() == whole.results()
    again = make(tmp_path / "whole", monkeypatch, *compare)
    again.all()
    assert again.tried == [] and not any(map(again.missing, again.args.systems))


def test_the_rates_that_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(tmp_path, monkeypatch, "--compare")
    found.all()
    by = {(one["phase"], one["target"], one["system"]): one for one in found.results()}
    stock, plugin = by["decode", "1.5x", "stock"], by["decode", "1.5x", "nanocp"]
    assert stock["target_ms"] == 12.0 and stock["by_seed"] == {"0": 2.0, "1": 1.0}
    assert (stock["rate"], stock["least"], stock["most"]) == (1.5, 1.0, 2.0)
    assert plugin["by_seed"] == {"0": 5.0, "1": 4.0} and plugin["over_reference"] == 3.0
    assert by["prefill", "20", "nanocp"]["at_highest_rate_tried"] and not plugin["at_highest_rate_tried"]
    for seed, rate in stock["by_seed"].items():
        assert rate in found.seen("nanocp", "decode", int(seed)), "compared where stock is at its limit"
    assert "3.00" in slo.table(list(by.values()))


@pytest.mark.parametrize(
    "other",
    [
        ["--window", "9"],
        ["--settings", '{"moves": true}'],
        ["--extra", "--seed 3"],
        ["--prefill-schedule-interval", "4"],
    ],
)
def test_what_would_not_be_the_same_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str]
) -> None:
    make(tmp_path, monkeypatch).all()
    changed = make(tmp_path, monkeypatch, *other)
    assert changed.missing("nanocp")
    # The plugin's settings are not stock's.
    assert bool(changed.missing("stock")) == (other[0] != "--settings")
    more = make(tmp_path, monkeypatch, "--seeds", "0,1,2", "--targets", "1.5x")
    more.all()
    assert {one[2] for one in more.tried} == {2}


def test_no_probe_begins_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["--window", "10", "--drain", "5"]
    late = make(tmp_path, monkeypatch, *limits, "--phase-limit", "14")
    late.all()
    assert {len(one) for one in late.tried} == {2}, "only what is unloaded"
    assert all(late.missing(system) for system in late.args.systems)
    assert all(one["rate"] is None for one in late.results())
    in_time = make(tmp_path, monkeypatch, *limits, "--phase-limit", "16", "--until", "3600")
    in_time.all()
    assert not any(map(in_time.missing, in_time.args.systems))


def test_all_systems_get_the_same_requests_and_cadence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(tmp_path, monkeypatch, "--prefill-schedule-interval", "4", "--ranks", "2", "--extra-of", "tensor=--x")
    lines = {system: slo.command(found.args, system, True, 1) for system in slo.SYSTEMS}
    assert all("--prefill-schedule-interval=4" in line for line in lines.values())
    assert [system for system, line in lines.items() if "--x" in line] == ["tensor"]
    assert [system for system, line in lines.items() if "--data-parallel-size=2" in line] == ["stock", "nanocp"]
    assert "--tensor-parallel-size=2" in lines["tensor"] and "--nanocp" in lines["nanocp"]
    for phase in slo.PHASES:
        first, second = (slo.phase_lengths(found.args, phase, seed) for seed in (0, 1))
        assert first != second and sorted(first) == sorted(second)
        assert first == slo.phase_lengths(found.args, phase, 0)
        most = found.args.max_model_len
        assert all(p > 0 and o > 1 and p + o < most for p, o in first)
