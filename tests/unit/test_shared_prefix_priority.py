# SPDX-License-Identifier: Apache-2.0
"""With priorities, nobody waits for a less important request's prefix, nor for the room that one needs."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from vllm_nanocp.placement import Prefix, Run, ShardMap

from .scheduler_world import Device, Truth
from .test_shared_prefix import BLOCK, BLOCKS, Load, other, requests_of, shape, words
from .test_shared_prefix import config as config
from .world_shapes import vllm_config as vllm_config


class Queue:
    """Requests with priorities at two ranks, and the step in which each is answered first."""

    def __init__(self, config: Any, **sizes: Any) -> None:
        world = shape(priorities=True, max_reqs=64, **sizes)
        self.scheduler, self.truths = world.scheduler(config, False), {}
        self.device = Device(self.truths, 2, world.blocks + 1, BLOCK, 64, 2, 1, False)
        self.first: dict[str, int] = {}
        self.steps = 0

    def add(self, name: str, prompt: list[int], priority: int, outputs: int = 5) -> None:
        number = len(self.truths)
        self.truths[name] = Truth(number, prompt, outputs, 0, False)
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(
            Request(name, prompt, params, None, arrival_time=float(number), priority=priority, block_hasher=hasher)
        )

    def step(self) -> None:
        output = self.scheduler.schedule()
        for outputs in self.scheduler.update_from_output(output, self.device.execute(output)).values():
            for answer in outputs.outputs:
                self.first.setdefault(answer.request_id, self.steps)
        self.steps += 1


@pytest.mark.parametrize("parallel", [False, True])
def test_an_important_request_does_not_follow_another(config: Any, parallel: bool) -> None:
    """Others are between the two for as long as the load lasts, so that the less important one never comes on."""
    answered = {}
    for same in (False, True):
        queue, dice = Queue(config, blocks=2000, segment=512, parallel=parallel), random.Random(0)
        prompt = words(dice, 1500)
        while "important" not in queue.first and queue.steps < 80:
            for i in range(4):  # as much as two ranks compute in a step
                queue.add(f"load {queue.steps} {i}", words(dice, 300), 5, 1)
            if queue.steps == 3:
                queue.add("last", prompt, 9)
            if queue.steps == 6:
                queue.add("important", list(prompt) if same else words(dice, 1500), 0)
            queue.step()
        answered[same] = queue.first.get("important", queue.steps)
    assert answered[True] <= answered[False] + 1 < 80, answered


def test_room_is_not_kept_for_less_important_ones(config: Any) -> None:
    answered = {}
    for aside in (False, True):
        queue, dice = Queue(config, blocks=310, segment=256), random.Random(0)
        prompt = words(dice, 16000)
        queue.add("first", prompt, 9)
        for i in range(2):
            queue.add(f"follower {i}", prompt[:15900] + words(dice, 2500) if aside else words(dice, 100), 9)
        while "important" not in queue.first and queue.steps < 80:
            if queue.steps == 1:
                assert queue.scheduler.prefixes.num_set_aside == 2 * aside
                queue.add("important", words(dice, 1000), 0)
            queue.step()
        answered[aside] = queue.first.get("important", queue.steps)
    assert answered[True] <= answered[False] + 1 < 80, answered


@pytest.mark.parametrize("priorities", [False, True])
def test_room_is_asked_for_those_before_one_only(config: Any, priorities: bool) -> None:
    """However many are set aside, a placement looks at those whose turn is before, until there is no room left."""
    scheduler = shape(blocks=4 * BLOCKS, segment=1024, max_reqs=64, priorities=priorities).scheduler(config, False)
    dice = random.Random(7)
    stem = words(dice, 1400)
    load = Load([stem + words(dice, dice.randint(40, 400)) for _ in range(150)], [1] * 150)
    requests, _ = requests_of(load)
    for request in requests:
        request.priority = dice.randrange(3)
        scheduler.add_request(request)
    scheduler.schedule()
    prefixes = scheduler.prefixes
    aside = [follower for leader in prefixes._leaders.values() for follower in leader.followers.values()]
    assert len(aside) > 100
    looks, before = Counter[str](), prefixes._before

    def counted(*args: Any) -> bool:
        looks["asked"] += 1
        return bool(before(*args))

    prefixes._before = counted
    for number in range(200):
        arrival, blocks = dice.uniform(-5, 155), dice.randint(1, 60)
        late = other(f"late {number}", blocks * BLOCK)
        late.arrival_time, late.priority = arrival, dice.randrange(3)
        for rank in scheduler.ranks:
            rank.view.free_blocks = dice.randint(0, 700)
        free = sum(rank.view.free_blocks for rank in scheduler.ranks)
        taken = [f.own_blocks for f in aside if not before(late, f.request)]
        looks.clear()
        claimed = prefixes.claim(late, ShardMap(BLOCK, (Run(0, 0, blocks),)), Prefix())
        assert claimed == (bool(taken) and free < sum(taken) + blocks)
        assert looks["asked"] <= min(len(taken), max(0, free - blocks) // min([1, *taken]) + 1) + 2
        if not taken:
            assert looks["asked"] == 1
