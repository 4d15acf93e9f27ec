# SPDX-License-Identifier: Apache-2.0
"""What attends in the space of latents, as tables and layers ask it, and to what: ``flash_mla.py`` attends over a cache
of 16 bits, ``fp8_latents.py`` over one of 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..flash_launches import ShardLaunch
from ..merge import Partial
from .latent_sizes import LatentSizes


@dataclass(frozen=True)
class Float8Scales:
    """What the numbers of a layer are divided by before 8 bits keep them.

    Attributes:
        query: float32 [1], of absorbed queries with their rotated part.
        latent: float32 [1], of the cache.
        latent_on_host: the same number, for what is no kernel's of vLLM.
    """

    query: torch.Tensor
    latent: torch.Tensor
    latent_on_host: float


class LatentKernel(Protocol):
    """A vendor's kernel over a paged cache of latents.

    Attributes:
        most_rows: of one launch over places.
        most_planned: of any launch.
        fewest: keys that each row of a launch has to see, also one that nobody uses.
        narrow_bytes: of a number in the cache, where it has to be widened before other kernels read it; else 0.
    """

    @property
    def most_rows(self) -> int: ...

    @property
    def most_planned(self) -> int: ...

    @property
    def fewest(self) -> int: ...

    @property
    def narrow_bytes(self) -> int: ...

    def takes(self, queries: int, sizes: LatentSizes) -> bool:
        """Whether it attends for a row of so many queries."""
        ...

    def schedule(self, launch: ShardLaunch, sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> None:
        """Plan a launch, once for all layers, on the device; into the same memory if it has some. Nothing waits.

        Args:
            launch: ``schedule`` is set, or written to.
            sizes: of the layers.
            block_size: tokens a block holds.
            dtype: of queries.
        """
        ...

    def attend(self, absorbed: torch.Tensor, rotated: torch.Tensor, held: Latents, launch: ShardLaunch) -> Partial:
        """Absorbed queries over paged latents.

        Args:
            absorbed: [num_queries, num_heads, rank], contiguous.
            rotated: [num_queries, num_heads, rotated].
            held: the layer's.
            launch: scheduled.

        Returns:
            [num_queries, num_heads, rank], in 16 bits, and natural log-sum-exps, float32 [num_queries, num_heads]; of
            rows without keys both may be anything.
        """
        ...

    def scales(self, layer: Any) -> Float8Scales | None:
        """Of vLLM's layer; None where the cache has 16 bits."""
        ...

    def memory(self, queries: int, sizes: LatentSizes, dtype: torch.dtype) -> int:
        """Bytes that launches of so many queries outside of graphs take, and what is done with their results."""
        ...

    def self_check(self, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
        """Compare small launches with attention in float64.

        Raises:
            NanoCPConfigError: the kernels do not return what is expected of them.
        """
        ...


@dataclass
class Latents:
    """What a layer's queries attend to.

    Attributes:
        cache: [num_blocks, block_size, rank + rotated]; uint8 where it holds float8.
        w_uk: [num_heads, unrotated, rank].
        w_uv: [num_heads, rank, value_size].
        scale: of the scores.
        sizes: of the layer, or of a group of its heads.
        kernel: attends over the cache.
        scales: of a cache of float8; None: it has the model's type.
        new: of the batch's own tokens, not yet rounded for the cache: [tokens, rank] and [tokens, 1, rotated].
    """

    cache: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    scale: float
    sizes: LatentSizes
    kernel: LatentKernel
    scales: Float8Scales | None = None
    new: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, piece: Piece) -> torch.Tensor:
        """[length, rank + rotated], in the model's type. A prompt's own tokens are the batch's, as vLLM has it."""
        if piece.causal:
            assert self.new is not None
            latents, rotated = self.new
            here = slice(piece.token, piece.token + piece.length)
            return torch.cat([latents[here], rotated[here, 0]], dim=-1)
        found = self.cache.index_select(0, piece.blocks).flatten(0, 1)[piece.skip : piece.skip + piece.length]
        if self.scales is None:
            return found
        numbers = found.view(torch.float8_e4m3fn).to(self.w_uk.dtype)
        return numbers.mul_(self.scales.latent_on_host)


@dataclass
class Piece:
    """Some consecutive tokens held here, which are read together.

    Attributes:
        blocks: int32, the ids of the blocks they lie in.
        skip: tokens of these blocks before them.
        length: positive.
        starts: int32 [2]: 0 and ``length``.
        causal: whether they are the queries' own tokens: those of the batch from ``token`` on, in no block.
        token: see ``causal``.
    """

    blocks: torch.Tensor
    skip: int
    length: int
    starts: torch.Tensor
    causal: bool
    token: int = 0
