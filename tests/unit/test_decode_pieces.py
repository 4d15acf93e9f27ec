# SPDX-License-Identifier: Apache-2.0
"""How rows are cut into pieces, and attention over these, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from tests.unit.attention_steps import Shape, full_attention
from tests.unit.flash_steps import lay_out, reference_attend
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.gqa.split_kv import KV, Visits, attend, pack
from vllm_nanocp.attention.partial_rows import RowLayout
from vllm_nanocp.attention.stream_k import ROW_COST, TILE, cut

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=64).filter(any), st.integers(1, 200))
def test_cut(lengths: list[int], programs: int) -> None:
    """Every token in one piece, a row's in order; no more pieces than there is room for; and every program has as much
    as the others, but for one tile and, at either end, what a row costs besides its tokens."""
    pieces, counts, starts = cut(lengths, programs)
    assert len(pieces) == counts.sum() == starts[-1] <= len(lengths) + programs
    at = 0
    for row, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        mine = pieces[at : at + count]
        at += count
        assert (mine[:, 0] == row).all() and (count > 0) == (length > 0)
        bounds = [*mine[:, 1].tolist(), length]
        assert bounds[0] == 0 and mine[:, 2].tolist() == bounds[1:] and bounds == sorted({*bounds, 0})
        assert all(begin % TILE == 0 for begin in bounds[:-1])
    costs = -(-(pieces[:, 2] - pieces[:, 1]) // TILE) + ROW_COST * (pieces[:, 1] == 0)
    work = [int(costs[a:b].sum()) for a, b in itertools.pairwise(starts)]
    assert sum(work) == costs.sum() and max(work) - min(work) <= 1 + 2 * ROW_COST


NUM_ROWS = 3  # of a batch, which this attention leaves alone
SHAPES = [
    Shape(4, 2, 64, torch.bfloat16, 16),
    Shape(3, 3, 80, torch.float16, 32),
    Shape(16, 1, 128, torch.bfloat16, 16),
    Shape(24, 1, 256, torch.float16, 16),
]


def test_attend() -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    run_ranks(1, check_attend, seconds=120)


def check_attend(rank: int, size: int) -> None:
    for shape in SHAPES:
        compare(shape, 1)
    for shape in SHAPES[:2]:
        compare(shape, 3)


def compare(shape: Shape, queries: int) -> None:
    """Against float64; some places empty; NaN in whatever must not be read. With several queries some places are of a
    rank's own rows, of which pieces are made for more tokens than there are."""
    lengths, num_blocks, size = [1, 0, 300, 33, 0, 128, 700], 160, shape.block_size
    generator = torch.Generator().manual_seed(shape.head_size)
    cache = torch.randn((num_blocks, shape.num_kv_heads, size, 2 * shape.head_size), generator=generator)
    cache = cache.to(shape.dtype)
    query = torch.randn((len(lengths) * queries, shape.num_heads, shape.head_size), generator=generator)
    query = query.to(shape.dtype)
    heads = shape.num_heads, shape.num_kv_heads, shape.head_size
    visits = Visits.empty(NUM_ROWS, len(lengths), *heads, torch.device("cpu"), queries)
    own = [place for place, length in enumerate(lengths) if length >= queries > 1 and place % 2 == 0]
    visits.seen[own] = torch.tensor([lengths[place] for place in own], dtype=torch.int32)
    table = torch.zeros((len(lengths), 50), dtype=torch.int32)
    free = torch.randperm(num_blocks - 1, generator=generator) + 1
    cache[0] = float("nan")
    most = [length + (queries - 1 if place in own else 0) for place, length in enumerate(lengths)]
    used = lay_out(visits, [0] * NUM_ROWS + most)
    expected = {}
    for place, length in enumerate(lengths):
        mine, free = free[: -(-length // size)], free[-(-length // size) :]
        table[place, : len(mine)] = mine
        if length:
            keys, values = cache[mine].transpose(1, 2).flatten(0, 1)[:length].split(shape.head_size, dim=-1)
            asking, first = query[place * queries :][:queries], length - (queries if place in own else 1)
            expected[place] = full_attention(asking, keys, values, first, shape.scale)
            if spare := -length % size:
                cache[mine[-1], :, -spare:] = float("nan")
    visits = Visits(
        queries, NUM_ROWS, visits.ends, *(x.to(DEVICE) for x in vars(visits).values() if isinstance(x, torch.Tensor))
    )
    table = table.to(DEVICE)
    visits.tables.copy_(torch.tensor([row.data_ptr() for row in table]))
    cache, query = cache.to(DEVICE), query.to(DEVICE)
    keys, values = cache.transpose(1, 2).split(shape.head_size, dim=-1)
    visits.outputs.fill_(float("nan"))
    layout, kv = RowLayout(shape.num_heads, shape.head_size), KV(keys, values, shape.scale)
    packed = layout.empty(len(query), DEVICE)
    attend(query, kv, visits, shape.dtype)
    pack(packed, layout, visits)
    found = layout.outputs(packed).cpu().double()
    for place, right in expected.items():
        torch.testing.assert_close(found[place * queries :][:queries], right, rtol=2e-2, atol=1e-2)
    lses, outputs = visits.lses.clone(), visits.outputs.clone()
    if DEVICE.type == "cpu":
        reference_attend(query, kv, visits, shape.dtype)
        torch.testing.assert_close(lses[:used], visits.lses[:used], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(outputs[:used], visits.outputs[:used], rtol=2e-2, atol=1e-2)
    for place, length in enumerate(lengths):
        assert (layout.lses(packed)[place * queries :][:queries] == float("-inf")).all() == (length == 0)
