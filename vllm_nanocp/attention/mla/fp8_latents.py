# SPDX-License-Identifier: Apache-2.0
"""FlashMLA's dense kernel over latents of 8 bits: the only place that calls it. Touches ``flash_mla_with_kvcache_fp8``
and ``get_mla_metadata_dense_fp8`` of vLLM 0.32, as its FLASHMLA backend does with an fp8 cache.

Queries are absorbed, divided by the layer's scale and rounded to float8 (e4m3), as the cache's numbers are. Results are
bfloat16, log-sum-exps natural and float32. What the kernel does not do well is not asked of it:

- A row without keys: it reads the block id in front of the row's, then a block at that id, which may be anywhere, and
  what it writes of the next row can be wrong. Each row sees a key here, and what nobody asked for weighs nothing.
- Rows of several queries: all rows of a launch have as many, and a mask is put on the last two blocks of keys only.
  They attend in 16 bits, as vLLM's prompts do (``Projected``).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.ops import flashmla

from ...errors import NanoCPConfigError
from ..flash_launches import ShardLaunch
from ..merge import Partial
from . import flash_mla
from .latent_kernel import Float8Scales, Latents
from .latent_sizes import LatentSizes

FLOAT8 = torch.float8_e4m3fn
# What the kernel is made for: numbers of a latent and of the rotated key, tokens of a block.
RANK, ROTATED, BLOCK_SIZE = 512, 64, 64
# It plans fewer than 4,096 rows, by one thread; and has room for a float32 result of each.
MOST_ROWS = 2048
# Float32 results beside one of each row: of at most 64 heads for each SM of the largest GPU of this kind.
_PARTS = 132 * 64
# Bytes of latents that are read at a time for few queries, and of FlashAttention's results in pieces over them.
_GATHERED = 1 << 28


class FlashMLA:
    """See ``LatentKernel``."""

    fewest = narrow_bytes = 1

    @property
    def most_rows(self) -> int:
        return MOST_ROWS

    @property
    def most_planned(self) -> int:
        return MOST_ROWS

    def takes(self, queries: int, sizes: LatentSizes) -> bool:
        return queries == 1

    def schedule(self, launch: ShardLaunch, sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> None:
        assert launch.max_queries == 1 and block_size == BLOCK_SIZE
        parts, splits = flashmla.get_mla_metadata_dense_fp8(launch.lengths, sizes.num_heads, 1)
        launch.keep_schedule(torch.cat([parts.flatten(), splits]))

    def attend(self, absorbed: torch.Tensor, rotated: torch.Tensor, held: Latents, launch: ShardLaunch) -> Partial:
        scales, rows = held.scales, len(launch.lengths)
        assert scales is not None and launch.schedule is not None and len(absorbed) == rows
        both = torch.cat([absorbed, rotated], dim=-1)
        query, _ = ops.scaled_fp8_quant(both.flatten(1), scales.query)
        out, lse = flashmla.flash_mla_with_kvcache_fp8(
            q=query.view(both.shape).unsqueeze(1),
            k_cache=held.cache.view(FLOAT8).unsqueeze(-2),
            block_table=launch.block_table,
            cache_seqlens=launch.lengths,
            head_dim_v=absorbed.shape[2],
            tile_scheduler_metadata=launch.schedule[: -rows - 1].view(-1, 8),
            num_splits=launch.schedule[-rows - 1 :],
            softmax_scale=held.scale,
            causal=False,
            descale_q=scales.query,
            descale_k=scales.latent,
        )
        return out.squeeze(1), lse.squeeze(2)

    def scales(self, layer: Any) -> Float8Scales | None:
        return Float8Scales(layer._q_scale.reshape(1), layer._k_scale.reshape(1), layer._k_scale_float)

    def memory(self, queries: int, sizes: LatentSizes, dtype: torch.dtype) -> int:
        bytes_, width = dtype.itemsize, sizes.rank + sizes.rotated
        # Absorbed queries, those with their rotated part, in 8 bits; results in pieces and merged, and their values.
        each = sizes.rank * (2 * bytes_ + 4) + width * (bytes_ + 1) + 4 * sizes.value_size
        paged = queries * sizes.num_heads * each + 4 * _PARTS * sizes.rank
        inner = sizes.unrotated + sizes.value_size
        few = min(queries, sizes.rank * inner // max(1, 2 * sizes.rank - inner))
        return max(paged, few * sizes.num_heads * (each + 2 * bytes_ * sizes.rank) + _GATHERED)

    def self_check(self, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
        flash_mla.FLASH_ATTENTION.self_check(sizes, dtype, device)
        try:
            _check(sizes, dtype, device)
            _check_gathered(sizes, dtype, device)
        except Exception as error:
            raise NanoCPConfigError(
                "nanocp: this FlashMLA does not return the partial results over an fp8 cache that shards need "
                f"({error!r:.200}); leave --kv-cache-dtype out, or use --nanocp-config '{{\"max_degree\": 1}}' to "
                "serve with one scheduler and no sharding"
            ) from error


FLASH_MLA = FlashMLA()


def _check(sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
    """Rows that are cut and whole, that end within a block, that see one key; beside blocks of NaN."""
    lengths, random = [3000, 1, 128, 37, 700, 1], torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float32, device=device, generator=random)

    scales = Float8Scales(torch.tensor([0.05], device=device), torch.tensor([0.03], device=device), 0.03)
    numbers = (normal(60, BLOCK_SIZE, RANK + ROTATED) / scales.latent).to(FLOAT8)
    numbers[50:].view(torch.uint8).fill_(0x7F)
    table = torch.randperm(50, device=device, generator=random).to(torch.int32)
    table = torch.cat([table, table.new_full((4,), 55)]).repeat(len(lengths), 1)
    absorbed, rotated = (normal(len(lengths), sizes.num_heads, n).to(dtype) for n in (RANK, ROTATED))
    launch = ShardLaunch(
        num_queries=len(lengths),
        query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table,
        max_queries=1,
        max_length=54 * BLOCK_SIZE,
        causal=False,
        max_pieces=1,
    )
    none = absorbed.new_empty(0)
    held = Latents(numbers.view(torch.uint8), none, none, 0.5 * RANK**-0.5, sizes, FLASH_MLA, scales)
    FLASH_MLA.schedule(launch, sizes, BLOCK_SIZE, dtype)
    out, lse = FLASH_MLA.attend(absorbed, rotated, held, launch)
    assert lse.dtype == torch.float32 and out.dtype == torch.bfloat16
    query = (torch.cat([absorbed, rotated], dim=-1).float() / scales.query).to(FLOAT8).double() * scales.query
    for row, length in enumerate(lengths):
        keys = numbers[table[row, : -(-length // BLOCK_SIZE)].long()].flatten(0, 1)[:length].double() * scales.latent
        scores = query[row] @ keys.T * held.scale
        torch.testing.assert_close(lse[row], scores.logsumexp(-1).float(), rtol=1e-2, atol=3e-2)
        expected = scores.softmax(-1) @ keys[:, :RANK]
        # Its weights are of 8 bits, too.
        wrong = (out[row].double() - expected).norm() / expected.norm()
        assert wrong < 0.08, f"outputs are {wrong:.3f} from float64's"


def _check_gathered(sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
    """Few queries of one row over latents that are read from the cache before: FlashAttention, without pages."""
    random = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=random)

    absorbed, rotated, latents = normal(5, sizes.num_heads, RANK), normal(5, sizes.num_heads, ROTATED), normal(90, 576)
    starts, scale = torch.tensor([0, 5, 0, 90], dtype=torch.int32, device=device), RANK**-0.5
    for causal in (False, True):
        out, lse = flash_mla.attend_gathered(absorbed, rotated, latents, (starts[:2], starts[2:]), scale, causal)
        query = torch.cat([absorbed, rotated], dim=-1).double()
        scores = torch.einsum("qhd,kd->qhk", query, latents.double()) * scale
        if causal:
            hidden = torch.ones(5, 90, dtype=torch.bool, device=device).triu(90 - 5 + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        flash_mla.check_close(
            out, lse, scores, torch.einsum("qhk,kd->qhd", scores.softmax(-1), latents[:, :RANK].double())
        )
