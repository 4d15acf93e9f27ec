# SPDX-License-Identifier: Apache-2.0
"""Requests that are decoded with drafts, on two GPUs: whole attention steps of several queries a row against float64,
and tokens of engines next to stock vLLM's with the same drafts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator

import pytest

from tests.engine.harness import Ask, Engine, prompt
from tests.unit.attention_steps import Kernel, run_scenarios
from tests.unit.flash_steps import flash_kernel
from tests.unit.processes import run_ranks

from . import TWO_GPUS
from .beside_stock import (
    LENGTHS,
    STEP,
    TIE,
    all_partings,
    answers,
    check_partings,
    common,
    in_spite_of,
    partings,
    with_graphs,
)
from .test_attention import MODES, OF_STOCK, RELATIVE, SHAPES, GraphForward, stock_flash

pytestmark = [pytest.mark.gpu, TWO_GPUS]

# Drafts a step.
MOST = 3
# Logprobs are sums of float32.
ROUNDED = 1e-4
# Of batches that graphs are captured for, in tokens: rows have one more than drafts.
GRAPH_SIZES = [4, 8, 16, 32, 64, 96, 128]
# Runner and schedule, method, whether with graphs, exchange.
ENGINES = {
    "v2-async": ("1", "ngram_gpu", False, "auto"),
    "v2-graphs": ("1", "ngram_gpu", True, "auto"),
    "v2-graphs-collective": ("1", "ngram_gpu", True, "collective"),
    # Of a model with latent attention.
    "latent-collective": ("1", "ngram_gpu", False, "collective"),
    "latent-graphs-collective": ("1", "ngram_gpu", True, "collective"),
    "latent-graphs": ("1", "ngram_gpu", True, "routed"),
    # Refused until it has been run: NANOCP_DRAFTS names it.
    "v1": ("0", "ngram", False, "auto"),
}
REFUSED = ("speculative decoding on GPUs (", "speculative decoding on GPUs with the V1")


def kernel_of(capacity: int, graph: bool, routed: bool, queries: int) -> Kernel:
    made = flash_kernel("cuda", capacity, 0 if routed and not graph else 16, routed, None, queries)
    made = dataclasses.replace(made, fill=1000.0, stock=stock_flash)
    return dataclasses.replace(made, forward=GraphForward(), replays=True) if graph else made


@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_error(mode: str, queries: int) -> None:
    """In most steps the plan counts drafts of the step before that were wrong."""
    groups = {
        f"{s.num_heads}x{s.num_kv_heads}x{s.head_size}": [(s, seed, seed % 9 != 8) for seed in range(900, 910)]
        for s in SHAPES[1:4]
    }
    kernel = functools.partial(kernel_of, *MODES[mode], queries)
    results = run_ranks(2, run_scenarios, groups, kernel, seconds=240, backend="nccl")
    for name in groups:
        totals = {key: sum(result[name][0].get(key, 0.0) for result in results) for key in ("norm", "ours", "stock")}
        ours, stock = (math.sqrt(totals[key] / totals["norm"]) for key in ("ours", "stock"))
        case = {"mode": mode, "queries": queries, "heads": name}
        print(json.dumps(case | {"relative_error": ours, "stock": stock, "ratio": ours / stock}))
        assert ours < RELATIVE and ours <= OF_STOCK * stock, name
        assert sum(result[name][0].get("sharded decode", 0) for result in results) >= 5, name


def params() -> list[str]:
    chosen = os.environ.get("NANOCP_DRAFTS")
    return chosen.split(",") if chosen else [name for name, (version, *_) in ENGINES.items() if version == "1"]


@pytest.fixture(scope="module", params=params())
def engines(request: pytest.FixtureRequest, model: str, deepseek: str) -> Iterator[tuple[str, Engine, Engine]]:
    """Stock and nanocp, both with drafts, run the same way."""
    version, method, graphs, exchange = ENGINES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", version)
        args, path = common() | dict(enforce_eager=not graphs), model
        if version == "0":
            args |= dict(async_scheduling=False)
            in_spite_of(patch, *REFUSED)
        if request.param.startswith("latent"):
            args, path = args | dict(attention_config={"backend": "FLASH_ATTN_MLA"}), deepseek
        if graphs:
            args |= with_graphs(GRAPH_SIZES)
        drafts = dict(method=method, num_speculative_tokens=MOST, prompt_lookup_min=1, prompt_lookup_max=3)
        stock = Engine(path, 1, **args, speculative_config=dict(drafts))
        config = {"segment_size": 600, "exchange": exchange}
        nanocp = Engine(path, 2, config, **args, speculative_config=dict(drafts))
    yield request.param, stock, nanocp
    stock.close()
    nanocp.close()


def test_tokens(engines: tuple[str, Engine, Engine]) -> None:
    """bfloat16 runs part where candidates are close, also stock's own two with different batches: no more than that."""
    mode, stock, nanocp = engines
    # Prompts that repeat, so that n-grams find drafts.
    asks = [
        Ask((prompt(max(1, n // 3), 50 + n + 7 * k) * 3)[:n], dict(max_tokens=32, logprobs=20), delay=0.01 * i)
        for k in range(3)
        for i, n in enumerate(LENGTHS)
    ]
    found = all_partings(mode, answers(stock, asks), answers(nanocp, asks))
    nanocp.check_nothing_left()
    counters = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters"))
    print(f"{mode}: {counters} {nanocp.status()}")
    graphs = "graphs" in mode
    for worker in counters:
        assert worker["sharded_steps"] > 0 and (worker["captured_steps"] > worker["sharded_steps"] / 4) == graphs
        assert (worker["routed_steps"] > worker["sharded_steps"] / 4) == ("collective" not in mode)
    check_partings(found, ROUNDED)


def check_grammar(nanocp: Engine, model: str, mode: str) -> None:
    """Requests keep to theirs. By tokens, not by text: after a prompt that ends with bytes that are no character,
    vLLM's text begins with the prompt."""
    from transformers import AutoTokenizer
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer = AutoTokenizer.from_pretrained(model)
    numbers = dict(type="array", items=dict(type="integer"), minItems=8, maxItems=12)
    wanted = dict(max_tokens=60, structured_outputs=StructuredOutputsParams(json=numbers), ignore_eos=False)
    for answer in nanocp.ask([Ask(prompt(n, 80 + n), wanted, delay=n / 1e4) for n in (20, 700, 1500, 3000)]):
        text = tokenizer.decode(answer.tokens[0], skip_special_tokens=True)
        print(f"{mode}: {answer.finish} {text!r}")
        assert answer.finish[0] in ("stop", "length") and set(text) <= set("[]0123456789-, \n\t\r"), (mode, text)
        assert answer.finish[0] == "length" or 8 <= len(json.loads(text)) <= 12, (mode, text)
    nanocp.check_nothing_left()


def test_structured_output(engines: tuple[str, Engine, Engine], model: str) -> None:
    """Grammars judge drafts that only the model runners have, also those of ranks without tokens in a step."""
    mode, _, nanocp = engines
    check_grammar(nanocp, model, mode)


@pytest.mark.parametrize("attention", ["grouped", "latent"])
def test_homes_move(attention: str, model: str, deepseek: str) -> None:
    """With margins so small that homes move all the time, and drafts in flight; tokens as stock's without drafts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        args, path = common() | dict(enforce_eager=True), model
        if attention == "latent":
            args, path = args | dict(attention_config={"backend": "FLASH_ATTN_MLA"}), deepseek
        moves = dict(batch_margin=0.0, kv_margin=0.0, min_steps_between=0, min_remaining_tokens=0, weigh_exchange=False)
        drafts = dict(method="ngram_gpu", num_speculative_tokens=MOST, prompt_lookup_min=1, prompt_lookup_max=3)
        stock = Engine(path, 1, **args)
        nanocp = Engine(path, 2, {"segment_size": 600, "moves": moves}, **args, speculative_config=drafts)
    try:
        asks = [
            Ask(prompt(n, 300 + n), dict(max_tokens=90, logprobs=20), delay=0.02 * i) for i, n in enumerate(LENGTHS)
        ]
        theirs, again = stock.ask(asks), [stock.ask([ask])[0] for ask in asks]
        ours = nanocp.ask(asks)
        nanocp.check_nothing_left()
        status = nanocp.status()
        allowed, gaps = partings(again, theirs), partings(ours, theirs)
        print(f"{attention}, moves: {status['moves']}; stock alone {allowed}, nanocp {gaps}")
        assert status["moves"] > 2
        assert len(gaps) <= 1.5 * len(allowed) + 3
        assert max(gaps, default=0.0) <= max([TIE, *allowed]) + 2 * STEP + ROUNDED
    finally:
        stock.close()
        nanocp.close()
