# SPDX-License-Identifier: Apache-2.0
"""The FlashAttention backend under ``attention_steps``: on GPUs with the real kernels, on CPU with references for the
three kernels it calls, so that all its tables, layouts and merges run on any machine."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import fa_utils, flash_attn

from tests.unit.attention_steps import Kernel, Shape
from vllm_nanocp.attention import partials
from vllm_nanocp.attention.flash_backend import NanoCPFlashAttentionImpl, NanoCPFlashAttentionMetadataBuilder

MAX_REQS = 64


def make_builder(shape: Shape, device: torch.device) -> NanoCPFlashAttentionMetadataBuilder:
    """A metadata builder without the engine's configuration."""
    cuda = device.type == "cuda"
    values: dict[str, Any] = {
        "block_size": shape.block_size,
        "num_heads_q": shape.num_heads,
        "num_heads_kv": shape.num_kv_heads,
        "headdim": shape.head_size,
        "kv_cache_dtype": shape.dtype,
        "model_config": SimpleNamespace(dtype=shape.dtype),
        "cache_config": SimpleNamespace(num_gpu_blocks=80, cache_dtype="auto"),
        "vllm_config": SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS)),
        "device": device,
        "aot_schedule": cuda,
        "aot_sliding_window": (-1, -1),
        "use_full_cuda_graph": cuda,
        "max_cudagraph_size": MAX_REQS,
        "max_num_splits": 32 if cuda else 0,
        "scheduler_metadata": torch.zeros(1 + 16 * MAX_REQS, dtype=torch.int32, device=device),
        "dcp_world_size": 1,
        "rswa_window": None,
        "mm_prefix_query_ranges_np": None,
    }
    builder = object.__new__(NanoCPFlashAttentionMetadataBuilder)
    builder.__dict__.update(values)
    return builder


def make_impl(shape: Shape) -> NanoCPFlashAttentionImpl:
    """An attention implementation without the engine's configuration."""
    values: dict[str, Any] = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "num_queries_per_kv": shape.num_heads // shape.num_kv_heads,
        "head_size": shape.head_size,
        "scale": shape.scale,
        "alibi_slopes": None,
        "sliding_window": (-1, -1),
        "logits_soft_cap": 0,
        "kv_cache_dtype": "auto",
        "attn_type": AttentionType.DECODER,
        "sinks": None,
        "fa4_hd256": False,
        "vllm_flash_attn_version": 3,
        "supports_quant_query_input": False,
        "dcp_world_size": 1,
    }
    impl = object.__new__(NanoCPFlashAttentionImpl)
    impl.__dict__.update(values)
    return impl


def make_layer(device: torch.device) -> Any:
    one = torch.ones(1, device=device)
    return SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)


def write(impl: Any, layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    """vLLM's operation on GPUs; the same on CPU, where it does not exist."""
    if cache.is_cuda:
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
        return
    size = cache.shape[2]
    block, at = slots // size, slots % size
    cache[block, :, at] = torch.cat([keys, values], dim=-1)


def reference_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_attn_varlen_func`` over paged KV. What it leaves unwritten, and what it writes for no keys, is NaN."""
    out.fill_(float("nan"))
    lse = torch.full((q.shape[1], len(q)), float("nan"))
    group = q.shape[1] // k.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        queries = q[starts[row] : starts[row + 1]].double()
        if not length or not len(queries):
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (x[blocks].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        if causal:
            last = length - len(queries) + torch.arange(len(queries))
            scores.masked_fill_(torch.arange(length)[None, :] > last[:, None], float("-inf"))
        part = slice(starts[row], starts[row + 1])
        lse[:, part] = scores.logsumexp(-1).float()
        out[part] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
    return out, lse


def reference_merge(outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """FlashInfer's merge, which wants contiguous inputs and multiplies whatever has no weight by 0."""
    assert outputs.is_contiguous() and lses.is_contiguous() and lses.dtype == torch.float32
    assert lses.isfinite().all() and outputs.isfinite().all()
    weights = (lses.double() * 0.6931471805599453).softmax(1)
    return (weights.unsqueeze(-1) * outputs.double()).sum(1).to(outputs.dtype)


def use_references() -> None:
    """In this process, which has no GPU."""
    flash_attn.flash_attn_varlen_func = reference_flash  # type: ignore[attr-defined]
    fa_utils.flash_attn_varlen_func = reference_flash  # type: ignore[attr-defined]
    partials.merge_states = reference_merge


def flash_kernel(device: str = "cpu", capacity: int = 0) -> Kernel:
    """The backend on a device; on CPU with references in place of kernels."""
    where = torch.device(device)
    if where.type == "cpu":
        use_references()
    # One builder for all scenarios of a shape: what one step leaves in its tables must not show in the next.
    builder = functools.cache(lambda shape: make_builder(shape, where))
    return Kernel(
        builder,
        make_impl,
        lambda _: make_layer(where),
        write,
        where,
        lambda impl, *args: impl.forward(*args),
        capacity,
        16 if capacity else 0,
    )
