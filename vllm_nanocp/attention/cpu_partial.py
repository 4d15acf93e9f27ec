# SPDX-License-Identifier: Apache-2.0
"""Partial attention on CPU over paged KV, with the log-sum-exp that vLLM's CPU kernel does not return.

The KV cache is vLLM 0.32's for the kernels "vec" and "vec16" (``csrc/cpu``): a block holds, for each KV head, its
keys transposed, [head_size, block_size], and then its values, [block_size, head_size].

A cache may hold numbers of another type than the model's. They are read as they are stored, as vLLM's kernel does, and
computed with in the model's type, which holds each of them exactly.
"""

from __future__ import annotations

import torch
from vllm.utils.math_utils import cdiv

from .merge import merge_partials

# Bytes of KV that few queries attend to at a time: what is gathered then stays in a core's cache. Many queries do more
# work with what they read, and the merges would cost them more.
_PIECE, _FEW = 1 << 20, 16
# What the bytes of a quantized cache are, by ``--kv-cache-dtype``.
_FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def as_stored(kv_cache: torch.Tensor, cache_dtype: str, dtype: torch.dtype) -> torch.Tensor:
    """A cache in the type of its numbers.

    vLLM's kernels go by the width alone: in a float16 cache of a bfloat16 model they keep bfloat16.

    Args:
        kv_cache: as vLLM allocates it.
        cache_dtype: its ``--kv-cache-dtype``.
        dtype: of the model.
    """
    if cache_dtype in _FLOAT8:
        return kv_cache.view(_FLOAT8[cache_dtype])
    return kv_cache.view(dtype) if kv_cache.dtype.itemsize == dtype.itemsize else kv_cache


def gather_shard(
    kv_cache: torch.Tensor, blocks: torch.Tensor, length: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a shard's first ``length`` tokens.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in the type of its numbers.
        blocks: int32 or int64 [at least ceil(length / block_size)], the shard's block ids.
        length: positive.
        dtype: of the result; None: as they are stored.

    Returns:
        Keys and values, each [num_kv_heads, length, head_size], the last dimension contiguous.
    """
    _, num_heads, block_size, twice = kv_cache.shape
    head_size = twice // 2
    used = blocks[: cdiv(length, block_size)]
    chosen = (
        kv_cache.index_select(0, used).to(dtype or kv_cache.dtype).view(len(used), num_heads, 2, block_size * head_size)
    )
    keys = chosen[:, :, 0].view(len(used), num_heads, head_size, block_size).permute(1, 0, 3, 2)
    values = chosen[:, :, 1].view(len(used), num_heads, block_size, head_size).permute(1, 0, 2, 3)
    flat = (num_heads, len(used) * block_size, head_size)
    # Not reshape: of one block it makes a view, in which a key's numbers are apart, and the kernel reads past strides.
    return keys.contiguous().view(flat)[:, :length], values.contiguous().view(flat)[:, :length]


def flash(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's kernel, with its log-sum-exp.

    Args:
        queries, keys, values: [num_heads, rows or length, head_size], the last dimension contiguous.
        scale: of the scores.
        causal: whether query i sees keys 0 to i, not all.

    Returns:
        Output as the queries, and natural log-sum-exp [num_heads, rows], float32.
    """
    # The operation itself does not check what scaled_dot_product_attention checks before it calls it.
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), 0.0, causal, attn_mask=None, scale=scale
    )
    return out[0].float(), lse[0].float()


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key.

    Args:
        queries: [rows, num_heads, head_size].
        keys, values: [num_kv_heads, length, head_size], length positive.
        scale: of the scores.

    Returns:
        Output [rows, num_heads, head_size] and natural log-sum-exp [rows, num_heads], float32.
    """
    rows, num_heads, head_size = queries.shape
    kv_heads = keys.shape[0]
    group = num_heads // kv_heads
    # The query heads of a KV head become rows of it, so that keys are read once a KV head.
    grouped = queries.view(rows, kv_heads, group, head_size).permute(1, 2, 0, 3)
    out, lse = flash(grouped.reshape(kv_heads, group * rows, head_size), keys, values, scale, causal=False)
    out = out.view(kv_heads, group, rows, head_size).permute(2, 0, 1, 3).reshape(rows, num_heads, head_size)
    return out, lse.view(kv_heads, group, rows).permute(2, 0, 1).reshape(rows, num_heads)


def attend_shard(
    queries: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key of a shard.

    Args:
        queries: [rows, num_heads, head_size].
        kv_cache, blocks, length: see ``gather_shard``.
        scale: of the scores.

    Returns:
        As ``attend``.
    """
    _, kv_heads, block_size, twice = kv_cache.shape
    step = max(1, _PIECE // (kv_heads * block_size * twice * queries.element_size()))
    if len(queries) > _FEW or length <= step * block_size:
        return attend(queries, *gather_shard(kv_cache, blocks, length, queries.dtype), scale)
    parts = []
    for first in range(0, cdiv(length, block_size), step):
        left = min(step * block_size, length - first * block_size)
        held = gather_shard(kv_cache, blocks[first : first + step], left, queries.dtype)
        parts.append(attend(queries, *held, scale))
    outputs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    return merge_partials(outputs, lses), lses.logsumexp(dim=0)


def attend_causal(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query i sees keys 0 to i: a chunk of a prompt among itself.

    Args:
        queries: [rows, num_heads, head_size].
        keys, values: [rows, num_kv_heads, head_size].
        scale: of the scores.

    Returns:
        As ``attend``.
    """
    group = queries.shape[1] // keys.shape[1]
    out, lse = flash(
        queries.transpose(0, 1),
        keys.transpose(0, 1).repeat_interleave(group, dim=0),
        values.transpose(0, 1).repeat_interleave(group, dim=0),
        scale,
        causal=True,
    )
    return out.transpose(0, 1), lse.transpose(0, 1)
