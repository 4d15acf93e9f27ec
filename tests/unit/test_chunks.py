# SPDX-License-Identifier: Apache-2.0
"""Short prompts beside long ones: when they get their first token, and what the long ones lose by it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_nanocp.placement.chunk_shares import PARTS

from .test_queue import Queue
from .test_scheduler_world import vllm_config  # noqa: F401

BUDGET, LONG = 512, 3800
SIZES: dict[str, Any] = dict(blocks=800, budget=BUDGET, segment=16384)


def with_long_prompts(config: Any, each: int = 1, **sizes: Any) -> Queue:
    """A long prompt is computed on both ranks, or more than one wait for it."""
    queue = Queue(config, **SIZES | sizes)
    for number in range(2 * each):
        queue.add(f"long {number}", LONG, 3)
    queue.step(2)
    assert all(len(rank.running) == 1 for rank in queue.scheduler.ranks)
    return queue


@pytest.mark.parametrize("each", [1, 2], ids=["behind one", "behind two"])
@pytest.mark.parametrize("priorities", [False, True])
def test_a_short_prompt_does_not_wait_for_a_long_one(
    vllm_config: Any,  # noqa: F811
    each: int,
    priorities: bool,
) -> None:
    """It comes to a rank at which one of eight more steps is computed, and perhaps another one waits."""
    queue = with_long_prompts(vllm_config, each, priorities=priorities)
    names = [f"short {i}" for i in range(4)]
    for name in names:
        queue.add(name, 60, 3, priority=-1)
    queue.step()
    assert all(queue.first[name] == queue.steps for name in names), queue.first
    queue.end()


def test_short_prompts_get_a_part_of_a_step(vllm_config: Any) -> None:  # noqa: F811
    """However many come; and all of them get their first token, each in its turn."""
    queue = with_long_prompts(vllm_config)
    for number in range(40):
        queue.add(f"short {number}", 100, 3)
    scheduler = queue.scheduler
    while not any(name.startswith("long") for name in queue.first):
        before = {name: scheduler.ranks[scheduler.rank_of[name]].requests[name] for name in ("long 0", "long 1")}
        computed = {name: request.num_computed_tokens for name, request in before.items()}
        left = {name: request.num_tokens - request.num_computed_tokens for name, request in before.items()}
        queue.step()
        for name, request in before.items():
            chunk = request.num_computed_tokens - computed[name]
            decodes = len(scheduler.ranks[scheduler.rank_of[name]].running)
            assert chunk >= min(BUDGET - BUDGET // PARTS - decodes, left[name]), chunk
    assert sum(name.startswith("short") for name in queue.first) >= 12
    queue.end()


def test_nothing_changes_without_short_prompts(vllm_config: Any) -> None:  # noqa: F811
    """The second long prompt waits for the first, as with vLLM."""
    queue = with_long_prompts(vllm_config, each=2)
    assert sorted(queue.scheduler.schedule().num_scheduled_tokens.values()) == [BUDGET] * 2


def test_nothing_is_kept_for_what_cannot_start(vllm_config: Any) -> None:  # noqa: F811
    """It waits for room that the long prompt has yet to take."""
    queue = with_long_prompts(vllm_config, blocks=241)
    for number in range(2):
        queue.add(f"short {number}", 120, 100)
    output = queue.scheduler.schedule()
    assert all(rank.waiting for rank in queue.scheduler.ranks)
    assert sorted(output.num_scheduled_tokens.values()) == [BUDGET] * 2


def test_a_size_set_by_the_user_stays(vllm_config: Any) -> None:  # noqa: F811
    queue = with_long_prompts(vllm_config, chunk=500)
    for number in range(2):
        queue.add(f"short {number}", 100, 3)
    assert sorted(queue.scheduler.schedule().num_scheduled_tokens.values()) == [12, 12, 500, 500]


@pytest.mark.parametrize("whole", [False, True])
def test_members_keep_their_chunks_where_ranks_compute_together(vllm_config: Any, whole: bool) -> None:  # noqa: F811
    """The next rank goes on in the same step where this one ends: half a chunk would cost it that step."""
    queue = Queue(vllm_config, **SIZES | dict(segment=2048, parallel={"chunk_tokens": BUDGET} if whole else True))
    queue.add("long", 4000, 3)
    queue.step(2)
    (sharded,) = queue.scheduler.sharded.values()
    before = sharded.num_computed_tokens
    for number in range(4):
        queue.add(f"short {number}", 60, 3)
    queue.step()
    stripe = (BUDGET - queue.shape.max_reqs if whole else BUDGET // 2) // 16 * 16
    assert sharded.num_computed_tokens - before == 2 * stripe
    queue.end()


@pytest.mark.parametrize("longs", [1, 2, 3])
def test_whole_chunks_of_several_leave_a_part(vllm_config: Any, longs: int) -> None:  # noqa: F811
    """Two halves of a step are all of it where nobody decodes yet: short prompts would wait until a long one ends."""
    queue = Queue(vllm_config, **SIZES | dict(blocks=2000, segment=2048, parallel=True))
    for number in range(longs):
        queue.add(f"long {number}", 6000, 3)
    queue.step(2)
    for number in range(4):
        queue.add(f"short {number}", 60, 3)
    before = queue.scheduler.sharded["long 0"].num_computed_tokens
    queue.step()
    assert all(queue.first[f"short {number}"] == queue.steps for number in range(4)), queue.first
    assert queue.scheduler.sharded["long 0"].num_computed_tokens - before == BUDGET // 2 * 2
    queue.end()


def test_a_sharded_prompt_has_its_turn_on_each_of_its_ranks(vllm_config: Any) -> None:  # noqa: F811
    """It comes to a rank anew with each of its runs; those that came later and run there do not take its steps."""
    queue = Queue(vllm_config, **SIZES | dict(segment=2048, parallel=True))
    queue.add("sharded", 4000, 3)
    queue.step()
    for number in range(6):
        queue.add(f"later {number}", 2000, 3)
    queue.step()
    (sharded,) = queue.scheduler.sharded.values()
    stripe = BUDGET // 2 // 16 * 16
    while not sharded.at_home:
        before = sharded.num_computed_tokens
        queue.step()
        assert sharded.num_computed_tokens - before >= min(2 * stripe, 4000 - before - stripe)
    queue.end()
    assert all(queue.first["sharded"] < queue.first[f"later {number}"] for number in range(6))


def test_a_prompt_of_middle_size_passes_a_long_one(vllm_config: Any) -> None:  # noqa: F811
    """It has the part for the shortest, though it needs more than one step of that."""
    queue = with_long_prompts(vllm_config)
    for number in range(2):
        queue.add(f"middle {number}", 300, 3)
    queue.step(4)
    assert {"middle 0", "middle 1"} <= queue.first.keys() and not {"long 0", "long 1"} & queue.first.keys()
    queue.end()


def test_prompts_go_where_few_are_to_be_computed(vllm_config: Any) -> None:  # noqa: F811
    """A rank that computes a long prompt has the smaller batch, and others would wait there, or make it slower."""
    queue = Queue(vllm_config, **SIZES)
    scheduler = queue.scheduler
    queue.add("long", LONG, 3)
    queue.step()
    for number in range(4):
        queue.add(f"short {number}", 200, 20)
        queue.step()
    there = {scheduler.rank_of[f"short {number}"] for number in range(4)}
    assert scheduler.rank_of["long"] not in there
    queue.end()


def test_prompts_do_not_go_where_a_sharded_one_is_still_to_come(vllm_config: Any) -> None:  # noqa: F811
    """Its next runs are work of their ranks, though nothing of it waits there yet."""
    queue = Queue(vllm_config, **SIZES | dict(ranks=3, segment=2048))
    queue.add("sharded", 4000, 3)
    queue.step()
    (sharded,) = queue.scheduler.sharded.values()
    held = {run.rank for run in sharded.shard_map.runs}
    assert len(held) == 2
    busy = [load.backlog > 0 for load in queue.scheduler.mover.loads()]
    assert busy == [rank in held for rank in range(3)]
    for number in range(2):
        queue.add(f"later {number}", 500, 3)
        queue.step()
    assert not held & {queue.scheduler.rank_of[f"later {number}"] for number in range(2)}
    queue.end()
