# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper with an fp8 cache under ``attention_steps``: on GPUs with the real kernels; on CPU with
references in FlashMLA's place and FlashAttention's, under vLLM's own code as well."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import mla_attention
from vllm.v1.attention.ops import flashmla

from tests.unit import flash_latent_steps as flash
from tests.unit.attention_steps import Kernel, run_scenarios
from tests.unit.latent_steps import LatentShape, bare_layer, builder_values, latent_shape

FLOAT8 = torch.float8_e4m3fn
PARTS = 5  # multiprocessors, so to say
Q_SCALE = 0.04
_SIGNATURES = {
    name: inspect.signature(getattr(module, name))
    for module, name in (
        (flashmla, "get_mla_metadata_dense_fp8"),
        (flashmla, "flash_mla_with_kvcache_fp8"),
        (ops, "gather_and_maybe_dequant_cache"),
    )
}


def fp8_shape(num_heads: int, unrotated: int, value_size: int) -> LatentShape:
    more: dict[str, Any] = dict(dtype=torch.bfloat16, block_size=64, cache_dtype="fp8")
    return latent_shape(num_heads, unrotated, value_size, **more)


def reference_plan(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds what the launch must be called with."""
    call = _SIGNATURES["get_mla_metadata_dense_fp8"].bind(*args, **kwargs).arguments
    lengths = call["cache_seqlens"]
    assert lengths.dtype == torch.int32 and lengths.is_contiguous() and call["num_heads_k"] == 1
    assert len(lengths) < 4096, "more rows than are planned"
    parts = torch.full((PARTS, 8), -7, dtype=torch.int32)
    parts[0, 0], parts[0, 1], parts[0, 2] = len(lengths), call["num_q_tokens_per_head_k"], int(lengths.sum())
    return parts, torch.arange(len(lengths) + 1, dtype=torch.int32)


def reference_flash_mla(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's dense kernel for float8: weights of 8 bits, outputs of bfloat16, natural log-sum-exps
    [rows, num_heads, queries]. vLLM asks it for short prompts too, several queries a row. A row without keys reads a
    block id in front of its own, and harms the next: vLLM has such rows behind all others only, as padding."""
    bound = _SIGNATURES["flash_mla_with_kvcache_fp8"].bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    q, cache, table, lengths = (call[name] for name in ("q", "k_cache", "block_table", "cache_seqlens"))
    rows, queries, heads, width = q.shape
    assert q.dtype == cache.dtype == FLOAT8 and q.is_contiguous() and width == 576
    assert cache.shape[1:] == (64, 1, 576) and call["head_dim_v"] == 512
    assert table.dtype == lengths.dtype == torch.int32 and table.stride(1) == 1 and lengths.is_contiguous()
    assert len(table) == len(lengths) == rows
    used = int((lengths > 0).sum())
    assert used and (lengths[:used] > 0).all(), "a row without keys"
    parts, splits = call["tile_scheduler_metadata"], call["num_splits"]
    assert parts.shape == (PARTS, 8) and parts.is_contiguous() and splits.shape == (rows + 1,)
    assert parts[0, :3].tolist() == [rows, queries * heads, int(lengths.sum())], "planned for another launch"
    assert splits.tolist() == list(range(rows + 1))
    for scale in (call["descale_q"], call["descale_k"]):
        assert scale.shape == (1,) and scale.dtype == torch.float32
    out = torch.full((rows, queries, heads, 512), float("nan"), dtype=torch.bfloat16)
    lse = torch.full((rows, heads, queries), 7.0)
    for row, length in enumerate(lengths[:used].tolist()):
        blocks = table[row, : -(-length // 64)].long()
        keys = cache.view(torch.uint8)[blocks].flatten(0, 2)[:length].view(FLOAT8).float()
        scores = q[row].float() @ keys.T * (call["descale_q"] * call["descale_k"] * call["softmax_scale"])
        if queries > 1:
            assert call["causal"] and queries <= min(128, length)
            hidden = torch.ones(queries, length, dtype=torch.bool).triu(length - queries + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        lse[row] = scores.logsumexp(-1).T
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = weights.to(FLOAT8).float() @ keys[:, :512] * call["descale_k"]
        out[row] = (mixed / weights.sum(-1, keepdim=True)).bfloat16()
    return out, lse


def reference_quantize(
    numbers: torch.Tensor, scale: torch.Tensor | None = None, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """To float8, with one scale; what does not fit is the largest number."""
    assert scale is not None and scale.numel() == 1 and numbers.ndim == 2
    return (numbers.float() / scale).clamp(-448, 448).to(FLOAT8), scale


def reference_gather(*args: Any, **kwargs: Any) -> None:
    """vLLM's copy of a prompt's context into its workspace."""
    call = _SIGNATURES["gather_and_maybe_dequant_cache"].bind(*args, **kwargs).arguments
    cache, ends, size = call["src_cache"], call["cu_seq_lens"].tolist(), call["src_cache"].shape[1]
    assert call["kv_cache_dtype"] == "fp8" and cache.dtype == FLOAT8
    for row, start in enumerate(call["seq_starts"].tolist()):
        positions = torch.arange(start, start + ends[row + 1] - ends[row])
        blocks = call["block_table"][row].long()[positions // size]
        found = cache.view(torch.uint8)[blocks, positions % size].view(FLOAT8).float() * call["scale"]
        call["dst"][ends[row] : ends[row + 1]] = found.to(call["dst"].dtype)


if not flash.CUDA:  # before vLLM's backend takes them by name
    flashmla.get_mla_metadata = lambda *_, **__: (SimpleNamespace(), None)
    flashmla.get_mla_metadata_dense_fp8 = reference_plan
    flashmla.flash_mla_with_kvcache_fp8 = reference_flash_mla
    ops.gather_and_maybe_dequant_cache = reference_gather
    ops.scaled_fp8_quant = reference_quantize

from vllm.v1.attention.backends.mla.flashmla import FlashMLAImpl, FlashMLAMetadata  # noqa: E402

from vllm_nanocp.attention.mla.flashmla_backend import (  # noqa: E402
    LatentOfFloat8OnHopper,
    NanoCPFlashMLABackend,
    NanoCPFlashMLAMetadataBuilder,
)


def bare_family(shape: LatentShape) -> LatentOfFloat8OnHopper:
    """Without the engine's configuration."""
    family = object.__new__(LatentOfFloat8OnHopper)
    family.sizes, family.dtype = flash.sizes_of(shape), shape.dtype
    return family


def make_builder(shape: LatentShape, device: torch.device, threshold: int) -> NanoCPFlashMLAMetadataBuilder:
    """As ``flash_latent_steps.make_builder``."""
    builder = object.__new__(NanoCPFlashMLAMetadataBuilder)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PARTS
    graphs = SimpleNamespace(has_full_cudagraphs=lambda: True)
    builder.__dict__.update(
        builder_values(shape, flash.make_prefill(shape), device),
        metadata_cls=FlashMLAMetadata,
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=flash.MAX_REQS)),
        compilation_config=SimpleNamespace(cudagraph_mode=graphs),
        reorder_batch_threshold=threshold,
        num_q_heads=shape.num_heads,
        is_fp8_kvcache=True,
        cg_buf_tile_scheduler_metadata=torch.zeros((units, 8), dtype=torch.int32, device=device),
        cg_buf_num_splits=torch.empty(flash.MAX_REQS + 1, dtype=torch.int32, device=device),
    )
    return builder


def _quantized(absorbed: torch.Tensor, rotated: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """vLLM's operation on queries, uncompiled."""
    both = torch.cat([absorbed, rotated], dim=-1)
    return ops.scaled_fp8_quant(both.flatten(1), scale)[0].view(both.shape)


@functools.cache
def make_layer(shape: LatentShape, device: torch.device) -> Any:
    """vLLM's layer, taken over as a worker does it."""
    layer = bare_layer(shape, NanoCPFlashMLABackend, FlashMLAImpl, device)
    scale = shape.cache_scales[0]
    layer.impl.__dict__.update(kv_cache_dtype=shape.cache_dtype, supports_quant_query_input=True)
    layer.__dict__.update(
        kv_cache_dtype=shape.cache_dtype,
        prefill_backend=flash.make_prefill(shape),
        _decode_concat_quant_fp8_op=_quantized,
        _q_scale=torch.tensor(Q_SCALE, device=device),
        _k_scale=torch.tensor(scale, device=device),
        _v_scale=torch.tensor(scale, device=device),
        _k_scale_float=scale,
    )
    bare_family(shape).attach({"l": layer})
    return layer


class _AsOnGPUs:
    """vLLM's platform, but for the question where a prompt's context is copied on CPU."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: False) if name == "is_cpu" else getattr(_platform, name)


_platform = mla_attention.current_platform


def kernel_of(device: str = "cpu", **args: Any) -> Kernel:
    """As ``flash_latent_steps.kernel_of``."""
    if device == "cpu":
        mla_attention.current_platform = _AsOnGPUs()  # type: ignore[assignment]
    return flash.kernel_of(device, make=(make_builder, make_layer), **args)


def run_modes(
    rank: int, size: int, modes: dict[str, tuple[dict[str, Any], list[tuple[LatentShape, int, bool]]]]
) -> dict[str, tuple[dict[str, int], list[tuple[int, float]]]]:
    """As ``flash_latent_steps.run_modes``."""
    results = {}
    for name, (args, specs) in modes.items():
        results |= run_scenarios(rank, size, {name: specs}, functools.partial(kernel_of, **args))  # type: ignore[arg-type]
    return results
