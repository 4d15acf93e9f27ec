# SPDX-License-Identifier: Apache-2.0
"""On two GPUs, bfloat16: greedy tokens against stock vLLM on one. Eager with both model runners; V2 with graphs,
over both exchanges. On four GPUs: as many ranks, and two ranks of two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.harness import Answer, Ask, Engine, prompt

from . import FOUR_GPUS, SHARED, TWO_GPUS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    TWO_GPUS,
]

# Where two bfloat16 runs part, both candidates are nearly as likely.
TIE = 0.05
# This model's logits are 8 to 16 in size, where neighbouring bfloat16 numbers are this far apart.
STEP = 0.0625
GRAPHS = ("graphs", "parallel", "collective", "four", "tensor parallel")  # the modes with graphs
MODES = ("v2", "v1", "fp8", *GRAPHS)
ON_FOUR = ("four", "tensor parallel")
LENGTHS = [1, 40, 511, 700, 1024, 1500, 2047, 3000, 5000, 7500]


def common() -> dict[str, Any]:
    # So little memory that other programs' use of the GPU, and its changes, do not matter.
    memory = dict(gpu_memory_utilization=0.03, kv_cache_memory_bytes=1 << 30)
    # FlashInfer's search for its fastest kernels takes 40 s of a start.
    return dict(
        dtype="bfloat16", block_size=16, num_gpu_blocks_override=8192, enable_flashinfer_autotune=False, **memory
    )


def mode_params() -> list[Any]:
    chosen = os.environ["NANOCP_RUNNERS"].split(",") if "NANOCP_RUNNERS" in os.environ else MODES
    return [pytest.param(mode, marks=FOUR_GPUS if mode in ON_FOUR else ()) for mode in chosen]


@pytest.fixture(scope="module", params=mode_params())
def engines(request: pytest.FixtureRequest, model: str) -> Iterator[tuple[str, Engine, Engine]]:
    """Stock and nanocp, run the same way: compiled code rounds otherwise than eager code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0" if request.param == "v1" else "1")
        graphs = request.param in GRAPHS
        args = common() | dict(enforce_eager=not graphs)
        if graphs:
            sizes = [1, 2, 4, 8, 16, 24, 32]
            # Without the pass, which has FlashInfer compile its all-reduce for minutes.
            passes = {"fuse_allreduce_rms": False} if request.param == "tensor parallel" else {}
            args |= dict(compilation_config={"cudagraph_capture_sizes": sizes, "pass_config": passes})
        if request.param == "tensor parallel":
            args |= dict(tensor_parallel_size=2, disable_custom_all_reduce=SHARED)
        if request.param == "fp8":
            args |= dict(kv_cache_dtype="fp8")
        stock = Engine(model, 1, **args)
        if graphs:  # vLLM's own check of its workers' steps
            patch.setenv("VLLM_GPU_SYNC_CHECK", "error")
        exchange = "collective" if request.param == "collective" else "auto"
        config = {"segment_size": 600, "exchange": exchange, "parallel_prefill": request.param == "parallel"}
        nanocp = Engine(model, 4 if request.param == "four" else 2, config, **args)
    yield request.param, stock, nanocp
    stock.close()
    nanocp.close()


def partings(mine: list[Answer], stocks: list[Answer]) -> list[float]:
    """For each request whose tokens part from stock's: how much likelier stock's token was than the other's."""
    gaps = []
    for answer, other in zip(mine, stocks, strict=True):
        a, b = answer.tokens[0], other.tokens[0]
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            there = other.logprobs[0][at]
            gaps.append(abs(there[b[at]].logprob - there[a[at]].logprob) if a[at] in there else float("inf"))
    return gaps


def all_partings(
    mode: str, stocks: tuple[list[Answer], list[Answer]], ours: tuple[list[Answer], list[Answer]]
) -> dict[str, list[float]]:
    """What parts, printed: first stock from itself. Of each system the requests together, and one by one."""
    (together, alone), (ours_together, ours_alone) = stocks, ours
    found = {
        "stock alone - together": partings(alone, together),
        "nanocp together - stock together": partings(ours_together, together),
        "nanocp alone - stock alone": partings(ours_alone, alone),
    }
    for name, gaps in found.items():
        print(f"{mode}: {name}: {len(gaps)} of {len(alone)} part, gaps {sorted(round(g, 3) for g in gaps)}")
    return found


def check_partings(found: dict[str, list[float]], rounded: float = 0.0) -> None:
    """Ours part from stock's about as often as stock from itself, and where candidates are as close.

    Args:
        found: see ``all_partings``.
        rounded: that a gap may be off.
    """
    allowed = found["stock alone - together"]
    for name in list(found)[1:]:
        assert len(found[name]) <= 1.5 * len(allowed) + 3, name
        assert max(found[name], default=0.0) <= max([TIE, *allowed]) + 2 * STEP + rounded, name


def test_tokens(engines: tuple[str, Engine, Engine]) -> None:
    """bfloat16 runs part where candidates are close, also stock's own two with different batches: no more than that."""
    mode, stock, nanocp = engines
    asks = [
        Ask(prompt(n, 50 + n + 7 * k), dict(max_tokens=24, logprobs=20), delay=0.01 * i)
        for k in range(2 if SHARED else 4)  # shared GPUs take turns
        for i, n in enumerate(LENGTHS)
    ]
    together, alone = stock.ask(asks), [stock.ask([ask])[0] for ask in asks]
    before = nanocp.status()["sharded_steps"]
    ours, ours_alone = nanocp.ask(asks), [nanocp.ask([ask])[0] for ask in asks]
    assert nanocp.status()["sharded_steps"] > before
    assert mode != "parallel" or nanocp.status()["parallel_parts"] > 100
    found = all_partings(mode, (together, alone), (ours, ours_alone))
    nanocp.check_nothing_left()
    counters = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters"))
    print(f"{mode}: {counters}")
    for worker in counters:  # of 24 steps that decode, most hold no prefill beside it
        assert (worker["captured_steps"] > worker["sharded_steps"] / 4) == (mode in GRAPHS)
        assert (worker["routed_steps"] > worker["sharded_steps"] / 4) == (mode != "collective")
    check_partings(found)
