# SPDX-License-Identifier: Apache-2.0
"""What a trainer sends arrives at the worker that it is for, with the numbers that stock data parallelism has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

from .harness import Engine

pytestmark = pytest.mark.engine


def test_each_worker_gets_its_own_weights(engines: Callable[..., Engine]) -> None:
    """Two ranks of two workers: vLLM numbers them over the ranks, and each takes its entry of the list."""
    engine = engines("tensor-parallel")
    sent = [{"for": worker} for worker in range(4)]
    engine.call(engine.llm.collective_rpc("expect_weights"))
    engine.call(engine.llm.update_weights(WeightTransferUpdateRequest(update_info=sent)))
    assert engine.call(engine.llm.collective_rpc("weights_that_came")) == [[entry] for entry in sent]


def test_workers_have_stock_numbers(engines: Callable[..., Engine]) -> None:
    """Stock has an executor for each data-parallel rank, whose workers it numbers from 0."""
    engine = engines("tensor-parallel")
    numbers = engine.call(engine.llm.collective_rpc("numbers"))
    assert [tuple(found) for found in numbers] == [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 0, 2), (1, 1, 1, 3)]


def test_the_size_of_the_world(engines: Callable[..., Engine]) -> None:
    """What ``LLM.get_world_size`` and ``/get_world_size`` read: over all ranks, and of one."""
    parallel = engines("tensor-parallel").llm.vllm_config.parallel_config
    assert (parallel.world_size_across_dp, parallel.world_size) == (4, 2)
