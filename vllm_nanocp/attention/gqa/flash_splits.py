# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3 with its results before they are rounded. Touches ``torch.ops._vllm_fa3_C`` of vLLM 0.32.

To keep a GPU busy, FlashAttention cuts a row's KV into pieces, whose results it keeps in float32 until it merges them
into its 16-bit output. Its operation returns them too (vLLM's ``flash_attn_varlen_func`` drops them), and the number of
pieces of a row is in its scheduler metadata: ``num_splits_dynamic``, the second vector of as many integers as the
launch has rows, rounded up to 4. A row of one piece would be written to the 16-bit output only, so no row gets fewer
than two here. None of that is documented, so ``self_check`` tries it when a worker starts.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends import fa_utils

from ...errors import UNSHARDED, NanoCPConfigError
from ..flash_launches import MIN_PIECES, ShardLaunch
from ..partial_rows import RowLayout, pack_pieces


def make_schedule(
    launch: ShardLaunch, *, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    """Divide the work of a launch; once a step, not once a layer. In place, if it was done before.

    Args:
        launch: whose ``schedule`` and ``pieces`` to write.
        num_heads, num_kv_heads, head_size: of this worker's attention.
        block_size: tokens a block holds.
        dtype: of queries and KV.
    """
    num_rows = len(launch.lengths)
    made = fa_utils.get_scheduler_metadata(
        batch_size=num_rows,
        max_seqlen_q=launch.max_queries,
        max_seqlen_k=launch.max_length,
        num_heads_q=num_heads,
        num_heads_kv=num_kv_heads,
        headdim=head_size,
        cache_seqlens=launch.lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=launch.query_starts,
        page_size=block_size,
        causal=launch.causal,
        num_splits=launch.max_pieces,
    )
    kept = launch.keep_schedule(made)
    if launch.pieces is None:
        second = -(-num_rows // 4) * 4
        launch.pieces = kept[second : second + num_rows]
    launch.pieces.clamp_(min=MIN_PIECES)


def attend_pieces(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, launch: ShardLaunch, scale: float, descale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over paged KV, a result for each piece.

    Args:
        query: [num_queries, num_heads, head_size].
        keys, values: [num_blocks, block_size, num_kv_heads, head_size].
        launch: with its schedule made.
        scale: of the scores.
        descale: factors of float8 queries, keys and values, each [num_rows, num_kv_heads] or None.

    Returns:
        float32 outputs [max_pieces, num_heads, num_queries, head_size] and natural log-sum-exps [max_pieces,
        num_heads, num_queries]. Of each row only the first ``launch.pieces`` are written.
    """
    _, _, outputs, lses = torch.ops._vllm_fa3_C.fwd(
        query, keys, values, None, None, None, None,
        launch.query_starts, None, None, None, launch.lengths, launch.max_queries, launch.max_length,
        launch.block_table, None, None, None, None, None, *descale,
        scale, launch.causal, -1, -1, 0.0, True, launch.schedule, launch.max_pieces, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return outputs, lses


def self_check(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare a small launch with attention in float32.

    Raises:
        NanoCPConfigError: this FlashAttention does not return what is expected of it.
    """
    block_size, lengths = 16, [5, 700]
    shape = (64, block_size, num_kv_heads, head_size)
    generator = torch.Generator(device).manual_seed(0)
    keys, values = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in "kv")
    query = torch.randn((2, num_heads, head_size), dtype=dtype, device=device, generator=generator)
    table = torch.randperm(63, device=device, generator=generator).to(torch.int32)[:44].expand(2, 44).contiguous() + 1
    launch = ShardLaunch(
        num_queries=2,
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table,
        max_queries=1,
        max_length=44 * block_size,
        causal=False,
        max_pieces=32,
    )
    layout = RowLayout(num_heads, head_size)
    rows = layout.empty(2, device)
    scale = head_size**-0.5
    try:
        make_schedule(
            launch, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, block_size=block_size,
            dtype=dtype,
        )  # fmt: skip
        outputs, lses = attend_pieces(query, keys, values, launch, scale, (None, None, None))
        assert launch.pieces is not None
        pack_pieces(rows, layout, outputs, lses, launch.pieces)
        for row, length in enumerate(lengths):
            held = [x[table[row].long()].flatten(0, 1)[:length].float() for x in (keys, values)]
            k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in held)
            scores = torch.einsum("hd,khd->hk", query[row].float(), k) * scale
            torch.testing.assert_close(layout.lses(rows)[row], scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
            torch.testing.assert_close(layout.outputs(rows)[row], expected, rtol=1e-2, atol=1e-2)
    except Exception as error:
        raise NanoCPConfigError(
            f"nanocp: this FlashAttention does not return the partial results that shards need ({error!r:.200}); "
            f"add --attention-backend FLASHINFER, or {UNSHARDED}"
        ) from error
