# SPDX-License-Identifier: Apache-2.0
"""What tests of engines on GPUs share: how engines start, what they are asked, and how far bfloat16 lets their tokens
part from stock vLLM's."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.engine.harness import Answer, Ask, Engine, prompt
from vllm_nanocp.entry import refusals

from . import SHARED

# Where two bfloat16 runs part, both candidates are nearly as likely.
TIE = 0.05
# The small models' logits are 8 to 16 in size, where neighbouring bfloat16 numbers are this far apart.
STEP = 0.0625
# Around the borders of blocks, chunks and segments of 600 tokens.
LENGTHS = [1, 40, 511, 700, 1024, 1500, 2047, 3000, 5000, 7500]
# Of batches that graphs are captured for.
SIZES = [1, 2, 4, 8, 16, 24, 32]


def in_spite_of(patch: pytest.MonkeyPatch, *starts: str) -> None:
    """Leave out those refusals that begin so, one for each of these."""
    kept = tuple(setting for setting in refusals.SETTINGS if not setting.what.startswith(starts))
    assert len(refusals.SETTINGS) - len(kept) == len(starts)
    patch.setattr(refusals, "SETTINGS", kept)


def common() -> dict[str, Any]:
    # So little memory that other programs' use of the GPU, and its changes, do not matter.
    memory = dict(gpu_memory_utilization=0.03, kv_cache_memory_bytes=1 << 30)
    # FlashInfer's search for its fastest kernels takes 40 s of a start.
    return dict(
        dtype="bfloat16", block_size=16, num_gpu_blocks_override=8192, enable_flashinfer_autotune=False, **memory
    )


def with_graphs(sizes: list[int] = SIZES, tensor_parallel: bool = False) -> dict[str, Any]:
    # Without the pass, which has FlashInfer compile its all-reduce for minutes.
    passes = {"fuse_allreduce_rms": False} if tensor_parallel else {}
    return dict(enforce_eager=False, compilation_config={"cudagraph_capture_sizes": sizes, "pass_config": passes})


def requests(rounds: int | None = None, max_tokens: int = 24) -> list[Ask]:
    """One of each length a round; they come one soon after the other."""
    if rounds is None:
        rounds = 2 if SHARED else 4  # shared GPUs take turns
    return [
        Ask(prompt(n, 50 + n + 7 * k), dict(max_tokens=max_tokens, logprobs=20), delay=0.01 * i)
        for k in range(rounds)
        for i, n in enumerate(LENGTHS)
    ]


class Answers(NamedTuple):
    """To the same requests, sent together and one by one."""

    together: list[Answer]
    alone: list[Answer]


def answers(engine: Engine, asks: list[Ask]) -> Answers:
    return Answers(engine.ask(asks), [engine.ask([ask])[0] for ask in asks])


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


def distance(mine: list[Answer], exact: list[Answer]) -> float:
    """How far log-probabilities are from those of exact weights, root mean square, over all tokens until the answers
    part."""
    found = []
    for answer, other in zip(mine, exact, strict=True):
        for at, (x, y) in enumerate(zip(answer.tokens[0], other.tokens[0], strict=True)):
            if x != y:
                break
            found.append(answer.logprobs[0][at][x].logprob - other.logprobs[0][at][x].logprob)
    assert len(found) > len(mine)
    return (sum(x * x for x in found) / len(found)) ** 0.5


def all_partings(mode: str, stocks: Answers, ours: Answers) -> dict[str, list[float]]:
    """What parts, printed: first stock from itself."""
    found = {
        "stock alone - together": partings(stocks.alone, stocks.together),
        "nanocp together - stock together": partings(ours.together, stocks.together),
        "nanocp alone - stock alone": partings(ours.alone, stocks.alone),
    }
    for name, gaps in found.items():
        print(f"{mode}: {name}: {len(gaps)} of {len(stocks.alone)} part, gaps {sorted(round(g, 3) for g in gaps)}")
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
