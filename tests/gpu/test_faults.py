# SPDX-License-Identifier: Apache-2.0
"""On two GPUs: a worker dies, or raises, while another waits for it on its GPU, where nothing but the end of its
process helps."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from vllm.v1.engine.exceptions import EngineDeadError

from tests.engine.harness import Ask, Engine, prompt

from . import TWO_GPUS
from .beside_stock import common

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    TWO_GPUS,
]

LIMIT_S = 60.0
SPARE_BYTES = 256 << 20


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]


class Failing:
    """Mixed into a worker (``worker_extension_cls``)."""

    shards: Any

    def fail(self, rank: int) -> None:
        """Raise in the next step, on one rank."""

        def update(plan: Any) -> None:
            raise RuntimeError("a failure that a test has asked for")

        if self.shards.rank == rank:
            self.shards.update = update


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "raises"])
@pytest.mark.parametrize("exchange", ["routed", "collective"])
def test_a_worker_fails(model: str, exchange: str, killed: bool) -> None:
    """The client is told, no process is left, and both GPUs' memory is free again. The request's home is the first
    rank, so the other one, which fails, has no tokens of its own."""
    before = free_bytes()
    added = dict(worker_extension_cls=f"{__name__}.Failing")
    engine = Engine(model, 2, {"segment_size": 600, "exchange": exchange}, **common(), **added)
    workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::Worker")]
    assert len(workers) == 2
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.ask, [Ask(prompt(5000, 1), dict(max_tokens=3000), rank=0)])
        while not engine.status()["sharded_steps"] > 20:
            assert not answer.done()
            time.sleep(0.1)
        if killed:
            workers[1].kill()
        else:
            engine.call(engine.llm.collective_rpc("fail", args=(1,)))
        with pytest.raises(EngineDeadError):
            answer.result(LIMIT_S)
    gone, alive = psutil.wait_procs(workers, LIMIT_S)
    assert len(gone) == 2, alive
    engine.close()
    end = time.monotonic() + LIMIT_S
    while any(now < was - SPARE_BYTES for now, was in zip(free_bytes(), before, strict=True)):
        assert time.monotonic() < end, (before, free_bytes())
        time.sleep(0.5)
