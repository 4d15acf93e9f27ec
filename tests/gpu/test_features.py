# SPDX-License-Identifier: Apache-2.0
"""What engines on CPU are tested with, or cannot be: adapters, weights of 8 bits, the policies that need no numbers.
V2's runner, CUDA graphs, bfloat16 activations: greedy tokens of two ranks next to stock vLLM's on one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.engine.harness import Ask, Engine
from tests.tiny_adapters import MODULES, RANK, make_adapter
from tests.tiny_models import make_deepseek_v2, make_qwen3_moe
from tests.tiny_quantized import quantize

from . import TWO_GPUS
from .beside_stock import (
    LENGTHS,
    Answers,
    all_partings,
    answers,
    check_partings,
    common,
    distance,
    requests,
    with_graphs,
)
from .modes import OF_STOCK
from .test_latent import HOPPER

pytestmark = [pytest.mark.gpu, pytest.mark.engine, TWO_GPUS]

SIZES = dict(head_dim=64, hidden_size=256, num_heads=8, num_kv_heads=2)
SHARDS = {"segment_size": 600}
# vLLM's own choice is FlashInfer's kernel, which is compiled for minutes.
FP8_EXPERTS = dict(moe_backend="triton")


class Feature:
    """How engines are started, and what each of a test's requests brings.

    Args:
        folder: empty.
        model: grouped-query attention, small.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.args: dict[str, Any] = {}
        self.config: dict[str, Any] = dict(SHARDS)
        self.exact = ""  # a model of the same weights in 16 bits: runs part by what 8 bits lose
        self.adapters: list[LoRARequest | None] = [None]


def adapters(to: Feature) -> None:
    """Steps with adapters attend outside of graphs."""
    made = [LoRARequest(f"adapter-{n}", n, str(make_adapter(to.folder / str(n), n, **SIZES))) for n in (1, 2, 3)]
    to.adapters += made
    to.args = dict(enable_lora=True, max_loras=2, max_lora_rank=RANK, lora_target_modules=list(MODULES))


def weights_of_8_bits(to: Feature) -> None:
    """With a scale a block. `--quantization fp8` makes one scale of a rank's batch, which vLLM's experts of several
    ranks cannot gather (vLLM 54683)."""
    to.model = quantize(make_qwen3_moe(to.folder / "blocks", dtype="bfloat16", moe_intermediate_size=256, **SIZES))
    to.args = dict(**FP8_EXPERTS)


def latent_weights_of_8_bits(to: Feature) -> None:
    """vLLM rounds the latents of prompts to 8 bits before it projects them; where they are held by shards, weights are
    widened instead."""
    sizes = dict(hidden_size=256, num_heads=16, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=128)
    inner = dict(moe_intermediate_size=256, dense_intermediate_size=256)
    made, exact = make_deepseek_v2(to.folder / "blocks", dtype="bfloat16", **sizes, **inner), to.folder / "exact"
    to.model, to.exact = quantize(made, exact), str(exact)
    to.args = dict(attention_config={"backend": "FLASH_ATTN_MLA"}, **FP8_EXPERTS)


def no_numbers(to: Feature) -> None:
    """With caches so small that the bounds of a shard's length let some of the requests be sharded."""
    to.config = {"segment_size": "auto", "moves": True, "prefill_gap": True}
    to.args = dict(num_gpu_blocks_override=700)


FEATURES: dict[str, Callable[[Feature], None]] = {
    "adapters": adapters,
    "fp8 weights": weights_of_8_bits,
    "latent fp8 weights": latent_weights_of_8_bits,
    "auto": no_numbers,
}


def params() -> list[Any]:
    chosen = os.environ.get("NANOCP_FEATURES")
    hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    return [
        pytest.param(name, marks=hopper if name.startswith("latent") else ())
        for name in (chosen.split(",") if chosen else FEATURES)
    ]


@pytest.fixture(scope="module", params=params())
def engines(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Feature, Engine, Engine]]:
    feature = Feature(tmp_path_factory.mktemp("feature"), model)
    FEATURES[request.param](feature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        args = common() | with_graphs() | feature.args
        stock = Engine(feature.model, 1, **args)
        nanocp = Engine(feature.model, 2, feature.config, **args)
    yield request.param, feature, stock, nanocp
    stock.close()
    nanocp.close()


def answers_of_exact_weights(feature: Feature, asks: list[Ask]) -> Answers:
    args = {key: value for key, value in feature.args.items() if key not in FP8_EXPERTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        engine = Engine(feature.exact, 1, **common() | with_graphs() | args)
    try:
        return answers(engine, asks)
    finally:
        engine.close()


def test_tokens(engines: tuple[str, Feature, Engine, Engine]) -> None:
    """As ``test_exact.py`` has it."""
    name, feature, stock, nanocp = engines
    asks = [
        dataclasses.replace(ask, adapter=feature.adapters[(i + i // len(LENGTHS)) % len(feature.adapters)])
        for i, ask in enumerate(requests())
    ]
    theirs, ours = answers(stock, asks), answers(nanocp, asks)
    found = all_partings(name, theirs, ours)
    nanocp.check_nothing_left()
    counters, status = nanocp.call(nanocp.llm.collective_rpc("nanocp_counters")), nanocp.status()
    print(f"{name}: {counters} {status}")
    for worker in counters:
        assert worker["sharded_steps"] > 0
        assert (worker["captured_steps"] > 0) == (name != "adapters")
    if len(feature.adapters) > 1:
        plain = stock.ask([Ask(ask.prompt, ask.params) for ask in asks])
        differ = sum(a.tokens != b.tokens for a, b in zip(theirs.together, plain, strict=True))
        assert differ > len(asks) / 3, "an adapter changes what a request says"
    if not feature.exact:
        check_partings(found)
        return
    exact = answers_of_exact_weights(feature, asks)
    for mine, stocks, other in zip(ours, theirs, exact, strict=True):
        found_here = distance(mine, other), distance(stocks, other)
        print(f"{name}: log-probabilities are {found_here} from those of exact weights, ours and stock's")
        assert found_here[0] <= OF_STOCK * found_here[1]
