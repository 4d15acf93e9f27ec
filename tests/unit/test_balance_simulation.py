# SPDX-License-Identifier: Apache-2.0
"""The simulation of batches and KV: nothing lost, and placement with moves keeps ranks even where turns do not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import balance_simulation
from benchmarks.simulated_load import POLICIES, Arrivals, Scenario, replay
from benchmarks.simulated_ranks import Simulation
from vllm_nanocp.placement import prefix
from vllm_nanocp.placement.moves import MoveConfig

RANKS = 8
WORLD = Scenario(ranks=RANKS, rate=1.0, capacity=60_000, segment_size=2048, chunk=1024, warm_up=0.3)


def arrivals(requests: int, per_second: float, seed: int = 0) -> Arrivals:
    """Prompts with a long tail, as they are in life; a few of many times the usual length."""
    dice = np.random.default_rng(seed)
    return Arrivals(
        np.cumsum(dice.exponential(1 / per_second, requests)),
        np.minimum(dice.lognormal(6.5, 1.2, requests), 20_000).astype(np.int64) + 1,
        dice.integers(1, 400, requests),
    )


def check(simulation: Simulation) -> None:
    """The counts that the simulation keeps are those of what each request holds."""
    s, held = simulation, simulation.held
    decoding = s.decoding
    assert (s.used == held.sum(axis=0) - s.shared).all() and s.used.max() <= s.blocks
    assert (s.read == held[decoding].sum(axis=0)).all()
    visits = held[decoding] > 0
    visits[np.arange(len(decoding)), s.home[decoding]] = False
    assert (s.guests == visits.sum(axis=0)).all()
    admitted = s.home >= 0
    assert (s.homes == np.bincount(s.home[admitted], minlength=s.s.ranks)).all()
    assert s.computing.sum() == admitted.sum() and s.computing.min() >= 0
    # A decoding request has a block for each token it has, or its last one is full.
    assert (held[decoding].sum(axis=1) == -(-s.length[decoding] // s.s.block_size)).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [200_000, 24_000])
def test_every_request_ends_and_every_block_comes_back(policy: str, capacity: int) -> None:
    """Also where the ranks are too small, so that requests wait, spill and are preempted."""
    load = arrivals(300, 60.0)
    simulation = Simulation(Scenario(ranks=4, rate=1.0, capacity=capacity, segment_size=2048, chunk=1024), load, policy)
    tight = False
    while simulation.finished < len(load.at):
        simulation.advance()
        check(simulation)
        tight |= any(simulation.queues)
    assert tight == (capacity < 200_000)
    assert not simulation.held.any() and not simulation.used.any() and not simulation.guests.any()
    assert not simulation.homes.any() and not simulation.computing.any() and not len(simulation.decoding)
    assert (simulation.length == simulation.end).all()
    assert sum(simulation.degrees.values()) == len(load.at)
    if policy == "round_robin":
        assert set(simulation.degrees) == {1}


def with_prefixes(load: Arrivals, conversations: int, seed: int = 0) -> Arrivals:
    """Each request belongs to a conversation, of which some are far more popular; one block is common to all."""
    dice = np.random.default_rng(seed)
    hashes = []
    for n in load.prompt.tolist():
        talk = int(conversations * dice.random() ** 3)
        known = int(dice.integers(0, n // 512 + 1))
        fresh = int(dice.integers(10**6, 10**9))
        hashes.append((0, *(1000 * (talk + 1) + i if i < known else fresh + i for i in range(n // 512))))
    return replace(load, hashes=tuple(hashes))


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_prefixes_are_counted_once_and_come_back(policy: str) -> None:
    load = with_prefixes(arrivals(300, 60.0), 20)
    simulation = Simulation(replace(WORLD, ranks=4, capacity=40_000, prefixes=True), load, policy)
    while simulation.finished < len(load.at):
        simulation.advance()
        check(simulation)
    assert simulation.caches is not None
    assert not simulation.used.any() and not simulation.shared.any()
    assert not any(simulation.caches.refs) and any(simulation.caches.idle)
    assert 0.02 < simulation.figures()["cached_prompt"] < 0.9


def test_popular_prefixes_do_not_draw_everything_to_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # A rank here is a nineteenth of a real one, and so are the tokens whose reading does not count.
    monkeypatch.setattr(prefix, "KV_SLACK_TOKENS", prefix.KV_SLACK_TOKENS * WORLD.capacity // 1_130_656)
    load = with_prefixes(arrivals(1200, 50.0), 40)
    figures = {p: Simulation(replace(WORLD, prefixes=True), load, p).run().figures() for p in POLICIES}
    assert figures["moves"]["kv_ratio"] <= 1.25 and figures["moves"]["batch_ratio"] <= 1.25
    assert figures["moves"]["kv_read_ratio"] < 1.25 < figures["round_robin"]["kv_read_ratio"]
    assert figures["moves"]["cached_prompt"] > 0.02


def test_moves_and_placement_keep_the_ranks_even() -> None:
    load = arrivals(1200, 50.0)
    figures = {p: Simulation(WORLD, load, p).run().figures() for p in POLICIES}
    moves, placed, turns = figures["moves"], figures["placed"], figures["round_robin"]
    assert moves["mean_batch"] > 8 and 0.2 < moves["mean_usage"] < 0.9
    assert moves["kv_ratio"] <= 1.15 < turns["kv_ratio"]
    assert moves["batch_ratio"] <= 1.25
    assert moves["batch_ratio"] < min(placed["batch_ratio"], turns["batch_ratio"])
    assert moves["moves_per_1000_steps"] > 0 == placed["moves_per_1000_steps"]
    assert moves["model_error"] < 0.05


@pytest.mark.parametrize("reserve", [0, 4])
def test_spills_or_a_reserve_replace_preemptions(reserve: int) -> None:
    """Ranks that are nearly full."""
    load = arrivals(500, 150.0, seed=2)
    tight = Scenario(ranks=4, rate=1.0, capacity=24_000, segment_size=2048, chunk=1024, warm_up=0.1)
    tight = replace(tight, moves=MoveConfig(reserve_blocks=reserve))
    moves, placed = (Simulation(tight, load, policy) for policy in ("moves", "placed"))
    while moves.finished < len(load.at):
        moves.advance()
        check(moves)
    placed.run()
    few, many = moves.figures(), placed.figures()
    assert few["mean_usage"] > 0.85
    assert few["preemptions_per_1000_steps"] * 5 < many["preemptions_per_1000_steps"]
    assert (few["spills_per_1000_steps"] > 50) == (reserve == 0)


def test_a_replay_keeps_every_request_and_the_rate() -> None:
    trace = arrivals(50, 1.0)
    again = replay(trace, rate=10.0, copies=3)
    assert len(again.at) == 150 and (np.diff(again.at) >= 0).all()
    assert sorted(again.prompt) == sorted(np.tile(trace.prompt, 3))
    assert len(again.at) / again.at[-1] == pytest.approx(10 * len(trace.at) / trace.at[-1], rel=0.1)


def test_the_command_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = arrivals(60, 5.0)
    lines = [
        json.dumps({"timestamp": 1e3 * at, "input_length": int(n), "output_length": int(m)})
        for at, n, m in zip(load.at, load.prompt, load.output, strict=True)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    command = ["balance_simulation.py", "--trace", str(tmp_path / "trace.jsonl"), "--ranks", "2", "--rate", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    balance_simulation.main()
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert set(result["scenarios"]["2 ranks"]["policies"]) == set(POLICIES)
    assert result["trace"]["requests"] == 60
