# SPDX-License-Identifier: Apache-2.0
"""With priorities, nobody waits for a less important request's prefix, nor for the room that one needs."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from .scheduler_world import Device, Truth
from .test_shared_prefix import BLOCK, shape, words
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
