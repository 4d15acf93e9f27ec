# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters and prompt embeddings in engines: the tokens are stock vLLM's, wherever requests are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

from tests.tiny_adapters import make_adapter

from .harness import Ask, Engine, assert_same_logprobs, prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("NANOCP_ADAPTERS" not in os.environ, reason="two more engines: NANOCP_ADAPTERS=1"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest | None]:
    """None, and three more than there are slots for at once."""
    folder = tmp_path_factory.mktemp("adapters")
    return [None, *(LoRARequest(f"adapter-{n}", n, str(make_adapter(folder / str(n), n))) for n in (1, 2, 3))]


def test_adapters(engines: Callable[..., Engine], adapters: list[LoRARequest | None]) -> None:
    """Each request has its own adapter's output or none's, while it is sharded, moves, or waits for a slot."""
    stock, ours = engines("adapters-stock"), engines("adapters")
    lengths = (20, 300, 700, 1200, 50, 1700)
    params = dict(max_tokens=24, logprobs=2)
    asks = [Ask(prompt(n, 70 + i), params, 0.05 * i, adapter=adapters[i % 4]) for i, n in enumerate(lengths)]
    # The same prompts with and without: what is cached of one is not taken for the other.
    asks += [Ask(asks[i].prompt, params, 1.0, adapter=adapters[(i + 1) % 4]) for i in (1, 2)]
    expected, before = stock.ask(asks), ours.status()
    got, after = ours.ask(asks), ours.status()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert_same_logprobs(mine.logprobs[0], theirs.logprobs[0], 1e-3)
    plain = stock.ask([Ask(ask.prompt, ask.params) for ask in asks[:4]])
    differ = [a.tokens != b.tokens for a, b in zip(expected, plain, strict=False)]
    assert differ == [False, True, True, True], "an adapter changes what a request says"
    assert after["sharded_steps"] > before["sharded_steps"]
    assert after["moves"] + after["spills"] > before["moves"] + before["spills"]
    ours.check_nothing_left()
    loaded = ours.call(ours.llm.collective_rpc("list_loras"))
    assert all(loaded)
    ours.ask([Ask(prompt(40, 69), params, rank=0)])
    assert ours.call(ours.llm.collective_rpc("list_loras")) == loaded, "ranks without tokens keep theirs"


def test_prompt_embeddings(engines: Callable[..., Engine], tiny_model: str) -> None:
    """A prompt given as its tokens' embeddings says what the tokens say, beside requests that are sharded."""
    stock, ours = engines("adapters-stock"), engines("adapters")
    table = load_file(Path(tiny_model) / "model.safetensors")["model.embed_tokens.weight"]
    params = dict(max_tokens=30)
    asks = [Ask(prompt(n, 170 + i), params) for i, n in enumerate((20, 700, 300, 1200, 900))]
    expected, before = stock.ask(asks), ours.status()
    given = [Ask(ask.prompt, params, embeddings=table[ask.prompt] if i != 3 else None) for i, ask in enumerate(asks)]
    got = ours.ask(given)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in expected]
    assert ours.status()["sharded_steps"] > before["sharded_steps"]
    ours.check_nothing_left()
