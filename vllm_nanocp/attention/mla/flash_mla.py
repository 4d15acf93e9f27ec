# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3 for latent attention: the only place that calls the vendor's kernels. Touches
``flash_attn_varlen_func`` and ``get_scheduler_metadata`` of vLLM 0.32, as its FLASH_ATTN_MLA backend does.

In the latents' space there is one KV head, of which all query heads read the same latent: its rotated part is the key,
the latent is both key (for the absorbed query, ``q_v``) and value. Results are 16 bits wide, log-sum-exps natural and
float32. A row without keys has an infinite log-sum-exp of either sign, and any output.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends import fa_utils

from ...errors import NanoCPConfigError
from ..flash_launches import ShardLaunch, pieces_that_fit
from ..merge import Partial
from .latent_kernel import Float8Scales, Latents
from .latent_sizes import LatentSizes

VERSION = 3
# FlashAttention lays out as many rows in one block of threads, and cuts none of a launch of more.
MOST_ROWS = 992


def make_schedule(launch: ShardLaunch, sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> None:
    """Let FlashAttention schedule a launch over latents, once for all layers; into the same memory if it has some.

    Args:
        launch: ``schedule`` is set, or written to.
        sizes: of the layers.
        block_size: tokens a block holds.
        dtype: of queries and cache.
    """
    made = fa_utils.get_scheduler_metadata(
        batch_size=len(launch.lengths),
        max_seqlen_q=launch.max_queries,
        max_seqlen_k=launch.max_length,
        num_heads_q=sizes.num_heads,
        num_heads_kv=1,
        headdim=sizes.rotated,
        headdim_v=sizes.rank,
        cache_seqlens=launch.lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=launch.query_starts,
        page_size=block_size,
        causal=launch.causal,
        num_splits=launch.max_pieces,
    )
    launch.keep_schedule(made)


def attend_latents(
    absorbed: torch.Tensor, rotated: torch.Tensor, cache: torch.Tensor, launch: ShardLaunch, scale: float
) -> Partial:
    """Absorbed queries over paged latents.

    Args:
        absorbed: [num_queries, num_heads, rank], contiguous.
        rotated: [num_queries, num_heads, rotated].
        cache: [num_blocks, block_size, rank + rotated].
        launch: with its schedule made.
        scale: of the scores.

    Returns:
        [num_queries, num_heads, rank], in 16 bits, and float32 [num_queries, num_heads].
    """
    rank = absorbed.shape[2]
    out, lse = fa_utils.flash_attn_varlen_func(
        q=rotated,
        k=cache[..., rank:].unsqueeze(2),
        v=cache[..., :rank].unsqueeze(2),
        q_v=absorbed,
        max_seqlen_q=launch.max_queries,
        cu_seqlens_q=launch.query_starts,
        max_seqlen_k=launch.max_length,
        seqused_k=launch.lengths,
        block_table=launch.block_table,
        softmax_scale=scale,
        causal=launch.causal,
        return_softmax_lse=True,
        fa_version=VERSION,
        scheduler_metadata=launch.schedule,
        num_splits=launch.max_pieces,
    )
    return out, lse.transpose(0, 1)


def attend_gathered(
    absorbed: torch.Tensor,
    rotated: torch.Tensor,
    latents: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    causal: bool,
) -> Partial:
    """Absorbed queries of one row over latents in one piece.

    Args:
        absorbed: [num_queries, num_heads, rank], contiguous.
        rotated: [num_queries, num_heads, rotated].
        latents: [tokens, rank + rotated], contiguous.
        starts: int32 [2], 0 and how many there are, of queries and of latents.
        scale: of the scores.
        causal: whether the queries are the last tokens of the latents.

    Returns:
        As ``attend_latents``.
    """
    rank = absorbed.shape[2]
    keys, values = latents[:, None, rank:], latents[:, None, :rank]
    return attend_projected(rotated, keys, values, starts, scale, causal, absorbed)


def attend_projected(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    causal: bool,
    of_values: torch.Tensor | None = None,
) -> Partial:
    """Queries of one row over projected keys.

    Args:
        queries, keys: [tokens, num_heads, query size], a head's numbers contiguous.
        values: [tokens, num_heads, value_size], likewise.
        starts: int32 [2], 0 and how many there are, of queries and of keys.
        scale: of the scores.
        causal: whether the queries are the last tokens of the keys.
        of_values: a further part of the queries, whose keys the values are, too: [tokens, num_heads, value_size].

    Returns:
        As ``attend_latents``, of ``value_size``.
    """
    out, lse = fa_utils.flash_attn_varlen_func(
        q=queries,
        k=keys,
        v=values,
        q_v=of_values,
        max_seqlen_q=len(queries),
        cu_seqlens_q=starts[0],
        max_seqlen_k=len(keys),
        cu_seqlens_k=starts[1],
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        fa_version=VERSION,
    )
    return out, lse.transpose(0, 1)


def warm_up_prompts(impl: Any, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
    """With 128 heads vLLM lays out the keys of prompts by FlashInfer's kernel, which is compiled when it is first
    called: seconds, in front of the first prompt and of all that decode beside it.

    Args:
        impl: vLLM's ``MLACommonImpl`` of a layer.
        sizes: of the layer.
        dtype: of its keys.
        device: where they are.
    """
    if not impl._use_flashinfer_concat_mla_k:
        return
    both = torch.zeros((1, sizes.num_heads, sizes.unrotated + sizes.value_size), dtype=dtype, device=device)
    impl._concat_k_nope_k_pe(both[..., : sizes.unrotated], both.new_zeros(1, 1, sizes.rotated))


def self_check(sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
    """Compare small launches with attention in float64: float32 products may be of TF32, where a user has set so.

    Raises:
        NanoCPConfigError: this FlashAttention does not return what is expected of it.
    """
    try:
        for causal in (False, True):
            _check_latents(sizes, dtype, device, causal)
        _check_projected(sizes, dtype, device)
    except Exception as error:
        raise NanoCPConfigError(
            "nanocp: this FlashAttention does not return the partial results of latent attention that shards need "
            f"({error!r:.200}); use --nanocp-config '{{\"max_degree\": 1}}' to serve with one scheduler and no sharding"
        ) from error


def _check_latents(sizes: LatentSizes, dtype: torch.dtype, device: torch.device, causal: bool) -> None:
    """Rows of one query, of several, as drafts are verified, and of a length that ends within a block; one without
    keys, or, causal, with no more than it has queries. Long ones are cut into pieces."""
    block_size, queries = 16, (4, 1, 3, 4, 1)
    lengths = [700, 5, 37, 4 * causal, 0]
    random, rows = torch.Generator(device).manual_seed(0), len(queries) - causal

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=random)

    cache = normal(64, block_size, sizes.rank + sizes.rotated)
    table = torch.randperm(64, device=device, generator=random).to(torch.int32)[:44].expand(rows, 44).contiguous()
    starts = [sum(queries[:row]) for row in range(rows + 1)]
    absorbed, rotated = (normal(starts[-1], sizes.num_heads, n) for n in (sizes.rank, sizes.rotated))
    launch = ShardLaunch(
        num_queries=starts[-1],
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths[:rows], dtype=torch.int32, device=device),
        block_table=table,
        max_queries=4,
        max_length=44 * block_size,
        causal=causal,
        max_pieces=32,
    )
    scale = sizes.rank**-0.5
    make_schedule(launch, sizes, block_size, dtype)
    out, lse = attend_latents(absorbed, rotated, cache, launch, scale)
    for row in range(rows):
        part, length = slice(starts[row], starts[row + 1]), lengths[row]
        if not length:
            continue
        held = cache[table[row].long()].flatten(0, 1)[:length].double()
        query = torch.cat([absorbed[part], rotated[part]], dim=-1).double()
        scores = torch.einsum("qhd,kd->qhk", query, held) * scale
        if causal:
            hidden = torch.ones(queries[row], length, dtype=torch.bool, device=device).triu(length - queries[row] + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        check_close(
            out[part], lse[part], scores, torch.einsum("qhk,kd->qhd", scores.softmax(-1), held[:, : sizes.rank])
        )


def _check_projected(sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
    random = torch.Generator(device).manual_seed(1)
    widths = (sizes.query_size, sizes.query_size, sizes.value_size)
    query, keys, values = (  # as they are made: one head after another
        torch.randn((sizes.num_heads, n, width), dtype=dtype, device=device, generator=random).transpose(0, 1)
        for n, width in zip((40, 90, 90), widths, strict=True)
    )
    starts = torch.tensor([0, 40, 0, 90], dtype=torch.int32, device=device)
    scale = sizes.query_size**-0.5
    for causal in (False, True):
        out, lse = attend_projected(query, keys, values, (starts[:2], starts[2:]), scale, causal)
        scores = torch.einsum("qhd,khd->qhk", query.double(), keys.double()) * scale
        if causal:
            hidden = torch.ones(40, 90, dtype=torch.bool, device=device).triu(90 - 40 + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        check_close(out, lse, scores, torch.einsum("qhk,khd->qhd", scores.softmax(-1), values.double()))


def check_close(out: torch.Tensor, lse: torch.Tensor, scores: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless results are those of such scores: float64, [num_queries, num_heads, keys]."""
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=1e-2)


class FlashAttention:
    """See ``LatentKernel``."""

    fewest = narrow_bytes = 0
    most_planned = 1 << 31

    @property
    def most_rows(self) -> int:
        return MOST_ROWS

    def takes(self, queries: int, sizes: LatentSizes) -> bool:
        return sizes.absorbs(queries)

    def schedule(self, launch: ShardLaunch, sizes: LatentSizes, block_size: int, dtype: torch.dtype) -> None:
        make_schedule(launch, sizes, block_size, dtype)

    def attend(self, absorbed: torch.Tensor, rotated: torch.Tensor, held: Latents, launch: ShardLaunch) -> Partial:
        return attend_latents(absorbed, rotated, held.cache, launch, held.scale)

    def scales(self, layer: Any) -> Float8Scales | None:
        return None

    def memory(self, queries: int, sizes: LatentSizes, dtype: torch.dtype) -> int:
        pieces = pieces_that_fit(queries, sizes.num_heads, sizes.rank, 1)
        return sizes.absorbed_bytes(queries, pieces, dtype.itemsize)

    def self_check(self, sizes: LatentSizes, dtype: torch.dtype, device: torch.device) -> None:
        self_check(sizes, dtype, device)


FLASH_ATTENTION = FlashAttention()
