# SPDX-License-Identifier: Apache-2.0
"""Partial latent attention on CPU over a paged cache of latents, in the space of values.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one latent and one rotated key a token. A head's key
is the latent's projection by ``W_UK`` with the rotated key behind, its value the projection by ``W_UV``. Either the
latents are projected, as many as there are keys; or, since both projections are linear, the query is taken into their
space and the result out of it (absorbed), as often as there are queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .cpu_partial import attend, flash
from .merge import merge_partials

# Bytes of projected keys and values at a time, and of latents that few queries attend to at a time.
_PROJECTED, _FEW_BYTES, _FEW = 1 << 26, 1 << 20, 16

Partial = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Latents:
    """What a layer's queries attend to.

    Attributes:
        cache: [num_blocks, block_size, rank + rotated], rank: the latents' size, rotated: the rotated keys'.
        w_uk: [num_heads, unrotated, rank], unrotated: the rest of a head's query.
        w_uv: [num_heads, rank, value_size].
        scale: of the scores.
    """

    cache: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    scale: float

    def of(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """[length, rank + rotated]: of the first tokens of some blocks."""
        used = blocks[: -(-length // self.cache.shape[1])]
        return self.cache.index_select(0, used).flatten(0, 1)[:length]


def attend_shard(queries: torch.Tensor, held: Latents, blocks: torch.Tensor, length: int) -> Partial:
    """Every query sees every key of a shard.

    Args:
        queries: [rows, num_heads, unrotated + rotated].
        held: the cache and the projections.
        blocks: int32 or int64, the shard's block ids in order.
        length: KV tokens, positive.

    Returns:
        Output [rows, num_heads, value_size] and natural log-sum-exp [rows, num_heads], float32.
    """
    absorbed = _absorbs(len(queries), held)
    if absorbed:
        visiting, at_once = _absorb(queries, held), _FEW_BYTES // (held.cache.shape[2] * queries.element_size())
        at_once = at_once if len(queries) <= _FEW else length
    else:
        heads, width = queries.shape[1:]
        visiting, at_once = queries, _PROJECTED // (2 * heads * width * queries.element_size())
    block_size = held.cache.shape[1]
    step = max(1, at_once // block_size)
    parts: list[Partial] = []
    for first in range(0, -(-length // block_size), step):
        latents = held.of(blocks[first : first + step], min(step * block_size, length - first * block_size))
        parts.append(_over_latents(visiting, latents, held) if absorbed else _over_projected(queries, latents, held))
    output, lse = parts[0] if len(parts) == 1 else _merged(parts)
    return (_project(output, held) if absorbed else output), lse


def attend_new(queries: torch.Tensor, latents: torch.Tensor, held: Latents) -> Partial:
    """Query i sees keys 0 to i: a chunk of a prompt among itself.

    Args:
        queries: [rows, num_heads, unrotated + rotated].
        latents: [rows, rank + rotated], of the same tokens.
        held: for its projections.

    Returns:
        As ``attend_shard``.
    """
    return _over_projected(queries, latents, held, causal=True)


def _absorbs(rows: int, held: Latents) -> bool:
    """Whether it is less work to attend in the latents' space than to project the latents, for each key and head."""
    _, unrotated, rank = held.w_uk.shape
    values = held.w_uv.shape[2]
    return rows * (2 * rank - unrotated - values) <= rank * (unrotated + values)


def _absorb(queries: torch.Tensor, held: Latents) -> torch.Tensor:
    """[rows, num_heads, rank + rotated]: queries that attend to latents as they are."""
    unrotated = held.w_uk.shape[1]
    inner = torch.bmm(queries[..., :unrotated].transpose(0, 1), held.w_uk)
    return torch.cat([inner.transpose(0, 1), queries[..., unrotated:]], dim=-1)


def _over_latents(queries: torch.Tensor, latents: torch.Tensor, held: Latents) -> Partial:
    """In the latents' space: [rows, num_heads, rank]."""
    output, lse = attend(queries, latents[None], latents[None], held.scale)
    return output[..., : held.w_uv.shape[1]], lse


def _project(output: torch.Tensor, held: Latents) -> torch.Tensor:
    """From the latents' space to that of values, in float32."""
    return torch.bmm(output.transpose(0, 1), held.w_uv.float()).transpose(0, 1)


def _over_projected(queries: torch.Tensor, latents: torch.Tensor, held: Latents, causal: bool = False) -> Partial:
    rank, size = held.w_uv.shape[1:]
    heads, width = queries.shape[1:]
    inner, rotated = latents[:, :rank], latents[:, rank:]
    keys = torch.cat([torch.matmul(inner, held.w_uk.transpose(1, 2)), rotated.expand(heads, *rotated.shape)], dim=-1)
    values = torch.matmul(inner, held.w_uv)
    # The kernel knows one size only; zeros change no score.
    q, k, v = (F.pad(x, (0, max(width, size) - x.shape[-1])) for x in (queries.transpose(0, 1), keys, values))
    output, lse = flash(q, k, v, held.scale, causal)
    return output[..., :size].transpose(0, 1), lse.transpose(0, 1)


def _merged(parts: list[Partial]) -> Partial:
    outputs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    return merge_partials(outputs, lses), lses.logsumexp(dim=0)
