# SPDX-License-Identifier: Apache-2.0
"""Partial latent attention on GPUs over a paged cache of latents, in the space of values: how ``cpu_latent.py`` has it,
with FlashAttention. What it returns is 16 bits wide; it is projected into float32, and merged there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..flash_launches import ShardLaunch
from .flash_mla import attend_gathered, attend_projected
from .latent_kernel import Latents, Piece

# Queries whose results are taken in at a time: what that takes beside them.
TOGETHER = 1024


@dataclass
class Absorbed:
    """A launch over latents.

    Attributes:
        part: its queries.
        launch: with its schedule.
        empty: bool [num_rows], rows without keys; None: there are none. Its rows have one query each.
    """

    part: slice
    launch: ShardLaunch
    empty: torch.Tensor | None = None


@dataclass
class Projected:
    """A row whose keys are read piece by piece: its queries are so many that projecting what they see is less work, or
    the kernel does not take several.

    Attributes:
        part: its queries.
        starts: int32 [2]: 0 and how many.
        pieces: what it sees, one after another.
        absorbed: whether they attend in the latents' space instead, being few.
    """

    part: slice
    starts: torch.Tensor
    pieces: list[Piece]
    absorbed: bool = False


Work = Absorbed | Projected


def attend(queries: torch.Tensor, held: Latents, work: Work, outputs: torch.Tensor, lses: torch.Tensor) -> None:
    """Write partial results of some queries.

    Args:
        queries: [rows, num_heads, query size], contiguous numbers.
        held: the layer's.
        work: which queries, over what.
        outputs: float32 [rows, num_heads, value_size].
        lses: float32 [rows, num_heads], natural; -inf where there is no key.
    """
    part = work.part
    if isinstance(work, Absorbed):
        _over_latents(queries[part], held, work, outputs[part], lses[part])
        return
    over = _over_gathered if work.absorbed else _over_piece
    for number, piece in enumerate(work.pieces):
        out, lse = over(queries[part], held, work.starts, piece)
        _take_in(out, lse, outputs[part], lses[part], first=not number)
        del out, lse  # before the next piece has its own


def _over_latents(
    queries: torch.Tensor, held: Latents, work: Absorbed, outputs: torch.Tensor, lses: torch.Tensor
) -> None:
    out, lse = absorbed_results(queries, held, work.launch)
    outputs.copy_(out)
    # Whatever a kernel says of rows without keys, they weigh nothing.
    lses.copy_(lse if work.empty is None else lse.masked_fill(work.empty.unsqueeze(-1), float("-inf")))


def absorbed_results(queries: torch.Tensor, held: Latents, launch: ShardLaunch) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results over latents; of rows without keys they may be anything.

    Args:
        queries: [rows, num_heads, query size], those of the launch.
        held: the layer's.
        launch: with its schedule.

    Returns:
        float32 [rows, num_heads, value_size], and natural log-sum-exps, float32 [rows, num_heads].
    """
    absorbed, rotated = _absorb(queries, held)
    out, lse = held.kernel.attend(absorbed, rotated, held, launch)
    return _values(out, held.w_uv), lse


def _absorb(queries: torch.Tensor, held: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries in the latents' space, contiguous, and the rotated part of them."""
    unrotated = held.sizes.unrotated
    absorbed = queries.new_empty((*queries.shape[:2], held.sizes.rank))
    torch.bmm(queries[..., :unrotated].transpose(0, 1), held.w_uk, out=absorbed.transpose(0, 1))
    return absorbed, queries[..., unrotated:]


def _values(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """From the latents' space to that of values, into float32: [rows, num_heads, value_size]."""
    inner = out.transpose(0, 1)
    if out.is_cuda:
        return torch.bmm(inner, w_uv, out_dtype=torch.float32).transpose(0, 1)
    return torch.bmm(inner.float(), w_uv.float()).transpose(0, 1)


def _over_piece(
    queries: torch.Tensor, held: Latents, starts: torch.Tensor, piece: Piece
) -> tuple[torch.Tensor, torch.Tensor]:
    """16-bit results over projected latents, as vLLM attends to a prompt's context."""
    sizes, latents = held.sizes, held.read(piece)
    inner = latents[:, : sizes.rank].expand(sizes.num_heads, -1, -1)
    keys = latents.new_empty((sizes.num_heads, piece.length, sizes.query_size))
    keys[..., : sizes.unrotated] = torch.bmm(inner, held.w_uk.transpose(1, 2))
    keys[..., sizes.unrotated :] = latents[:, sizes.rank :]
    values = torch.bmm(inner, held.w_uv)
    return attend_projected(
        queries, keys.transpose(0, 1), values.transpose(0, 1), (starts, piece.starts), held.scale, piece.causal
    )


def _over_gathered(
    queries: torch.Tensor, held: Latents, starts: torch.Tensor, piece: Piece
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over latents, as a launch over the cache has it; float32."""
    absorbed, rotated = _absorb(queries, held)
    latents = held.read(piece)
    out, lse = attend_gathered(absorbed, rotated, latents, (starts, piece.starts), held.scale, piece.causal)
    return _values(out, held.w_uv), lse


def _take_in(out: torch.Tensor, lse: torch.Tensor, outputs: torch.Tensor, lses: torch.Tensor, first: bool) -> None:
    """Merge one more piece into what there is of a row; each has a key for every query."""
    if first:
        outputs.copy_(out)
        lses.copy_(lse)
        return
    both = torch.logaddexp(lses, lse)
    before, now = (lses - both).exp_().unsqueeze(-1), (lse - both).exp_().unsqueeze(-1)
    for at in range(0, len(out), TOGETHER):
        some = slice(at, at + TOGETHER)
        outputs[some].mul_(before[some]).addcmul_(out[some].float(), now[some])
    lses.copy_(both)
