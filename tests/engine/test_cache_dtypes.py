# SPDX-License-Identifier: Apache-2.0
"""``--kv-cache-dtype`` on CPU: sharded requests end as in stock vLLM. And what shards would change is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_models import make_granite_moe

from .harness import Ask, Engine, prompt

pytestmark = pytest.mark.engine

SIZES = dict(num_gpu_blocks_override=512, max_model_len=4096)
NANOCP = {"segment_size": 128}
# On one rank, on two; one that spans the shards of a chunked prompt; one that grows into a second block.
ASKS = [Ask(prompt(n, n), dict(max_tokens=12)) for n in (40, 300, 650, 991)]


# An engine each, which starts slowly; ``unit/test_cache_dtypes.py`` has all types against a reference.
DTYPES = ["fp8", "bfloat16"] if os.environ.get("NANOCP_CACHE_DTYPES") == "all" else ["fp8"]


@pytest.fixture(params=DTYPES)
def answers(request: pytest.FixtureRequest, tiny_model: str) -> Iterator[tuple[list[list[int]], ...]]:
    """Tokens of stock vLLM and of sharded requests.

    In float32, stock vLLM writes behind a cache of 16 bits: there the first tokens of a cache of the model's type are
    what is compared with, before rounding leads elsewhere.
    """
    engine = Engine(tiny_model, 2, NANOCP, **SIZES, kv_cache_dtype=request.param)
    ours = [answer.tokens[0] for answer in engine.ask(ASKS)]
    sharded = len(engine.status()["finished"])
    engine.check_nothing_left()
    engine.close()
    assert sharded == 3
    if request.param == "fp8":
        stock = Engine(tiny_model, 1, **SIZES, kv_cache_dtype="fp8")
        yield [answer.tokens[0] for answer in stock.ask(ASKS)], ours
        stock.close()
    else:
        stock = request.getfixturevalue("stock")
        yield [answer.tokens[0][:3] for answer in stock.ask(ASKS)], [tokens[:3] for tokens in ours]


def test_sharded_requests_with_another_cache_dtype(answers: tuple[list[list[int]], ...]) -> None:
    expected, ours = answers
    assert ours == expected


@pytest.mark.skipif(
    len(DTYPES) < 2, reason="one more engine: NANOCP_CACHE_DTYPES=all; unit/test_supported.py has its kind"
)
def test_sinks_are_refused_when_the_model_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No name in the configuration gives them away before."""
    model = make_granite_moe(tmp_path / "sinks", sinks=True, num_layers=2)
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        Engine(str(model), 2, NANOCP, **SIZES)
    output = "".join(capfd.readouterr())
    said = {line.split("NanoCPConfigError: ")[1] for line in output.splitlines() if "NanoCPConfigError: " in line}
    assert said == {
        "nanocp: attention sinks (model.layers.0.self_attn.attn and 1 more) with max_degree above 1 is not supported: "
        "partial results over shards would not be those of the whole; use --nanocp-config '{\"max_degree\": 1}' to "
        "serve it with one scheduler and no sharding"
    }
