# SPDX-License-Identifier: Apache-2.0
"""Draft models on two GPUs: the error of their later forwards against float64, and tokens and drafts next to stock
vLLM's with the same head. V2's runner, eager and with CUDA graphs, over both exchanges. V1's runner, which is refused,
where ``NANOCP_MODEL_DRAFTS`` names it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.engine.harness import Answer, Ask, Engine, prompt
from tests.tiny_drafts import drafts, make_deepseek_v3, make_eagle, make_eagle3, make_first_order, make_glm4_moe
from tests.unit.attention_steps import Kernel, Shape
from tests.unit.flash_steps import flash_kernel
from tests.unit.processes import run_ranks
from tests.unit.test_model_drafts import later_forwards

from . import TWO_GPUS
from .beside_stock import Answers, all_partings, check_partings, common, in_spite_of, with_graphs
from .latent_steps import cuda_kernel
from .test_attention import OF_STOCK, RELATIVE, SHAPES, stock_flash
from .test_drafts import GRAPH_SIZES, MOST, ROUNDED, check_grammar
from .test_latent import HOPPER
from .test_latent import SHAPES as LATENT

pytestmark = [pytest.mark.gpu, TWO_GPUS]

SIZES = dict(head_dim=64, hidden_size=256, num_heads=8, num_kv_heads=2)
TOKENS = 24
# The last one ends with what any request may be.
LENGTHS = [20, 40, 511, 700, 1024, 1500, 2047, 3000, 5000, 8192 - TOKENS]


class Mode(NamedTuple):
    """Runner, method, whether with graphs, exchange."""

    runner: str
    method: str
    graphs: bool
    exchange: str


MODES = {
    "v2-collective": Mode("1", "eagle3", False, "collective"),
    "v2-routed": Mode("1", "eagle3", False, "routed"),
    "v2-graphs": Mode("1", "eagle3", True, "routed"),
    "v2-graphs-collective": Mode("1", "eagle3", True, "collective"),
    "v2-mtp": Mode("1", "mtp", False, "routed"),
    "v2-mtp-graphs": Mode("1", "mtp", True, "routed"),
    "v1": Mode("0", "eagle3", False, "collective"),
    "v2-eagle-graphs": Mode("1", "eagle", True, "routed"),
    "v2-latent-mtp": Mode("1", "latent mtp", False, "collective"),
    "v2-latent-mtp-graphs": Mode("1", "latent mtp", True, "routed"),
    "v2-latent-mtp-graphs-collective": Mode("1", "latent mtp", True, "collective"),
}
V1_IS_REFUSED = "speculative decoding on GPUs with the V1"


def refused(mode: Mode) -> tuple[str, ...]:
    """How those refusals begin that the mode is to be run in spite of."""
    return (V1_IS_REFUSED,) * (mode.runner == "0")


def on_gpu(capacity: int) -> Kernel:
    made = flash_kernel("cuda", capacity, 0, bool(capacity), None, 1)
    return dataclasses.replace(made, fill=1000.0, stock=stock_flash)


@pytest.mark.parametrize("capacity", [0, 12], ids=["collective", "routed"])
def test_error(capacity: int) -> None:
    kernel = functools.partial(on_gpu, capacity)
    results = run_ranks(2, later_forwards, range(900, 930), SHAPES[1:4], kernel, seconds=240, backend="nccl")
    totals: Counter[str] = sum((counts for _, counts in results), Counter())
    ours, stock = (math.sqrt(totals[key] / totals["norm"]) for key in ("ours", "stock"))
    print(json.dumps({"capacity": capacity, "relative_error": ours, "stock": stock, "ratio": ours / stock}))
    assert ours < RELATIVE and ours <= OF_STOCK * stock and totals["visiting"] > 10
    assert (totals["routed"] > 10) == bool(capacity), totals


def latent_on_gpu() -> Kernel:
    return cuda_kernel(dict(few=1000), staged=False)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("ranks", [1, 2])
def test_error_of_latent_attention(ranks: int) -> None:
    """Of one rank, it visits itself."""
    shapes: list[Shape] = [LATENT["16"], LATENT["128"]]
    results = run_ranks(ranks, later_forwards, range(900, 912), shapes, latent_on_gpu, seconds=240, backend="nccl")
    totals: Counter[str] = sum((counts for _, counts in results), Counter())
    ours, stock = (math.sqrt(totals[key] / totals["norm"]) for key in ("ours", "stock"))
    print(json.dumps({"ranks": ranks, "relative_error": ours, "stock": stock, "ratio": ours / stock}))
    assert ours < RELATIVE and ours <= OF_STOCK * stock and totals["visiting"] > 4


class Seen(NamedTuple):
    """Answers of requests together and one by one; drafts of those together, by the first tokens of a prompt and how
    many tokens the request had; how many drafts were right."""

    together: list[Answer]
    alone: list[Answer]
    drafts: dict[tuple[tuple[int, ...], int], list[int]]
    accepted: int


def see(engine: Engine) -> Seen:
    engine.call(engine.llm.collective_rpc("note_drafts"))
    asks = [Ask(prompt(n, 50 + n), dict(max_tokens=TOKENS, logprobs=20), delay=0.01 * i) for i, n in enumerate(LENGTHS)]
    together = engine.ask(asks)
    ranks = engine.call(engine.llm.collective_rpc("noted_drafts"))
    counts = sum(map(Counter, engine.call(engine.llm.collective_rpc("count_drafts"))), Counter[str]())
    made = {(tuple(stem), at): ids for rank in ranks for stem, at, ids in rank}
    return Seen(together, [engine.ask([ask])[0] for ask in asks], made, counts["accepted"])


@pytest.fixture(scope="module")
def models(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each method the target, and how it drafts."""
    folder = tmp_path_factory.mktemp("drafts")
    head = make_eagle3(folder / "eagle3", dtype="bfloat16", **SIZES)
    first_order = make_first_order(folder / "first order", dtype="bfloat16", **SIZES)
    eagle = make_eagle(folder / "eagle", dtype="bfloat16", **SIZES)
    mtp = make_glm4_moe(folder / "glm", dtype="bfloat16", **SIZES)
    sizes = dict(hidden_size=256, num_heads=16, qk_nope_head_dim=128, v_head_dim=128)
    latent = make_deepseek_v3(folder / "deepseek", dtype="bfloat16", **sizes)
    return {
        "eagle3": (model, drafts(head, "eagle3", MOST)),
        "eagle": (str(first_order), drafts(eagle, "eagle", MOST)),
        "mtp": (str(mtp), dict(method="mtp", num_speculative_tokens=MOST)),
        "latent mtp": (str(latent), dict(method="mtp", num_speculative_tokens=MOST)),
    }


def arguments(mode: Mode) -> dict[str, Any]:
    args = common() | dict(enforce_eager=not mode.graphs, worker_extension_cls="tests.engine.oracle.Oracle")
    if mode.method == "latent mtp":
        args |= dict(attention_config={"backend": "FLASH_ATTN_MLA"})
    if mode.graphs:
        args |= with_graphs(GRAPH_SIZES)
    return args | (dict(async_scheduling=False) if mode.runner == "0" else {})


@pytest.fixture(scope="module")
def stocks(models: dict[str, tuple[str, dict[str, Any]]]) -> Any:
    """What stock vLLM answers and drafts, once for all modes that run it the same way."""

    @functools.cache
    def stock(mode: Mode) -> Seen:
        path, speculation = models[mode.method]
        engine = Engine(path, 1, **arguments(mode), speculative_config=dict(speculation))
        try:
            return see(engine)
        finally:
            engine.close()

    return stock


def params() -> list[str]:
    chosen = os.environ.get("NANOCP_MODEL_DRAFTS")
    return chosen.split(",") if chosen else [name for name, mode in MODES.items() if not refused(mode)]


@pytest.fixture(scope="module", params=params())
def engines(
    request: pytest.FixtureRequest, models: dict[str, tuple[str, dict[str, Any]]], stocks: Any
) -> Iterator[tuple[str, Seen, Engine]]:
    """What stock vLLM did, and nanocp, both with the same drafts, run the same way."""
    mode = MODES[request.param]
    path, speculation = models[mode.method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", mode.runner)
        in_spite_of(patch, *refused(mode))
        theirs = stocks(mode._replace(exchange=""))
        config = {"segment_size": 600, "exchange": mode.exchange}
        nanocp = Engine(path, 2, config, **arguments(mode), speculative_config=dict(speculation))
    yield request.param, theirs, nanocp
    nanocp.close()


def same_drafts(ours: Seen, theirs: Seen) -> list[float]:
    """Of drafts made behind the same tokens, how many are the same, for each one of a step. Prints where they part."""
    known, parted = Counter[tuple[int, ...]](), []
    for n, a, b in zip(LENGTHS, ours.together, theirs.together, strict=True):
        alike = next((i for i, (x, y) in enumerate(zip(a.tokens[0], b.tokens[0], strict=True)) if x != y), TOKENS)
        known[tuple(prompt(n, 50 + n)[:16])] = n + alike
    both = [key for key in ours.drafts.keys() & theirs.drafts.keys() if key[1] <= known[key[0]]]
    for key in sorted(both, key=lambda key: key[1]):
        if ours.drafts[key] != theirs.drafts[key]:
            parted.append((known[key[0]], key[1], ours.drafts[key], theirs.drafts[key]))
    print(f"{len(both)} places of {len(ours.drafts)} and {len(theirs.drafts)}; (same until, at, ours, stock's):")
    for line in parted[:12]:
        print("   ", line)
    assert len(both) > 60  # of about 240: the answers of some methods part early
    return [sum(ours.drafts[key][i] == theirs.drafts[key][i] for key in both) / len(both) for i in range(MOST)]


def test_tokens(engines: tuple[str, Seen, Engine]) -> None:
    name, theirs, nanocp = engines
    ours = see(nanocp)
    counters = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters"))
    print(f"{name}: {counters} {nanocp.status()}")
    found = all_partings(name, Answers(theirs.together, theirs.alone), Answers(ours.together, ours.alone))
    same = same_drafts(ours, theirs)
    print(f"{name}: the same drafts {same}; accepted {ours.accepted}, by stock {theirs.accepted}")
    nanocp.check_nothing_left()
    mode = MODES[name]
    for worker in counters:
        steps = worker["sharded_steps"]
        assert steps > 0 and worker["sharded_drafts"] == MOST * steps
        assert (worker["captured_steps"] > steps / 4) == mode.graphs
        assert (worker["routed_steps"] > steps / 4) == (mode.exchange == "routed")
        routed = mode.exchange == "routed"
        assert (worker["routed_drafts"] > steps) == routed
        # Of each step that replays a graph all forwards, or the first one.
        captured = worker["captured_steps"]
        assert worker["captured_drafts"] >= MOST * captured if routed else worker["captured_drafts"] == captured
    check_partings(found, ROUNDED)
    # bfloat16 rounds otherwise over shards, and a random head's candidates are close.
    assert same[0] > 0.9 and min(same) > 0.75 if mode.method == "eagle3" else min(same) > 0.9, same
    assert ours.accepted >= 0.9 * theirs.accepted and (mode.method == "eagle3" or theirs.accepted > 50)


def test_structured_output(engines: tuple[str, Seen, Engine], models: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """See ``test_drafts.py``."""
    name, _, nanocp = engines
    check_grammar(nanocp, models[MODES[name].method][0], name)
