# SPDX-License-Identifier: Apache-2.0
"""What attends in the space of latents, as tables and layers ask it: ``flash_mla.py`` over a cache of 16 bits,
``fp8_latents.py`` over one of 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..flash_launches import ShardLaunch
from ..merge import Partial
from .latent_sizes import LatentSizes

if TYPE_CHECKING:
    from .flash_latent import Latents


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
        fewest: keys that each row of a launch has to see, also one that nobody uses.
        narrow_bytes: of a number in the cache, where it has to be widened before other kernels read it; else 0.
    """

    @property
    def most_rows(self) -> int: ...

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
