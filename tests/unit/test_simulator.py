# SPDX-License-Identifier: Apache-2.0
"""The simulator: nothing lost, nothing twice, capacity kept; measured curves; no torch and no vLLM."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.simulated_curves import MEASURED, SETTLE, TOLERANCE, WINDOW, run_of
from vllm_nanocp.placement import ShardMap, prefix
from vllm_nanocp.placement.prefill_steps import PrefillGap
from vllm_nanocp.sim.figures import SYSTEMS, Run, figures, make_world, simulate
from vllm_nanocp.sim.machine import PRESETS
from vllm_nanocp.sim.nanocp import Settings
from vllm_nanocp.sim.ranks import World
from vllm_nanocp.sim.trace import Requests, poisson, read_trace, replayed

ROOT = Path(__file__).parents[2]
MACHINE = PRESETS["h200-qwen3-30b-a3b"]
SMALL = Run(MACHINE, 4, capacity=24_000, slots=64, budget=1024, settings=Settings(2048, moves=True), noise=0.02)
WIDE = replace(SMALL, capacity=200_000)


def load_of(requests: int, per_second: float, seed: int = 0, longest: int = 15_000) -> Requests:
    """Prompts with a long tail; a few of many times the usual length."""
    dice = np.random.default_rng(seed)
    return Requests(
        np.cumsum(dice.exponential(1 / per_second, requests)),
        np.minimum(dice.lognormal(6.5, 1.2, requests), longest).astype(np.int64) + 1,
        dice.integers(1, 300, requests),
    )


def with_prefixes(load: Requests, conversations: int) -> Requests:
    """Each request belongs to a conversation, of which some are far more popular; one block is common to all."""
    dice = np.random.default_rng(0)
    ids = []
    for n in load.prompt.tolist():
        talk, known = int(conversations * dice.random() ** 3), int(dice.integers(0, n // 512 + 1))
        fresh = int(dice.integers(10**6, 10**9))
        ids.append((0, *(1000 * (talk + 1) + i if i < known else fresh + i for i in range(n // 512))))
    return replace(load, prefix=tuple(ids))


def check(world: World) -> None:
    """The counts that are kept are those of what each request holds."""
    held, ranks, size = world.held, world.setup.ranks, world.setup.block_size
    assert (world.used == held.sum(axis=0) - world.shared).all()
    assert world.used.max() <= world.setup.blocks and world.used.min() >= 0 and world.homes.max() <= world.setup.slots
    decoding = world.decoding
    assert len(set(decoding.tolist())) == len(decoding)
    assert (world.read == held[decoding].sum(axis=0)).all()
    visits = held[decoding] > 0
    visits[np.arange(len(decoding)), world.home[decoding]] = False
    assert (world.guests == visits.sum(axis=0)).all()
    assert (world.homes == np.bincount(world.home[world.home >= 0], minlength=ranks)).all()
    assert (world.have == held.sum(axis=1)).all()
    # A decoding request has a block for each token that is computed.
    assert (world.have[decoding] * size >= world.length[decoding] - 1).all()
    in_prompts = [prompt.request for prompts in world.prompts for prompt in prompts]
    there = [*decoding.tolist(), *in_prompts]
    assert sorted(there) == np.flatnonzero(world.home >= 0).tolist()
    # Each is in one place: it will come, waits, is on a rank, has ended, or was refused.
    assert len(world.arrivals) - world.next + world.policy.waiting() + len(there) + world.finished == len(world.length)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("run", [WIDE, SMALL, replace(SMALL, decode_only=True)], ids=["wide", "full", "decode"])
def test_every_request_ends_once_and_every_block_comes_back(system: str, run: Run) -> None:
    requests = load_of(250, 100.0)
    world = make_world(run, system, requests)
    clock, waited = 0.0, False
    while world.finished < len(requests):
        world.step()
        assert world.clock >= clock
        clock, waited = world.clock, waited or world.policy.waiting() > 20
        if world.step_number % 7 == 0:
            check(world)
    check(world)
    assert not world.held.any() and not world.used.any() and not world.guests.any() and not len(world.decoding)
    assert (world.length == world.end).all() and not world.refused
    assert (world.first >= requests.at).all()
    assert ((world.last > world.first) == (requests.output > 1)).all()
    assert world.counts.degrees.total() == len(requests)
    if system != "nanocp":
        assert set(world.counts.degrees) == {1} and not world.counts.events["moves"]
    elif run is SMALL:
        assert waited and world.counts.events["moves"] and max(world.counts.degrees) > 1


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    requests = load_of(150, 60.0)
    for system in SYSTEMS:
        first, again = (simulate(SMALL, system, requests) for _ in range(2))
        assert first == again != simulate(replace(SMALL, seed=1), system, requests)


@pytest.mark.parametrize("decode_only", [True, False])
def test_one_rank_is_the_same_with_and_without_the_plugin(decode_only: bool) -> None:
    """Where nobody waits for room, nor beside a prompt that takes whole steps."""
    machine = replace(MACHINE, split_kv_token=MACHINE.kv_token, opened=0.0)
    run = Run(machine, 1, capacity=200_000, budget=4096, decode_only=decode_only)
    requests = load_of(150, 8.0, longest=900)
    ours, stock, turns = (simulate(run, system, requests) for system in ("nanocp", "stock", "round-robin"))
    assert ours == stock == turns
    assert simulate(replace(run, ranks=2), "nanocp", requests) != ours


def test_the_youngest_is_preempted_and_computed_again() -> None:
    """Two requests that cannot both grow: the second gives up its blocks, and starts over when the first has ended."""
    requests = Requests(np.array([0.0, 0.001]), np.array([160, 160]), np.array([300, 300]))
    run = Run(MACHINE, 1, capacity=640, slots=8, budget=1024)
    world = make_world(run, "stock", requests).run()
    assert world.counts.events["preemptions"] == 1 and world.preempted.tolist() == [False, True]
    assert world.last[0] < world.last[1] and figures(world)["kv_fullest"] == 1


def test_a_preempted_request_goes_on_at_its_home() -> None:
    """The model runner there has its sampling state."""
    run = replace(SMALL, settings=replace(SMALL.settings, moves=False))
    world = make_world(run, "nanocp", load_of(200, 150.0, seed=2))
    homes: dict[int, int] = {}
    back: list[tuple[int, int]] = []
    leave, enter = world.policy.return_, world.enter

    def leaves(request: int, home: int) -> None:
        homes[request] = home
        leave(request, home)

    def enters(request: int, shard_map: ShardMap) -> None:
        if request in homes:
            back.append((homes.pop(request), shard_map.home))
        enter(request, shard_map)

    world.policy.return_, world.enter = leaves, enters  # type: ignore[method-assign]
    world.run()
    assert len(back) == world.counts.events["preemptions"] > 5 and not homes
    assert all(before == after for before, after in back)


def test_decodes_wait_less_for_prompts_with_a_gap() -> None:
    """The same requests end, all blocks come back; the longest steps are shorter, and decode steps lie between."""
    requests = load_of(200, 30.0, longest=60_000)
    longest: dict[PrefillGap | None, float] = {}
    for gap in (None, PrefillGap(ms=60.0, decode_steps=2)):
        world = make_world(replace(WIDE, budget=4096, settings=Settings(2048, prefill_gap=gap)), "nanocp", requests)
        steps: list[tuple[float, bool, bool]] = []  # seconds, whether prompts were computed, whether anybody decoded
        measured = world.policy.measured

        def note(kv: Any, decodes: Any, guests: Any, seconds: float, tokens: int, pairs: float) -> None:
            steps.append((seconds, tokens > 0, bool(decodes.any())))  # noqa: B023
            measured(kv, decodes, guests, seconds, tokens, pairs)  # noqa: B023

        world.policy.measured = note  # type: ignore[method-assign]
        while world.finished < len(requests):
            world.step()
        check(world)
        assert not world.used.any() and not world.refused
        longest[gap] = max(seconds for seconds, _, decodes in steps if decodes)
        busy = [i for i, (_, prompts, _) in enumerate(steps) if prompts]
        apart = [b - a for a, b in pairwise(busy) if all(decodes for _, _, decodes in steps[a : b + 1])]
        assert min(apart) == (1 if gap is None else 3)
    with_gap, without = longest[gap], longest[None]
    assert with_gap < 0.1 < without


def test_a_long_prompt_takes_less_time_on_all_ranks() -> None:
    requests = Requests(np.array([0.0]), np.array([131_072]), np.array([8]))
    run = Run(MACHINE, 2, settings=Settings(16_384))
    stock, plugin = (simulate(run, system, requests)["ttft_p50"] for system in ("stock", "nanocp"))
    alone = simulate(replace(run, settings=Settings(16_384, parallel_prefill=False)), "nanocp", requests)["ttft_p50"]
    assert plugin < 0.7 * stock and plugin < 0.9 * alone
    # As measured on four H200s (benchmarks/results/gpu_loads_4xH200.json): 12.7 s.
    assert stock == pytest.approx(12_681, rel=TOLERANCE)


@pytest.mark.parametrize("system", ["nanocp", "stock", "round-robin"])
def test_shared_prefixes_are_counted_once_and_come_back(system: str) -> None:
    requests = with_prefixes(load_of(250, 60.0), 20)
    world = make_world(replace(SMALL, capacity=40_000, prefix_caching=True), system, requests)
    while world.finished < len(requests):
        world.step()
        if world.step_number % 7 == 0:
            check(world)
    assert world.caches is not None and not world.used.any() and not world.shared.any()
    assert not any(world.caches.refs) and any(world.caches.idle)
    plain = simulate(replace(SMALL, capacity=40_000), system, requests)
    assert figures(world)["ttft_p50"] < plain["ttft_p50"]


def test_popular_prefixes_do_not_draw_everything_to_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(SMALL, ranks=8, capacity=60_000, prefix_caching=True)
    # A rank here is a part of a real one, and so are the tokens whose reading does not count.
    monkeypatch.setattr(prefix, "KV_SLACK_TOKENS", prefix.KV_SLACK_TOKENS * run.capacity // MACHINE.capacity)
    found = simulate(run, "nanocp", with_prefixes(load_of(600, 50.0), 40))
    assert found["kv_ratio"] < 1.42 and found["batch_ratio"] < 1.35


def test_moves_and_placement_keep_the_ranks_even() -> None:
    requests = load_of(600, 60.0, longest=20_000)
    run = replace(SMALL, ranks=8, capacity=60_000)
    still = replace(run, settings=replace(run.settings, moves=False))
    moves, placed = simulate(run, "nanocp", requests), simulate(still, "nanocp", requests)
    turns = simulate(run, "round-robin", requests)
    assert moves["moves"] > 0 == placed["moves"]
    assert moves["kv_ratio"] < turns["kv_ratio"] and moves["kv_ratio"] < placed["kv_ratio"]
    assert moves["batch_ratio"] < turns["batch_ratio"]


def test_spills_and_the_reserve_replace_preemptions() -> None:
    requests = load_of(300, 150.0, seed=2)
    still = replace(SMALL, settings=replace(SMALL.settings, moves=False))
    few, many = simulate(SMALL, "nanocp", requests), simulate(still, "nanocp", requests)
    assert few["kv_mean"] > 0.7 and few["preemptions"] * 4 < many["preemptions"]


def measured_load(rate: float) -> Requests:
    rows = json.loads((ROOT / "tests" / "data" / "stretched_load.json").read_text())["requests"]
    end = next(i for i, row in enumerate(rows) if row[0] / rate >= WINDOW) + 1
    at, prompt, output = zip(*rows[:end], strict=True)
    return Requests(np.array(at) / rate, np.array(prompt), np.array(output))


@pytest.mark.parametrize(
    ("system", "rate"),
    [*(("nanocp 65536", rate) for rate in (4, 6, 8, 10)), ("nanocp 16384", 8), ("tensor", 8), ("tensor", 12)],
)
def test_measured_curves(system: str, rate: float) -> None:
    """TPOT p99 on four H200s. Stock's data parallelism depends on chance more than this allows, see the results."""
    run, name = run_of(system)
    found = simulate(replace(run, noise=0.0), name, measured_load(rate))
    assert found["tpot_p99"] == pytest.approx(MEASURED[system][rate], rel=TOLERANCE)


def test_measured_curve_of_stock() -> None:
    runs = [run_of("stock", seed=seed) for seed in range(3)]
    values = sorted(simulate(run, name, measured_load(4))["tpot_p99"] for run, name in runs)
    assert values[1] == pytest.approx(MEASURED["stock"][4], rel=0.15) and SETTLE < WINDOW


# -- traces and the command ------------------------------------------------------------------------------------------


def test_a_replay_keeps_every_request_and_the_rate() -> None:
    trace = load_of(50, 1.0)
    again = replayed(trace, 10.0, 3)
    assert len(again) == 150 and (np.diff(again.at) >= 0).all()
    assert sorted(again.prompt) == sorted(np.tile(trace.prompt, 3))
    assert len(again) / again.at[-1] == pytest.approx(10 * len(trace) / trace.at[-1], rel=0.1)


def test_random_arrivals_have_the_trace_s_lengths() -> None:
    trace = load_of(40, 1.0)
    found = poisson(trace, 10.0, 30.0, 3)
    assert len(found) == pytest.approx(300, rel=0.2) and found.at[-2] < 30.0 <= found.at[-1]
    pairs = set(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True))
    assert pairs == set(zip(found.prompt.tolist(), found.output.tolist(), strict=True))


def write(path: Path, requests: Requests) -> Path:
    rows = zip(requests.at.tolist(), requests.prompt.tolist(), requests.output.tolist(), strict=True)
    path.write_text("\n".join(json.dumps({"at": a, "prompt": p, "output": o}) for a, p, o in rows) + "\n")
    return path


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    ours = tmp_path / "ours.jsonl"
    ours.write_text('{"at": 1.5, "prompt": 10, "output": 2, "hash_ids": [4]}\n\n{"at": 0, "prompt": 20, "output": 3}\n')
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(
        '{"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": []}\n'
        '{"timestamp": 1500, "input_length": 10, "output_length": 2, "hash_ids": [4]}\n'
    )
    first, second = read_trace(ours), read_trace(theirs)
    assert first.at.tolist() == second.at.tolist() == [0.0, 1.5]
    assert first.prompt.tolist() == second.prompt.tolist() == [20, 10] and first.prefix == second.prefix == ((), (4,))


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers"):
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Blocker())
from vllm_nanocp.sim.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_where_torch_and_vllm_cannot_be_imported(tmp_path: Path) -> None:
    trace, out = write(tmp_path / "t.jsonl", load_of(40, 5.0)), tmp_path / "out.json"
    command = ["--trace", str(trace), "--ranks", "2", "--speed", "1,4", "--segment-size", "2048,65536", "--moves"]
    command += ["--prefill-gap", "200"]
    command += ["--systems", ",".join(SYSTEMS), "--capacity", "60000", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, *command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(out.read_text())["points"]
    assert [(p["load"], p["system"]) for p in points] == [
        (load, system)
        for load in ("1x", "4x")
        for system in ("nanocp 2048", "nanocp 65536", "stock", "round-robin", "tensor")
    ]
    for point in points:
        assert point["requests"] == 40 and all(math.isfinite(v) for v in point.values() if isinstance(v, int | float))
        assert f"{point['tpot_p50']:.1f}" in done.stdout
    assert "1x: nanocp" in done.stdout and "TPOT p99" in done.stdout


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        ("", [], "has no requests"),
        ("[1]", [], "line 1: '[1]' is not a JSON object"),
        ('{"at": 0, "prompt": 5}', [], "line 1: no 'output' or 'output_length'"),
        ('{"at": 0, "prompt": -5, "output": 1}', [], "line 1: prompt is -5; use a number of at least 1"),
        ('{"at": 0, "prompt": 5, "output": 1}\n{', [], "line 2: not JSON"),
        (None, [], "cannot be read"),
        ("ok", ["--ranks", "0"], "--ranks: '0'; use a whole number of at least 1"),
        ("ok", ["--systems", "magic"], "'magic'; use some of nanocp,stock"),
        ("ok", ["--max-degree", "3"], "--max-degree 3 is more than there are ranks; use at most 2"),
        ("ok", ["--ranks", "1"], "--ranks 1 leaves nanocp nothing to spread over"),
        ("ok", ["--chunk-tokens", "64", "--no-parallel-prefill"], "--chunk-tokens has no effect"),
        ("ok", ["--chunk-tokens", "64", "--max-degree", "1"], "--chunk-tokens has no effect"),
        ("ok", ["--decode-only", "--decode-share", "0.1"], "have no effect with --decode-only"),
        ("ok", ["--decode-only", "--prefill-gap", "200"], "have no effect with --decode-only"),
        ("ok", ["--coefficients", '{"speed": 2}'], "--coefficients has no 'speed'"),
        ("ok", ["--coefficients", '{"base": -2}'], "base is -2"),
        ("ok", ["--prefix-caching", "--block-size", "100"], "that divides 512"),
        ("ok", ["--max-num-batched-tokens", "8"], "is less than --max-num-seqs 256"),
        ("ok", ["--skip", "9"], "--skip 9 leaves nothing"),
        ("ok", ["--json", "/nowhere/file"], "/nowhere/file cannot be written"),
        ("[" * 100_000, [], "line 1: not JSON"),
        ("ok", ["--coefficients", "{"], "'{' is not JSON; use a JSON object"),
        ("ok", ["--coefficients", "[" * 100_000], "is not JSON; use a JSON object"),
        ("ok", ["--coefficients", '{"experts": 0}'], "experts is 0; use a whole number of at least 1"),
        ("ok", ["--coefficients", '{"kv_heads": 1.5}'], "kv_heads is 1.5; use a whole number of at least 1"),
        ("ok", ["--coefficients", '{"active": 200}'], "200 active experts of 128"),
        ("ok", ["--ranks", "99999999"], "--ranks 99999999 is more than can be simulated"),
        ("ok", ["--copies", "999999999"], "are too many"),
        ("ok", ["--rates", "1,1e12"], "are too many"),
        ("ok", ["--settle", "9"], "--settle 9 leaves no request of 1x to count"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str | None, change: list[str], says: str
) -> None:
    from vllm_nanocp.sim.__main__ import main

    trace = tmp_path / "t.jsonl"
    if line is not None:
        trace.write_text('{"at": 0, "prompt": 5, "output": 1}' if line == "ok" else line)
    assert main(["--trace", str(trace), "--ranks", "2", *change]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("vllm_nanocp.sim: ")]
    assert len(told) == 1 and says in told[0]


def test_a_plot_without_matplotlib_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_nanocp.sim.__main__ import main

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trace = write(tmp_path / "t.jsonl", load_of(5, 5.0))
    assert main(["--trace", str(trace), "--ranks", "2", "--plot", str(tmp_path / "p.svg")]) == 2
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_last_request_may_be_refused(system: str) -> None:
    requests = Requests(np.array([0.0, 50.0]), np.array([100, 10_000]), np.array([5, 5]))
    found = simulate(Run(MACHINE, 2, capacity=1024), system, requests)
    assert (found["refused"], found["requests"]) == (1, 1)
    none = simulate(Run(MACHINE, 2, capacity=1), system, requests)
    assert (none["refused"], none["requests"], none["tpot_p99"]) == (2, 0, None)


def test_figures_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", load_of(60, 60.0))
    command = [sys.executable, "-m", "vllm_nanocp.sim", "--trace", str(trace), "--ranks", "3", "--capacity", "24000"]
    command += ["--moves", "--noise", "0.05", "--segment-size", "2048", "--systems", ",".join(SYSTEMS)]
    said = [
        subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]


def test_requests_that_can_never_fit_are_refused_and_counted() -> None:
    requests = Requests(np.array([0.0, 1.0]), np.array([900, 100]), np.array([200, 10]))
    run = Run(MACHINE, 2, capacity=1024, slots=8, budget=1024)
    stock, plugin = (simulate(run, system, requests) for system in ("stock", "nanocp"))
    assert (stock["refused"], stock["requests"]) == (1, 1)
    assert (plugin["refused"], plugin["requests"]) == (0, 2) and plugin["sharded"] == 0.5
