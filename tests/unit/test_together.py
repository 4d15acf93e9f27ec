# SPDX-License-Identifier: Apache-2.0
"""All features at once, in random worlds: sessions, adapters, moves, prefill steps, "auto" segments, few visits that
graphs have room for; and drafts with them."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_nanocp.placement.auto import AUTO
from vllm_nanocp.placement.prefill_steps import PrefillGap
from vllm_nanocp.sched import pacing
from vllm_nanocp.sched.pacing import Pacing

from .test_adapters import AdapterWorld
from .test_speculation import DraftedWorld
from .world_shapes import MOVES, Shape, vllm_config
from .worlds import InMode, in_mode, run_worlds

__all__ = ["in_mode", "vllm_config"]

# Worlds of each mode; more of them look further.
WORLDS = int(os.environ.get("NANOCP_TOGETHER_WORLDS", "1"))
# So many show all that they are for.
MANY = 10


class Together(AdapterWorld):
    """Sessions with adapters, whose prompts are computed in prefill steps, and whose visits may find no room."""

    def __init__(self, vllm_config: Any, seed: int, *args: Any) -> None:
        super().__init__(vllm_config, seed, *args)
        pacing.time = self  # type: ignore[attr-defined]
        gap = PrefillGap(ms=(11.0, 12.0, 20.0)[seed % 3], decode_steps=seed % 4, fill=(seed % 2) / 2, late_ms=seed % 50)
        scheduler = self.scheduler
        scheduler.pacing = Pacing(gap, scheduler.ranks)
        scheduler.graph_room.room = (1, 2, None)[seed % 3]
        begin = scheduler.pacing.begin

        def begun(*args: Any) -> Any:
            allowed = begin(*args)
            self.counts["decode steps"] += allowed is not None and allowed[0] == 0
            return allowed

        scheduler.pacing.begin = begun  # type: ignore[method-assign]


class Drafted(DraftedWorld, Together):
    """The same with drafts. Both kinds of worlds call what they may have at most ``most``."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        super().__init__(vllm_config, *args)
        self.adapters = self.most
        self.most = random.Random(args[0]).choice([1, 3])

    def check(self, *args: Any) -> None:
        drafts, self.most = self.most, self.adapters
        super().check(*args)
        self.most = drafts


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other world cuts by itself, three of four have moves, one of these no more than spills."""
    draw = Shape.draw
    monkeypatch.setattr(pacing, "time", pacing.time)  # the worlds' own is taken back

    def drawn(rng: random.Random, seed: int) -> Shape:
        moves = (MOVES[0] | {"max_moves": 0}, MOVES[0], False, MOVES[0])[seed % 4]
        shape = draw(rng, seed)
        return replace(shape, segment=AUTO if seed % 2 else shape.segment, moves=moves)

    monkeypatch.setattr(Shape, "draw", drawn)


def check(counts: Counter[str]) -> None:
    """Enough worlds have all of it."""
    wanted = ("moves", "spills", "preemptions", "full ranks", "decode steps", "aborts", "resets")
    assert WORLDS < MANY or all(counts[kind] for kind in wanted), counts


def test_worlds(in_mode: InMode) -> None:
    check(in_mode.run(Together, WORLDS))


@pytest.mark.parametrize("version", [1, 2])
def test_drafts(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    counts = run_worlds(Drafted, vllm_config, version, False, WORLDS, monkeypatch)
    check(counts)
    assert WORLDS < MANY or counts["accepted"], counts
