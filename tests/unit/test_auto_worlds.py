# SPDX-License-Identifier: Apache-2.0
"""``segment_size`` "auto" in the scheduler: random worlds, and graphs with room for few visits."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_nanocp.graph_capacities import visit_room
from vllm_nanocp.placement.auto import AUTO
from vllm_nanocp.sched.step_output import NanoCPSchedulerOutput

from .test_queue import Queue
from .world_shapes import MOVES, Ask, Shape, vllm_config  # noqa: F401
from .worlds import InMode, World, WorldError, in_mode  # noqa: F401

WORLDS = int(os.environ.get("NANOCP_AUTO_WORLDS", "3"))
# Visits between two ranks.
ROOM = 2


class AutoWorld(World):
    """Every request fits on one rank, so none has to be spread; graphs have room for few visits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scheduler.graph_room.room = ROOM
        execute = self.device.execute

        def checked(output: NanoCPSchedulerOutput) -> Any:
            visits = output.plan.most_visits(self.shape.ranks)
            if visits is not None and visits > ROOM:
                raise WorldError(f"{visits} visits between two ranks")
            self.counts["full"] += visits == ROOM
            return execute(output)

        self.device.execute = checked  # type: ignore[method-assign]

    def draw(self) -> list[Ask]:
        most = self.shape.blocks * self.shape.block_size - self.shape.block_size
        return [ask for ask in super().draw() if len(ask.truth.tokens) <= most]


def test_worlds(in_mode: InMode, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    drawn = Shape.draw

    def draw(rng: random.Random, seed: int) -> Shape:
        moves = (MOVES[0] | {"max_moves": 0}, MOVES[0], False)[seed % 3]
        return replace(drawn(rng, seed), segment=AUTO, moves=moves)

    monkeypatch.setattr(Shape, "draw", draw)
    counts: Counter[str] = in_mode.run(AutoWorld, WORLDS)
    assert counts["rows"] > 25 and counts["moves"] + counts["spills"] and counts["full"], counts


def test_who_may_not_move_is_not_asked_for(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where requests spill and do not move, as is the default on GPUs, uneven ranks cost a step nothing."""
    queue = Queue(vllm_config, moves={"max_moves": 0, "batch_margin": 0.0})
    for number in range(8):  # those on one rank end
        queue.add(f"r{number}", 20, 60 if number % 2 else 5)
    queue.step(10)
    for rank in queue.scheduler.ranks:
        monkeypatch.setattr(rank, "decoding", lambda: pytest.fail("walks over all requests"))
    queue.step(10)
    queue.end()


def test_visits_are_counted_once_for_all_that_ask(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Not again for each of many requests that wait because graphs have no room."""
    queue = Queue(vllm_config, segment=128, blocks=100)
    queue.scheduler.graph_room.room = 1
    for number in range(2):
        queue.add(f"sharded {number}", 200, 60)
    queue.step(4)
    graph_room, scheduler = queue.scheduler.graph_room, queue.scheduler
    assert len(scheduler.sharded) == 1
    counted: list[int] = []
    visits = graph_room.visits
    monkeypatch.setattr(graph_room, "visits", lambda: counted.append(scheduler.num_steps) or visits())
    shard_map = next(iter(scheduler.sharded.values())).shard_map
    for _ in range(5):
        assert not graph_room.has_room(shard_map)
    assert len(counted) == 1
    while scheduler.has_requests():
        queue.step()
    assert graph_room.has_room(shard_map)


def test_who_finds_no_room_for_visits_waits_at_no_rank(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It starts on one rank if all of it fits there now; else whichever comes first lets it start: room for all of it
    on one rank, or for its visits."""
    queue = Queue(vllm_config, segment=128)
    for number in range(4):  # two on each rank, of whose 40 blocks they have 16
        queue.add(f"small {number}", 120, 60)
    queue.step(2)
    scheduler = queue.scheduler
    monkeypatch.setattr(scheduler.placer, "_has_room", lambda _: False)
    queue.add("whole", 150, 2)
    queue.add("large", 400, 2)
    queue.step(4)
    assert queue.num_tokens["whole"] == 2 and not scheduler.sharded and list(scheduler.unplaced) == ["large"]
    monkeypatch.setattr(scheduler.placer, "_has_room", lambda _: True)
    queue.step()
    assert list(scheduler.sharded) == ["large"]
    queue.end()


@pytest.mark.parametrize(
    ("settings", "mode", "room"),
    [
        ({}, "FULL_AND_PIECEWISE", 64),
        ({"graph_capacities": [4, 16]}, "FULL", 16),
        ({"graph_capacities": []}, "FULL", None),
        ({"max_degree": 1}, "FULL", None),
        ({}, "NONE", None),
    ],
)
def test_the_room_is_that_of_the_graphs(
    vllm_config: Any,  # noqa: F811
    settings: dict[str, Any],
    mode: str,
    room: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.config.compilation import CUDAGraphMode

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    sizes = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=64, budget=512, segment=64, degree=2)
    rest = dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
    config = Shape(**sizes, **rest).config(vllm_config, False)  # type: ignore[arg-type]
    config.additional_config = {"nanocp": {"ranks": 2} | settings}
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", CUDAGraphMode[mode])
    monkeypatch.setattr(config.compilation_config, "cudagraph_capture_sizes", [1, 2, 4, 128])
    assert visit_room(config) == room


def test_who_lacked_only_visits_starts_when_another_ends(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Also behind one that waits for room, and where ranks have less room than when it was looked at."""
    queue = Queue(vllm_config, segment=256, blocks=100, budget=2048)
    scheduler = queue.scheduler
    queue.add("visits", 280, 12)
    queue.step(4)
    assert list(scheduler.sharded) == ["visits"]
    monkeypatch.setattr(scheduler.placer, "_has_room", lambda _: not scheduler.sharded)
    for number in range(2):
        queue.add(f"runs {number}", 250, 80)
    queue.add("all", 3100, 2)
    queue.add("large", 1500, 2)  # on one rank there is never so much room while these run
    queue.step()
    assert list(scheduler.unplaced) == ["all", "large"]
    for number in range(2):
        queue.add(f"more {number}", 200, 40)
    while "visits" in scheduler.requests:
        queue.step()
    assert list(scheduler.unplaced) == ["all", "large"]
    queue.step()
    assert list(scheduler.unplaced) == ["all"], "large has started"
    queue.end()


def test_who_lacked_only_visits_starts_when_another_stays(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One that was to leave would have visited; its move comes to nothing, which frees no block."""
    queue = Queue(vllm_config, segment=256, blocks=100, budget=2048, moves=MOVES[0] | {"max_moves": 0})
    scheduler, mover = queue.scheduler, queue.scheduler.mover
    for number in range(2):
        queue.add(f"runs {number}", 250, 80)
    queue.step(4)
    leaver, source = "runs 0", scheduler.rank_of["runs 0"]
    mover._states[leaver] = None  # of a generator, which never comes
    mover._leave(leaver, source, 1 - source)
    monkeypatch.setattr(scheduler.placer, "_has_room", lambda _: not mover.leaving)
    queue.add("all", 3100, 2)
    queue.add("large", 1500, 2)  # on one rank there is never so much room while these run
    queue.step(3)
    assert list(mover.leaving) == [leaver] and list(scheduler.unplaced) == ["all", "large"]
    mover.note_generators([leaver], {})
    queue.step()
    assert not mover.leaving and list(scheduler.unplaced) == ["all"], "large has started"
    queue.end()
