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
from vllm.utils.math_utils import cdiv

from ..cpu_partial import attend, flash
from ..merge import Partial
from .latent_sizes import LatentSizes

# Bytes of projected keys and values at a time, and of latents that few queries attend to at a time.
_PROJECTED, _FEW_BYTES, _FEW = 1 << 26, 1 << 20, 16


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
        used = blocks[: cdiv(length, self.cache.shape[1])]
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
    over = _over_latents if absorbed else _over_projected
    visiting = _absorb(queries, held) if absorbed else queries
    block_size = held.cache.shape[1]
    step = max(1, _at_once(queries, held, absorbed, length) // block_size)
    whole: Partial | None = None
    for first in range(0, cdiv(length, block_size), step):
        latents = held.of(blocks[first : first + step], min(step * block_size, length - first * block_size))
        part = over(visiting, latents, held)
        whole = part if whole is None else _merged(whole, part)
    assert whole is not None
    output, lse = whole
    return (_project(output, held) if absorbed else output), lse


def _at_once(queries: torch.Tensor, held: Latents, absorbed: bool, length: int) -> int:
    """How many latents to attend to at a time."""
    heads, width = queries.shape[1:]
    if not absorbed:
        return _PROJECTED // (2 * heads * width * queries.element_size())
    if len(queries) <= _FEW:
        return _FEW_BYTES // (held.cache.shape[2] * queries.element_size())
    return length + held.cache.shape[1]  # all, with the last block's rest


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
    heads, unrotated, rank = held.w_uk.shape
    return LatentSizes(heads, unrotated, held.cache.shape[2] - rank, rank, held.w_uv.shape[2]).absorbs(rows)


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
    """From the latents' space to that of values; in the model's type, as vLLM does: the weights are large."""
    return torch.bmm(output.to(held.w_uv.dtype).transpose(0, 1), held.w_uv).float().transpose(0, 1)


def _over_projected(queries: torch.Tensor, latents: torch.Tensor, held: Latents, causal: bool = False) -> Partial:
    rank, size = held.w_uv.shape[1:]
    heads, width = queries.shape[1:]
    inner, rotated = latents[:, :rank], latents[:, rank:]
    keys = torch.cat([torch.matmul(inner, held.w_uk.transpose(1, 2)), rotated.expand(heads, *rotated.shape)], dim=-1)
    values = torch.matmul(inner, held.w_uv)
    # The kernel knows one size only; zeros change no score.
    q, k, v = (_padded(x, max(width, size)) for x in (queries.transpose(0, 1), keys, values))
    output, lse = flash(q, k, v, held.scale, causal)
    return output[..., :size].transpose(0, 1), lse.transpose(0, 1)


def _padded(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros behind each row; itself where there is nothing to add."""
    return numbers if numbers.shape[-1] == width else F.pad(numbers, (0, width - numbers.shape[-1]))


def _merged(first: Partial, second: Partial) -> Partial:
    """One partial result of two, at the place of the first: as many as a shard has pieces would not fit."""
    (output, lse), (other, other_lse) = first, second
    both = torch.logaddexp(lse, other_lse)
    output.mul_((lse - both).exp_().unsqueeze(-1)).addcmul_(other, (other_lse - both).exp_().unsqueeze(-1))
    return output, both
