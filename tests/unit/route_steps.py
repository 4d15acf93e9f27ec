# SPDX-License-Identifier: Apache-2.0
"""The routed exchange and its attention: random routes, step after step, over one buffer that is never cleared."""

from __future__ import annotations

import functools
import random
import time

import torch
import torch.distributed as dist

from tests.unit.attention_steps import Shape, full_attention
from tests.unit.flash_steps import lay_out, make_routes
from tests.unit.processes import gpu_of
from vllm_nanocp.attention.flash_launches import places_of
from vllm_nanocp.attention.gqa.routed_layer import MAX_LAYERS, LocalBatch, Route
from vllm_nanocp.attention.gqa.split_kv import KV, Visits

SHAPE = Shape(4, 2, 64, torch.bfloat16, 16)
BLOCKS, MOST = 64, 600
CAPACITY = 5
ROWS, PLAIN = CAPACITY + 3, [450, 130]
LAYERS = 2
# Far from any partial result; no number that arithmetic would hide.
POISON = 1e30


def draw(step: int, size: int) -> list[list[int]]:
    """How many queries each rank sends to each: [home][holder], the same on all ranks."""
    dice = random.Random(step)
    kind = dice.choice(["empty", "full", "one home", "one holder", "sparse", "any"])
    one = dice.randrange(size)

    def count(home: int, holder: int) -> int:
        allowed = {"empty": False, "one home": home == one, "one holder": holder == one}.get(kind, True)
        if not allowed or (kind == "sparse" and dice.random() < 0.7):
            return 0
        return CAPACITY if kind == "full" else dice.randint(0, CAPACITY)

    return [[count(home, holder) for holder in range(size)] for home in range(size)]


def queries(step: int, layer: int, home: int) -> torch.Tensor:
    """[ROWS, heads, head_size], of which the first visit."""
    generator = torch.Generator().manual_seed(step * 100 + layer * 10 + home)
    return torch.randn(ROWS, SHAPE.num_heads, SHAPE.head_size, generator=generator).to(SHAPE.dtype)


def lengths(step: int, holder: int, size: int) -> list[int]:
    """KV tokens that the query at each place of a holder attends to, its own rows' last."""
    dice = random.Random(step * 10 + holder)
    return [dice.choice([1, 16, 100, 200, MOST]) for _ in range((size + 1) * CAPACITY)]


@functools.cache
def cache(holder: int) -> torch.Tensor:
    """[blocks, kv heads, block size, 2 * head_size], as vLLM keeps it."""
    generator = torch.Generator().manual_seed(holder)
    shape = (BLOCKS, SHAPE.num_kv_heads, SHAPE.block_size, 2 * SHAPE.head_size)
    return torch.randn(shape, generator=generator).to(SHAPE.dtype)


def blocks(step: int, place: int) -> list[int]:
    return random.Random(step * 1000 + place).sample(range(BLOCKS), MOST // SHAPE.block_size + 1)


def expected(step: int, layer: int, home: int, result: int, counts: list[list[int]]) -> torch.Tensor | None:
    """A result in float64, from nothing but the numbers of the step; None if it visits nobody."""
    query, size, parts = queries(step, layer, home)[result], len(counts), []
    visited = [(holder, home * CAPACITY + result) for holder, count in enumerate(counts[home]) if result < count]
    for holder, place in [*visited, (home, size * CAPACITY + result)]:
        held = cache(holder)[blocks(step, place)].transpose(1, 2).flatten(0, 1)
        parts.append(held[: lengths(step, holder, size)[place]])
    if not visited:
        return None
    keys, values = torch.cat(parts).split(SHAPE.head_size, dim=-1)
    return full_attention(query[None], keys, values, len(keys) - 1, SHAPE.scale)[0]


def make_visits(
    step: int, rank: int, counts: list[list[int]], device: torch.device
) -> tuple[Visits, list[int], torch.Tensor]:
    """What this rank's places attend to, and behind them the batch's last two rows, which visit nobody.

    Returns:
        These; the places in use, those of other ranks' queries and of this rank's own rows; and the block ids, which
        must live as long.
    """
    size = len(counts)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_size)
    places = places_of(CAPACITY, size)
    visits = Visits.empty(ROWS, places, *heads, device)
    visits.outputs.fill_(POISON)
    come = [counts[home][rank] for home in range(size)] + [max(counts[rank])]
    used = [place for place in range(places) if place % CAPACITY < come[place // CAPACITY]]
    held = [n if place in used else 0 for place, n in enumerate(lengths(step, rank, size))]
    # Of the second, pieces are made for more tokens than there are.
    lay_out(visits, [0] * (ROWS - 2) + [PLAIN[0], PLAIN[1] + 300] + held)
    ids = torch.tensor([blocks(step, place) for place in range(places)], dtype=torch.int32, device=device)
    visits.tables.copy_(torch.tensor([row.data_ptr() for row in ids]))
    return visits, used, ids


def make_route(step: int, rank: int, counts: list[list[int]], answers: list[int], device: torch.device) -> Route:
    """Result i asks place i of each rank that it visits, and of this rank's own rows."""
    size, results = len(counts), max(counts[rank])
    picks = [
        [b * CAPACITY + i if i < counts[rank][b] else -1 for b in range(size)] + [size * CAPACITY + i]
        for i in range(results)
    ]
    asks = [(place, i) for i, pick in enumerate(picks) for place in pick if place >= 0]
    random.Random(step).shuffle(asks)
    move = functools.partial(torch.tensor, dtype=torch.int64, device=device)
    return Route(
        asks=move(asks or [(0, 0)]),
        answers=move(answers or [0]),
        counts=move([step * MAX_LAYERS, len(asks), len(answers), results]),
        pick=move(picks or [[-1] * (size + 1)]),
        tokens=move(list(range(results)) or [-1]),
    )


def stress(rank: int, size: int, steps: int, device: str, shared: str | None, late: float = 0.0) -> int:
    """Run steps and compare every result.

    Args:
        rank, size: of the group.
        steps: how many.
        device: ``cpu`` or ``cuda``.
        shared: see ``flash_kernel``.
        late: some ranks come so many seconds late to some steps.

    Returns:
        How many results were compared here.

    Raises:
        AssertionError: one is wrong.
    """
    where = gpu_of(rank) if device == "cuda" else torch.device(device)
    routes = make_routes(SHAPE, size, rank, CAPACITY, shared)
    keys, values = cache(rank).to(where).transpose(1, 2).split(SHAPE.head_size, dim=-1)
    kv = KV(keys, values, SHAPE.scale)
    seq_lens = torch.tensor([0] * (ROWS - 2) + PLAIN, dtype=torch.int32, device=where)
    dist.barrier()
    compared = 0
    for step in range(1, steps + 1):
        counts = draw(step, size)
        num_results = max(counts[rank])
        table = torch.tensor([blocks(step, row) for row in range(ROWS)], dtype=torch.int32, device=where)
        visits, answers, _ids = make_visits(step, rank, counts, where)
        route = make_route(step, rank, counts, answers, where)
        if late and random.Random(step * 31 + rank).random() < 0.1:
            time.sleep(late)
        for layer in range(LAYERS):
            query = queries(step, layer, rank).to(where)
            output = torch.full_like(query, POISON)
            routes.attend(LocalBatch(query, output, table, seq_lens), kv, visits, route, layer)
            assert not visits.done.any()
            found = output.cpu().double()
            for result in range(num_results):
                right = expected(step, layer, rank, result, counts)
                if right is not None:
                    error = (found[result] - right).abs().max().item()
                    assert error < 0.06, (step, layer, rank, result, error, counts)
                    compared += 1
            for row, length in enumerate(PLAIN, ROWS - 2):
                held = cache(rank)[blocks(step, row)].transpose(1, 2).flatten(0, 1)[:length]
                right = full_attention(query[row : row + 1].cpu(), *held.split(SHAPE.head_size, dim=-1), length - 1,
                                       SHAPE.scale)[0]  # fmt: skip
                assert (found[row] - right).abs().max() < 0.06, (step, layer, rank, row)
        if step % 50 == 0:  # nobody is in a step
            dist.barrier()
            routes.rows.fill_(POISON)
            routes.visiting(query).fill_(POISON)
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
    return compared
