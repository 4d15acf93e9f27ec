# SPDX-License-Identifier: Apache-2.0
"""The key ``decode_bench``: prompts are taken as computed, so that long contexts decode without their prefill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_nanocp.config import DECODE_BENCH

from .harness import BLOCK, Ask, Engine, prompt

pytestmark = pytest.mark.engine

# Per rank 4,096 tokens; both together hold the longest request.
BLOCKS = 4096 // BLOCK
MOST = 8000
CHUNK = 256
TOKENS = 8


@pytest.fixture(scope="module")
def shared_bench(tiny_model: str) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DECODE_BENCH, "1")  # every process of the engine parses the settings again
        engine = Engine(
            tiny_model,
            2,
            {"segment_size": 5000, "decode_bench": True},
            num_gpu_blocks_override=BLOCKS + 1,
            max_model_len=MOST,
            max_num_batched_tokens=CHUNK,
        )
        yield engine
        engine.close()


@pytest.fixture
def bench(shared_bench: Engine) -> Iterator[Engine]:
    yield shared_bench
    shared_bench.check_nothing_left()


def decode(engine: Engine, lengths: list[int], **extra: int) -> tuple[int, list[list[int]]]:
    """Steps it took to decode prompts of these lengths, and the KV tokens of each on each rank.

    Here also requests on one rank are found in the status: their blocks are allocated like a shard's.
    """
    before = engine.status()
    params = dict(max_tokens=TOKENS, extra_args=extra)
    for answer in engine.ask([Ask(prompt(n, 7000 + n), params) for n in lengths]):
        assert len(answer.tokens[0]) == TOKENS and answer.finish == ["length"]
    engine.check_nothing_left()
    after = engine.status()
    new = [held for request, held in after["finished"].items() if request not in before["finished"]]
    return after["steps"] - before["steps"], new


def test_a_long_prompt_takes_no_prefill(bench: Engine) -> None:
    """Its chunks alone would be more steps than all it takes."""
    length = 6000
    steps, (held,) = decode(bench, [length])
    # A step more to begin with, and some that async scheduling had begun when the request ended.
    assert TOKENS <= steps <= TOKENS + 3 < length // CHUNK
    assert sum(held) == length + TOKENS - 1, "the last token's KV is never written"
    assert min(held) > length // 3, "spread over both ranks"


def test_a_prompt_of_one_rank_takes_no_prefill(bench: Engine) -> None:
    length = 4000
    steps, shares = decode(bench, [length])
    assert TOKENS <= steps <= TOKENS + 3 < length // CHUNK
    assert shares == [], "it is as any other request of one rank"


@pytest.mark.parametrize("length", [4500, MOST - TOKENS])
def test_a_prompt_larger_than_a_rank(bench: Engine, length: int) -> None:
    """Shorter than a segment, and as long as the model allows: neither fits one rank, both fit two."""
    assert length > BLOCKS * BLOCK
    steps, (held,) = decode(bench, [length])
    assert TOKENS <= steps <= TOKENS + 3
    assert sum(held) == length + TOKENS - 1 and all(0 < tokens <= BLOCKS * BLOCK for tokens in held)


@pytest.mark.parametrize("length", [3000, 6000])
def test_a_prompt_that_is_to_be_computed(bench: Engine, length: int) -> None:
    """On one rank, and on both, which compute it together."""
    steps, shares = decode(bench, [length], compute_prompt=1)
    spread = length > 5000
    assert steps >= TOKENS + length // (2 * CHUNK if spread else CHUNK)
    assert [min(held) > 0 for held in shares] == ([True] if spread else [])


def test_many_at_once(bench: Engine) -> None:
    """More than fit together: some wait, and all decode."""
    lengths = [6000, 100, 1, 4500, 33, 3000, 5100, 64]
    _, shares = decode(bench, lengths)
    totals = sorted(sum(held) - TOKENS + 1 for held in shares)
    assert set(totals) <= set(lengths) and [n for n in totals if n > BLOCKS * BLOCK] == [4500, 5100, 6000]
    assert sum(min(held) > 0 for held in shares) >= 3
