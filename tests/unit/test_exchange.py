# SPDX-License-Identifier: Apache-2.0
"""The collective exchange between real processes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from tests.unit.processes import run_ranks
from vllm_nanocp.exchange import CollectiveExchange

_HEADS, _SIZE = 2, 8


def _rows(step: int, source: int, target: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What ``source`` sends to ``target``: every number says where it comes from. Exact in bfloat16."""
    row = torch.arange(count).view(count, 1, 1)
    place = torch.arange(_HEADS * width).view(1, _HEADS, width)
    return ((step * 7 + source * 31 + target * 17 + row * 5 + place) % 256).to(dtype)


def _counts(size: int, steps: int) -> list[list[list[int]]]:
    """For each step, how many rows a rank sends to another: uneven, with zeros, and steps without anything."""
    dice = random.Random(size)
    matrices = [[[dice.choice([0, 0, 1, 2, 9]) for _ in range(size)] for _ in range(size)] for _ in range(steps)]
    matrices[0] = [[40] * size for _ in range(size)]  # large first: the later ones reuse its buffer
    matrices[1] = [[0] * size for _ in range(size)]
    matrices[2] = [[0] * size for _ in range(size)]
    matrices[2][0][size - 1] = 3  # one pair only; rank 1 of 3 takes no part, but calls
    return matrices


def _round_trips(rank: int, size: int, dtype: torch.dtype) -> None:
    exchange = CollectiveExchange(dist.group.WORLD)
    exchange.warm_up(torch.device("cpu"))
    storages = []
    for step, counts in enumerate(_counts(size, 8)):
        send, recv = counts[rank], [counts[other][rank] for other in range(size)]
        queries = torch.cat([_rows(step, rank, to, send[to], _SIZE, dtype) for to in range(size)])
        if step % 2:  # strided, as a slice of a fused projection is
            queries = torch.stack([queries, queries + 1], dim=-1)[..., 0]
        visiting = exchange.dispatch(queries, send, recv)()
        expected = torch.cat([_rows(step, source, rank, recv[source], _SIZE, dtype) for source in range(size)])
        assert visiting.dtype == dtype and torch.equal(visiting, expected), f"step {step}: dispatch"
        storages.append(visiting.untyped_storage().data_ptr())
        # Back: each holder answers in float32, with one number more; the homes get the order they sent.
        answers = torch.cat([_rows(step, to, rank, recv[to], _SIZE + 1, torch.float32) for to in range(size)]) + 0.25
        partials = exchange.combine(answers, recv, send)
        expected = torch.cat([_rows(step, rank, to, send[to], _SIZE + 1, torch.float32) for to in range(size)]) + 0.25
        assert partials.dtype == torch.float32 and torch.equal(partials, expected), f"step {step}: combine"
    assert exchange.calls == 16
    # The first step is the largest, and its combine larger than its dispatch: after it nothing is allocated anew.
    assert len(set(storages[1:])) == 1


def _all_round_trips(rank: int, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _round_trips(rank, size, dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_rows_arrive_where_the_plan_says(size: int) -> None:
    """Dispatch and combine, uneven and empty, float32 and bfloat16, again and again through the same buffers."""
    run_ranks(size, _all_round_trips, seconds=100)


def _fails(rank: int, size: int) -> None:
    if rank == 1:
        raise RuntimeError("told to")
    dist.barrier()


def test_a_failing_rank_fails_the_test() -> None:
    """The harness itself: it must neither hang nor pass."""
    with pytest.raises(AssertionError, match="told to"):
        run_ranks(2, _fails, seconds=60)
