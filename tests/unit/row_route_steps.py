# SPDX-License-Identifier: Apache-2.0
"""The routed exchange around a kernel that is not its own: random routes, step after step, over buffers that are never
cleared, of two capacities in turn."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.unit.flash_latent_steps import make_routes
from tests.unit.processes import gpu_of
from tests.unit.route_steps import draw as draw_counts
from vllm_nanocp.attention.row_routes import RowRoutes

HEADS, QUERY, VALUES, LAYERS = 6, 48, 32, 3
CAPACITIES = (5, 9)
SHAPE: Any = SimpleNamespace(num_heads=HEADS, head_size=QUERY, value_size=VALUES, dtype=torch.bfloat16)
POISON = 1e30


def queries_of(step: int, layer: int, home: int, count: int) -> torch.Tensor:
    """[count, HEADS, QUERY], bfloat16."""
    generator = torch.Generator().manual_seed(step * 100 + layer * 10 + home)
    return torch.randn(count, HEADS, QUERY, generator=generator).to(torch.bfloat16)


def attend(queries: torch.Tensor, holder: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for attention: a result that tells query and holder. Heads come first in memory, as behind a product
    of matrices."""
    heads_first = queries.float().transpose(0, 1).contiguous()
    outputs = heads_first[..., :VALUES] * (holder + 1)
    return outputs.contiguous().transpose(0, 1), (heads_first[..., -1] * (1 + holder)).contiguous().transpose(0, 1)


def expected(queries: torch.Tensor, holders: list[int], emptied: list[bool]) -> torch.Tensor:
    """[HEADS, VALUES], of one query and those who hold something for it; float64."""
    parts = [attend(queries[None], holder) for holder, gone in zip(holders, emptied, strict=True) if not gone]
    if not parts:
        return torch.zeros(HEADS, VALUES, dtype=torch.float64)
    outputs, lses = torch.cat([o for o, _ in parts]).double(), torch.cat([x for _, x in parts]).double()
    return (lses.softmax(0)[..., None] * outputs).sum(0)


def fill(routes: RowRoutes, step: int, counts: list[list[int]]) -> None:
    """Row i of a home visits each rank that it sends more than i queries to."""
    rank, size, capacity = routes.rank, routes.num_ranks, routes.capacity
    rows = max(counts[rank])
    pick = np.full((rows, size + 1), -1)
    for i in range(rows):
        places = [size * capacity + i] + [to * capacity + i for to in range(size) if i < counts[rank][to]]
        pick[i, : len(places)] = places
    answers = [home * capacity + i for home in range(size) for i in range(counts[home][rank])]
    routes.fill(step, pick, np.arange(rows), np.array(answers + [size * capacity + i for i in range(rows)], dtype=int))


def is_empty(step: int, holder: int, home: int, i: int, own: bool = False) -> bool:
    """Whether a holder has no key for a row."""
    return random.Random(f"{step} {holder} {home} {i} {own}").random() < 0.2


def one_layer(routes: RowRoutes, step: int, layer: int, counts: list[list[int]], device: torch.device) -> torch.Tensor:
    """The output of this rank's rows; what nobody wrote is poison."""
    rank, size, capacity = routes.rank, routes.num_ranks, routes.capacity
    rows = max(counts[rank])
    query = queries_of(step, layer, rank, rows + 2).to(device)
    output = torch.full((rows + 2, HEADS, VALUES), POISON, dtype=torch.bfloat16, device=device)
    routes.send(query, layer)
    routes.arrive(layer)
    visiting = routes.visiting(query)
    empty = torch.zeros(routes.places, dtype=torch.bool)
    for place in range(routes.places):
        peer, i = place // capacity, place % capacity
        empty[place] = is_empty(step, rank, rank if peer == size else peer, i, peer == size)
    empty = empty.to(device)
    cut = 1 + random.Random(step).randrange(routes.places - 1)  # two launches over places
    for part in (slice(0, cut), slice(cut, routes.places)):
        outputs, lses = attend(visiting[part], rank)
        routes.answer(outputs, lses, empty[part] if empty.any() else None, part.start, layer)
    routes.collect(output, layer)
    return output.cpu().double()


def stress(rank: int, size: int, steps: int, device: str, shared: str | None, late: float = 0.0) -> int:
    """Run steps and compare every result.

    Args:
        rank, size: of the group.
        steps: how many.
        device: ``cpu`` or ``cuda``.
        shared: see ``kernel_of``.
        late: some ranks come so many seconds late to some steps.

    Returns:
        How many results were compared here.

    Raises:
        AssertionError: one is wrong.
    """
    where = gpu_of(rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    made = [make_routes(capacity, shared, SHAPE, size, rank) for capacity in CAPACITIES]
    compared = 0
    for step in range(1, steps + 1):
        routes = made[random.Random(step).randrange(len(made))]
        counts = draw_counts(step, size)
        fill(routes, step, counts)
        for layer in range(LAYERS):
            if late and random.Random(step * 31 + rank * 7 + layer).random() < 0.1:
                time.sleep(late)
            found = one_layer(routes, step, layer, counts, where)
            rows = max(counts[rank])
            query = queries_of(step, layer, rank, rows + 2)
            for i in range(rows):
                visited = [holder for holder in range(size) if i < counts[rank][holder]]
                gone = [is_empty(step, holder, rank, i) for holder in visited]
                right = expected(query[i], [*visited, rank], [*gone, is_empty(step, rank, rank, i, True)])
                error = (found[i] - right).abs().max().item()
                assert error < 0.02 * size * max(1.0, right.abs().max().item()), (step, layer, rank, i, error, counts)
                compared += 1
            assert (found[rows:] > POISON / 2).all(), "rows that do not visit are left alone"
    dist.barrier()
    return compared
