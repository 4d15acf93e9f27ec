# SPDX-License-Identifier: Apache-2.0
"""On two GPUs, bfloat16: homes that move and ranks that spill, with async scheduling; tokens against stock on one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.engine.harness import RESTLESS, Ask, Engine, prompt

from . import TWO_GPUS
from .beside_stock import STEP, TIE, common, partings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    TWO_GPUS,
]


@pytest.fixture(scope="module", params=os.environ.get("NANOCP_RUNNERS", "v2,v1,graphs").split(","))
def engines(request: pytest.FixtureRequest, model: str) -> Iterator[tuple[Engine, Engine]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if request.param == "v1" else "1")
        args = common() | dict(enforce_eager=request.param != "graphs", max_model_len=4096)
        stock = Engine(model, 1, **args)
        # 2,400 tokens a rank: it runs out again and again.
        moving = Engine(model, 2, {"segment_size": 1024, "moves": RESTLESS}, **args | dict(num_gpu_blocks_override=151))
    yield stock, moving
    stock.close()
    moving.close()


def test_tokens(engines: tuple[Engine, Engine]) -> None:
    stock, moving = engines
    asks = [
        Ask(prompt(20 + 37 * i % 900, 300 + i), dict(max_tokens=100 + 9 * i % 70, logprobs=20), delay=0.02 * i)
        for i in range(40)
    ]
    for i in range(0, 40, 5):
        asks[i].params |= dict(repetition_penalty=1.1, seed=i)
    together, again = stock.ask(asks), stock.ask(asks[::-1])[::-1]
    ours = moving.ask(asks)
    moving.check_nothing_left()
    counts = moving.status()
    print({name: counts[name] for name in ("moves", "spills", "preemptions", "avoidable_preemptions")})
    assert counts["moves"] and counts["spills"]
    allowed, found = partings(again, together), partings(ours, together)
    print(f"stock parts from itself in {len(allowed)}, from nanocp in {len(found)} of {len(asks)}: {sorted(found)}")
    assert len(found) <= 1.5 * len(allowed) + 3
    # Logprobs are those before penalties, so they say nothing about the others.
    plain = [i for i, ask in enumerate(asks) if "seed" not in ask.params]
    allowed, found = (partings([x[i] for i in plain], [together[i] for i in plain]) for x in (again, ours))
    print(f"without penalties: stock's gaps {sorted(allowed)}, nanocp's {sorted(found)}")
    assert max(found, default=0.0) <= max([TIE, *allowed]) + 2 * STEP
