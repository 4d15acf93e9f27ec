# SPDX-License-Identifier: Apache-2.0
"""Nothing keeps a request waiting for ever: neither one that can have room nowhere, nor a leaving that is undone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from .scheduler_world import Device, Truth
from .world_shapes import Shape, vllm_config  # noqa: F401


class Ranks:
    """Two ranks with a scheduler, and what their clients are answered."""

    def __init__(self, vllm_config: Any, **sizes: Any) -> None:  # noqa: F811
        base = dict(seed=0, ranks=2, block_size=16, blocks=30, max_reqs=8, budget=512, segment=4096, degree=2)
        base |= dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
        self.shape = Shape(**{**base, **sizes})  # type: ignore[arg-type]
        self.scheduler = self.shape.scheduler(vllm_config, False)
        self.truths: dict[str, Any] = {}
        self.device = Device(self.truths, 2, self.shape.blocks + 1, 16, self.shape.max_reqs, 2, 1, False)
        self.tokens: Counter[str] = Counter()
        self.ends: dict[str, FinishReason] = {}

    def add(self, name: str, length: int, outputs: int, seeded: bool = False, **params: Any) -> None:
        number = len(self.truths)
        truth = Truth(number, [10 + number] * length, outputs, salt=1 + number, stops=False)
        truth.seeded = seeded
        self.truths[name] = truth
        settings = SamplingParams(max_tokens=outputs, **params)
        self.scheduler.add_request(Request(name, list(truth.tokens[:length]), settings, None))

    def step(self) -> None:
        output = self.scheduler.schedule()
        for outputs in self.scheduler.update_from_output(output, self.device.execute(output)).values():
            for answer in outputs.outputs:
                self.tokens[answer.request_id] += len(answer.new_token_ids)
                if answer.finish_reason is not None:
                    self.ends[answer.request_id] = answer.finish_reason

    def run(self, limit: int = 1000) -> None:
        steps = 0
        while self.scheduler.has_requests():
            steps += 1
            assert steps <= limit, (self.scheduler.get_request_counts(), dict(self.tokens))
            self.step()
        assert self.scheduler.free_blocks() == [self.shape.blocks] * 2
        assert not self.scheduler.unplaced and not self.scheduler.rank_of and not self.scheduler.waiting


WHOLE: dict[str, Any] = dict(prompt_logprobs=1)  # stays on one rank


@pytest.mark.parametrize(
    ("length", "params", "sizes"),
    [
        (700, WHOLE, {}),
        (700, WHOLE, dict(moves=True, reserve=4)),
        (1000, {}, {}),
        (1000, {}, dict(segment=64, parallel=True)),
        (700, {}, dict(degree=1)),
        (960, {}, dict(segment=64)),  # fits to the last block, and is to make a token more
    ],
)
def test_what_has_room_nowhere_ends_with_an_error(
    vllm_config: Any,  # noqa: F811
    length: int,
    params: dict[str, Any],
    sizes: dict[str, Any],
) -> None:
    ranks = Ranks(vllm_config, **sizes)
    ranks.add("first", 40, 3)
    ranks.step()
    ranks.add("big", length, 5, **params)
    for number in range(8):
        ranks.add(f"r{number}", 40, 3)
    ranks.run()
    assert ranks.ends.pop("big") == FinishReason.ERROR and not ranks.tokens["big"]
    assert len(ranks.ends) == 9 and set(ranks.ends.values()) == {FinishReason.LENGTH}


@pytest.mark.parametrize("length", [100, 450, 480])
def test_what_outgrows_its_rank_ends_with_an_error(vllm_config: Any, length: int) -> None:  # noqa: F811
    """Admitted, since its prompt fits, and preempted once it has filled its rank; the model runner knows it then."""
    ranks = Ranks(vllm_config)
    ranks.add("big", length, 900, **WHOLE)
    for number in range(8):
        ranks.add(f"r{number}", 40, 3)
    ranks.run()
    assert ranks.ends.pop("big") == FinishReason.ERROR and ranks.tokens["big"] == 481 - length
    assert len(ranks.ends) == 8 and set(ranks.ends.values()) == {FinishReason.LENGTH}


def test_what_fits_empty_ranks_waits(vllm_config: Any) -> None:  # noqa: F811
    ranks = Ranks(vllm_config, segment=64)
    ranks.add("first", 400, 30)
    ranks.step()
    ranks.add("big", 950, 5)
    ranks.add("whole", 470, 5, **WHOLE)
    ranks.run()
    assert set(ranks.ends.values()) == {FinishReason.LENGTH} and ranks.tokens["big"] == 5


def test_an_aborted_one_is_not_answered(vllm_config: Any) -> None:  # noqa: F811
    ranks = Ranks(vllm_config)
    ranks.add("big", 700, 5, **WHOLE)
    ranks.scheduler.finish_requests("big", RequestStatus.FINISHED_ABORTED)
    ranks.run()
    assert not ranks.ends


def test_greedy_requests_with_a_seed_spill(vllm_config: Any) -> None:  # noqa: F811
    """V1's model runner makes no generator for them."""
    ranks = Ranks(vllm_config, moves=True)
    for name, length, outputs in (("a", 200, 150), ("b", 260, 60), ("c", 200, 150)):
        ranks.add(name, length, outputs, temperature=0.0, seed=1)
        ranks.step()
    ranks.run()
    assert ranks.scheduler.mover.num_spills > 0
    assert ranks.tokens == {"a": 150, "b": 60, "c": 150}


def test_a_leaving_that_is_undone_is_not_tried_again_without_progress(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers that never report a generator: nobody spills, and vLLM preempts instead."""
    ranks = Ranks(vllm_config, moves=True)
    monkeypatch.setattr(ranks.device, "_generators", lambda runner, departing: {})
    for name, length, outputs in (("a", 200, 150), ("b", 260, 60), ("c", 200, 150)):
        ranks.add(name, length, outputs, seeded=True, temperature=0.9, seed=1)
        ranks.step()
    ranks.run()
    assert ranks.tokens == {"a": 150, "b": 60, "c": 150}
    assert ranks.scheduler.num_preemptions > 0 and ranks.device.num_arrivals == 0
