# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention on Hopper GPUs with an fp8 cache. Touches
``vllm/v1/attention/backends/mla/flashmla.py`` of vLLM 0.32, which vLLM takes then: FLASH_ATTN_MLA reads no such cache.

All but the kernel is that of ``flash_backend.py``. vLLM plans a launch on the device, once a step and outside of
graphs, into memory that a graph knows; the tables here do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backends.mla.flashmla import FlashMLABackend, FlashMLAMetadata, FlashMLAMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..cache_dtypes import FLOAT8_CACHES
from ..supported import one_scale_problem
from .flash_backend import LatentOnHopper, LatentTables
from .fp8_latents import FLASH_MLA, RANK, ROTATED
from .latent_tables import LatentRows


@dataclass
class ShardedFlashMLAMetadata(FlashMLAMetadata):
    """Stock metadata, with the tables of a sharded step."""

    sharded: LatentRows | None = field(default=None)


class NanoCPFlashMLABackend(FlashMLABackend):
    """Registered in place of FLASHMLA."""

    @staticmethod
    def get_builder_cls() -> type[NanoCPFlashMLAMetadataBuilder]:
        return NanoCPFlashMLAMetadataBuilder


class NanoCPFlashMLAMetadataBuilder(LatentTables, FlashMLAMetadataBuilder):
    """See ``LatentTables``."""

    sharded_metadata = ShardedFlashMLAMetadata
    kernel = FLASH_MLA


class LatentOfFloat8OnHopper(LatentOnHopper):
    """See ``GPUFamily``."""

    cache_dtypes: tuple[str, ...] = FLOAT8_CACHES
    unrouted = "nobody has run an engine with the routed exchange and latents of 8 bits"
    stock = AttentionBackendEnum.FLASHMLA
    backend = NanoCPFlashMLABackend
    kernel = FLASH_MLA

    def problem(self, layer: Any) -> tuple[str, str] | None:
        found = super().problem(layer) or one_scale_problem(layer)
        if found is not None:
            return found
        rank, rotated = self.sizes.rank, self.sizes.rotated
        if (rank, rotated) != (RANK, ROTATED):
            return (
                f"an fp8 cache of latents of {rank} and rotated keys of {rotated} numbers",
                f"FLASHMLA takes {RANK} and {ROTATED}",
            )
        if self.dtype != torch.bfloat16:
            return f"an fp8 cache of latents with a model of {self.dtype}", "FLASHMLA returns bfloat16"
        return None
