# SPDX-License-Identifier: Apache-2.0
"""The routed exchange without attention: random routes, step after step, over one buffer that is never cleared."""

from __future__ import annotations

import functools
import random
import time

import torch
import torch.distributed as dist

from tests.unit.attention_steps import Shape
from tests.unit.flash_steps import make_routes
from vllm_nanocp.exchange.routes import MAX_LAYERS, Route

SHAPE = Shape(4, 4, 64, torch.bfloat16)
CAPACITY = 5
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
    """[CAPACITY + 3, heads, head_size], the first of them used."""
    generator = torch.Generator().manual_seed(step * 100 + layer * 10 + home)
    return torch.randn(CAPACITY + 3, SHAPE.num_heads, SHAPE.head_size, generator=generator).to(SHAPE.dtype)


def pieces_of(place: int) -> int:
    return 1 + place % 3


def attend(visiting: torch.Tensor, holder: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of attention: pieces that depend on the query, the holder, the place and the head."""
    places, heads, _ = visiting.shape
    piece = torch.arange(3, device=visiting.device).view(3, 1, 1)
    head = torch.arange(heads, device=visiting.device).view(1, heads, 1)
    place = torch.arange(places, device=visiting.device).view(1, 1, places)
    lses = 0.7 * piece + 0.3 * head - 0.4 * holder + 0.1 * (place % 4)
    outputs = visiting.float().permute(1, 0, 2)[None] * (holder + 1) + piece[..., None]
    pieces = torch.tensor([pieces_of(p) for p in range(places)], dtype=torch.int32, device=visiting.device)
    return outputs.contiguous(), lses.float().contiguous(), pieces


def expected(step: int, layer: int, home: int, result: int, counts: list[list[int]]) -> torch.Tensor | None:
    """A result in float64, from nothing but the numbers of the step; None if it visits nobody."""
    query = queries(step, layer, home)[result]
    parts, lses = [], []
    for holder, count in enumerate(counts[home]):
        if result < count:
            place = home * CAPACITY + result
            outputs, lse, _ = attend(query.expand(place + 1, *query.shape), holder)
            parts.append(outputs[: pieces_of(place), :, place].double())
            lses.append(lse[: pieces_of(place), :, place].double())
    if not parts:
        return None
    weights = torch.cat(lses).softmax(0).unsqueeze(-1)
    return (weights * torch.cat(parts)).sum(0)


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
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    routes = make_routes(SHAPE, size, rank, CAPACITY, shared)
    routes.warm_up(SHAPE.dtype)
    dist.barrier()
    places = size * CAPACITY
    move = functools.partial(torch.tensor, dtype=torch.int64, device=where)
    compared = 0
    for step in range(1, steps + 1):
        counts = draw(step, size)
        num_results = max(counts[rank])
        send = [i % CAPACITY for i in range(places)]
        pick = [[b * CAPACITY + i if i < counts[rank][b] else -1 for b in range(size)] for i in range(num_results)] or [
            [-1] * size
        ]
        route = Route(
            move(send),
            move(counts[rank]),
            move([counts[home][rank] for home in range(size)]),
            move([step * MAX_LAYERS]),
        )
        tokens = move(list(range(num_results)) or [-1])
        if late and random.Random(step * 31 + rank).random() < 0.1:
            time.sleep(late)
        for layer in range(LAYERS):
            query = queries(step, layer, rank).to(where)
            output = torch.full_like(query, POISON)
            routes.dispatch(query, route, layer)
            pieces = attend(routes.visiting(query), rank)
            routes.combine(*pieces, move(pick), tokens, output, route, layer)
            found = output.cpu().double()
            for result in range(num_results):
                right = expected(step, layer, rank, result, counts)
                if right is not None:
                    error = (found[result] - right).abs().max().item()
                    assert error < 0.06, (step, layer, rank, result, error, counts)
                    compared += 1
        if step % 50 == 0:  # nobody is in a step
            dist.barrier()
            routes.rows.fill_(POISON)
            routes.visiting(query).fill_(POISON)
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
    return compared
