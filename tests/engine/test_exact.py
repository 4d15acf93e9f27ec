# SPDX-License-Identifier: Apache-2.0
"""Same tokens and logprobs as stock vLLM on one rank, whatever the lengths, degrees and order of arrival."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .harness import BLOCK, CHUNK, Ask, Engine, assert_same_logprobs, prompt

pytestmark = pytest.mark.engine

# Around block, chunk and segment (512, 1024) borders, and beyond two and three segments.
LENGTHS = [
    1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 100, 255, CHUNK - 1, CHUNK, CHUNK + 1, 543, 544, 545, 700,
    900, 1023, 1024, 1025, 1055, 1056, 1057, 1100, 1300, 1500, 1535, 1536, 1537, 1800, 2047, 2048, 2049, 2500, 3000,
    3071, 3072, 3073, 4000, 5000, 6001, 7500,
]  # fmt: skip


def asks(lengths: list[int], /, *, text: int, spread: float = 0.0, **params: Any) -> list[Ask]:
    """Requests of these lengths, arriving within ``spread`` seconds in a shuffled but fixed order."""
    return [
        Ask(prompt(n, text * 1000 + i), params, delay=spread * ((i * 7919) % len(lengths)) / len(lengths))
        for i, n in enumerate(lengths)
    ]


def test_tokens_and_logprobs(stock: Engine, nanocp: Engine) -> None:
    requests = asks(LENGTHS, text=1, spread=2.0, logprobs=5, max_tokens=20)
    steps = nanocp.status()["sharded_steps"]
    for length, ours, theirs in zip(LENGTHS, nanocp.ask(requests), stock.ask(requests), strict=True):
        assert ours.tokens == theirs.tokens, length
        assert_same_logprobs(ours.logprobs[0], theirs.logprobs[0], 1e-3)
    found = nanocp.status()
    assert found["sharded_steps"] > steps
    degrees = {sum(held > 0 for held in shares) for shares in found["finished"].values()}
    assert degrees == ({2} if nanocp.ranks == 2 else {2, 3})


def test_long_decode_crosses_blocks(stock: Engine, nanocp: Engine) -> None:
    requests = asks([1500, 2100, 40], text=2, max_tokens=3 * BLOCK + 5)
    assert [a.tokens for a in nanocp.ask(requests)] == [a.tokens for a in stock.ask(requests)]


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.8, seed=11, top_p=0.9, top_k=50),
        dict(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3),
        dict(temperature=1.0, seed=5, n=2),
        dict(temperature=0.0, min_tokens=4, stop_token_ids=list(range(3, 200)), ignore_eos=False),
        dict(temperature=0.0, logit_bias={7: 4.0, 9: -8.0}, bad_words=[]),
    ],
    ids=["seeded", "penalties", "n2", "stop-ids", "bias"],
)
def test_sampling(stock: Engine, nanocp: Engine, params: dict[str, Any]) -> None:
    requests = asks([60, 1600, 2600], text=3, **params)
    ours, theirs = nanocp.ask(requests), stock.ask(requests)
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert [a.finish for a in ours] == [a.finish for a in theirs]


def test_json_schema(stock: Engine, nanocp: Engine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    requests = asks(
        [50, 1700, 2400],
        text=4,
        structured_outputs=StructuredOutputsParams(json=schema),
        max_tokens=40,
        ignore_eos=False,
    )
    ours, theirs = nanocp.ask(requests), stock.ask(requests)
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert [a.text for a in ours] == [a.text for a in theirs]
    assert all('{"a"' in a.text[0] for a in ours)


def test_stop_strings_and_streaming(stock: Engine, nanocp: Engine) -> None:
    free_run = stock.ask(asks([70, 1900, 2300], text=5, max_tokens=24))
    stops = [answer.text[0][len(answer.text[0]) // 2 :][:3] for answer in free_run]
    requests = [
        Ask(ask.prompt, {**ask.params, "stop": [stop]})
        for ask, stop in zip(asks([70, 1900, 2300], text=5, max_tokens=24), stops, strict=True)
    ]
    ours, theirs = nanocp.ask(requests), stock.ask(requests)
    assert [a.text for a in ours] == [a.text for a in theirs]
    assert all(a.finish == ["stop"] for a in ours)
    assert all(a.num_updates > 1 for a in nanocp.ask(asks([1900], text=5, max_tokens=24)))


def test_prompt_logprobs(stock: Engine, nanocp: Engine) -> None:
    requests = asks([45, 1300, 2200], text=6, prompt_logprobs=3, max_tokens=6)
    for ours, theirs in zip(nanocp.ask(requests), stock.ask(requests), strict=True):
        assert ours.tokens == theirs.tokens
        assert_same_logprobs(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], 1e-3)


def test_same_prompt_again(stock: Engine, nanocp: Engine) -> None:
    """With prefix caching on, later runs find what the first left, on whichever ranks it lies."""
    caching = nanocp.ranks == 3
    for text, lengths in ((7, [900]), (8, [2000]), (9, [6100])):
        requests = asks(lengths, text=text)
        (first,) = stock.ask(requests)
        for again in range(3):
            (answer,) = nanocp.ask(requests)
            assert answer.tokens == first.tokens
            assert answer.cached == ((lengths[0] - 1) // BLOCK * BLOCK if again and caching else 0)


def test_shared_prefix(stock: Engine, three: Engine) -> None:
    """Requests that go on, each its own way, after a prefix that lies on three ranks; a short one too."""
    stem = prompt(6000, 71)
    three.ask([Ask(stem)])
    requests = [Ask([*stem, *prompt(n, 72 + n)], dict(max_tokens=12)) for n in (1, 50, 700, 1300, 33)]
    requests.append(Ask([*stem[:480], *prompt(9, 70)], dict(max_tokens=12)))
    ours, theirs = three.ask(requests), stock.ask(requests)
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert all(a.cached >= 0.95 * 6000 for a in ours[:-1])
    assert ours[-1].cached >= 0.9 * 480


def test_shared_prefixes_that_come_together(stock: Engine, three: Engine) -> None:
    """Several answers to a prompt, and requests that share most of theirs: computed once, up to their last blocks."""
    stem = prompt(1400, 84)
    many = [Ask(prompt(1500, 83), dict(n=6, temperature=0.9, seed=5, max_tokens=12))]
    burst = [Ask([*stem, *prompt(100, 85 + i)], dict(max_tokens=12)) for i in range(6)]
    for requests, shared in ((many, 1499), (burst, 1400)):
        before = three.status()["computed_tokens"]
        ours = three.ask(requests)
        assert [a.tokens for a in ours] == [a.tokens for a in stock.ask(requests)]
        computed = three.status()["computed_tokens"] - before
        assert computed <= 1.1 * (1500 + 5 * (1500 - shared // BLOCK * BLOCK) + 6 * 11)


def test_shares(three: Engine) -> None:
    """No rank holds more than 40 % of a 7,000-token request on three, which compute its parts side by side. It comes
    alone: beside other requests, how many parts meet depends on when these come."""
    before = three.status()
    three.ask(asks([7000], text=10, max_tokens=4))
    after = three.status()
    (held,) = [shares for key, shares in after["finished"].items() if key not in before["finished"]]
    assert sum(held) >= 7000 and max(held) <= 0.4 * 7000
    assert after["parallel_parts"] - before["parallel_parts"] >= 10


def test_tensor_parallel(engines: Callable[..., Engine], stock: Engine) -> None:
    """Two ranks of two workers each: every tensor-parallel rank exchanges its own heads."""
    engine = engines("tensor-parallel")
    requests = asks([3, 700, 1300, 2600], text=11)
    assert [a.tokens for a in engine.ask(requests)] == [a.tokens for a in stock.ask(requests)]
    engine.check_nothing_left()
