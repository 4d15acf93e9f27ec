# SPDX-License-Identifier: Apache-2.0
"""On two GPUs, bfloat16: greedy tokens against stock vLLM on one. Eager with both model runners; V2 with graphs,
over both exchanges. On four GPUs: as many ranks, and two ranks of two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.harness import Engine

from . import FOUR_GPUS, SHARED, TWO_GPUS
from .beside_stock import all_partings, answers, check_partings, common, requests, with_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    TWO_GPUS,
]

GRAPHS = ("graphs", "parallel", "collective", "four", "tensor parallel")  # the modes with graphs
MODES = ("v2", "v1", "fp8", *GRAPHS)
ON_FOUR = ("four", "tensor parallel")


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
            args |= with_graphs(tensor_parallel=request.param == "tensor parallel")
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


def test_tokens(engines: tuple[str, Engine, Engine]) -> None:
    """bfloat16 runs part where candidates are close, also stock's own two with different batches: no more than that."""
    mode, stock, nanocp = engines
    asks = requests()
    theirs = answers(stock, asks)
    before = nanocp.status()["sharded_steps"]
    ours = answers(nanocp, asks)
    assert nanocp.status()["sharded_steps"] > before
    assert mode != "parallel" or nanocp.status()["parallel_parts"] > 100
    found = all_partings(mode, theirs, ours)
    nanocp.check_nothing_left()
    counters = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters"))
    print(f"{mode}: {counters}")
    for worker in counters:  # of 24 steps that decode, most hold no prefill beside it
        assert (worker["captured_steps"] > worker["sharded_steps"] / 4) == (mode in GRAPHS)
        assert (worker["routed_steps"] > worker["sharded_steps"] / 4) == (mode != "collective")
    check_partings(found)
