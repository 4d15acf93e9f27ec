# SPDX-License-Identifier: Apache-2.0
"""Latent attention under ``attention_steps``: vLLM's layer and metadata builder of it, without an engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLADims
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from tests.unit.attention_steps import Kernel, Shape, full_attention
from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.mla.cpu_backend import LatentOnCPU, NanoCPCPUMLABackend, NanoCPCPUMLAMetadataBuilder

CPU = torch.device("cpu")
WORKSPACE = 256  # tokens of a chunk of context in vLLM's own path


@dataclass(frozen=True)
class LatentShape(Shape):
    """Keys of a scenario are latents with the rotated keys behind, ``rank`` + ``rotated`` wide; its values are unused.

    ``head_size`` is that of queries: unrotated and rotated.
    """

    rank: int = 512
    rotated: int = 64
    value_size: int = 32
    decodes_first = True
    nearest = True

    @property
    def cache_scales(self) -> tuple[float, float]:
        return (0.05, 1.0) if self.cache_dtype.startswith("fp8") else (1.0, 1.0)

    def from_cache(self, first: int, queries: int) -> int | None:
        """A prompt's new latents are not read from a cache of float8."""
        return first if queries > 1 and self.cache_dtype.startswith("fp8") else None

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.head_size, self.rank + self.rotated, 1

    @property
    def result_width(self) -> int:
        return self.value_size

    def cache_size(self, num_blocks: int) -> tuple[int, ...]:
        return num_blocks, self.block_size, self.rank + self.rotated

    @functools.cached_property
    def projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``W_UK`` [num_heads, unrotated, rank] and ``W_UV`` [num_heads, rank, value_size]."""
        generator = torch.Generator().manual_seed(self.num_heads)
        unrotated = self.head_size - self.rotated
        sizes = ((self.num_heads, unrotated, self.rank), (self.num_heads, self.rank, self.value_size))
        return tuple((torch.randn(s, generator=generator) * self.rank**-0.5).to(self.dtype) for s in sizes)  # type: ignore[return-value]

    @functools.cached_property
    def _exact_projections(self) -> tuple[torch.Tensor, ...]:
        return tuple(w.double() for w in self.projections)

    def projected(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of latents [tokens, 1, rank + rotated], in float64: [tokens, num_heads, ...]."""
        w_uk, w_uv = self._exact_projections
        inner, rotated = latents[:, 0].double().split([self.rank, self.rotated], dim=-1)
        keys = torch.einsum("tl,npl->tnp", inner, w_uk)
        keys = torch.cat([keys, rotated[:, None].expand(-1, self.num_heads, -1)], dim=-1)
        return keys, torch.einsum("tl,nlv->tnv", inner, w_uv)

    def attention(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        return full_attention(queries, *self.projected(keys), first, self.scale)


def latent_shape(num_heads: int, unrotated: int, value_size: int, **more: Any) -> LatentShape:
    return LatentShape(num_heads, 1, unrotated + 64, **{"block_size": 16, "value_size": value_size} | more)


def make_builder(shape: LatentShape) -> NanoCPCPUMLAMetadataBuilder:
    """A metadata builder without the engine's configuration."""
    prefill = object.__new__(CPUSDPAMLAPrefillBackend)
    prefill.__dict__.update(scale=shape.scale, num_heads=shape.num_heads)
    builder = object.__new__(NanoCPCPUMLAMetadataBuilder)
    builder.__dict__.update(builder_values(shape, prefill, CPU), metadata_cls=MLACommonMetadata)
    return builder


def builder_values(shape: LatentShape, prefill: Any, device: torch.device) -> dict[str, Any]:
    """Attributes of any metadata builder of latent attention."""
    return {
        "model_config": SimpleNamespace(
            dtype=shape.dtype, max_model_len=640, get_head_size=lambda: shape.rank + shape.rotated
        ),
        "device": device,
        "use_pcp": False,
        "non_causal_multi_token_decode": False,
        "num_heads": shape.num_heads,
        "mla_dims": MLADims(None, shape.rank, shape.head_size - shape.rotated, shape.rotated, shape.value_size),
        "q_data_type": shape.dtype,
        "dcp_world_size": 1,
        "dcp_local_block_size": 1,
        "dcp_virtual_block_size": 1,
        "cp_kv_cache_interleave_size": 1,
        "dcp_manager": None,
        "page_size": shape.block_size,
        "chunked_prefill_workspace_size": WORKSPACE,
        "chunked_prefill_workspace": torch.empty(
            WORKSPACE, shape.rank + shape.rotated, dtype=shape.dtype, device=device
        ),
        "_prefill_backend": prefill,
    }


class _Projection:
    """vLLM's linear layer from latents to keys and values."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.both, self.params_dtype = weight, weight.dtype

    def __call__(self, latents: torch.Tensor) -> tuple[torch.Tensor, None]:
        return latents @ self.both, None


def bare_layer(shape: LatentShape, backend: type[Any], impl_type: type[Any], device: torch.device = CPU) -> Any:
    """vLLM's layer on a backend, without the engine's configuration."""
    w_uk, w_uv = (w.to(device) for w in shape.projections)
    both = torch.cat([w_uk.transpose(1, 2), w_uv], dim=-1).transpose(0, 1).flatten(1)

    impl = object.__new__(impl_type)
    sizes = {
        "num_heads": shape.num_heads,
        "scale": shape.scale,
        "kv_cache_dtype": "auto",
        "kv_lora_rank": shape.rank,
        "qk_nope_head_dim": shape.head_size - shape.rotated,
        "qk_rope_head_dim": shape.rotated,
        "qk_head_dim": shape.head_size,
        "v_head_dim": shape.value_size,
        "kv_b_proj": _Projection(both),
    }
    impl.__dict__.update(
        sizes,
        head_size=shape.rank + shape.rotated,
        q_lora_rank=None,
        dcp_world_size=1,
        dcp_rank=0,
        q_pad_num_heads=None,
        supports_quant_query_input=False,
        _use_flashinfer_concat_mla_k=False,
        _pad_v=False,
        num_kv_heads=1,
        indexer=None,
        cp_kv_cache_interleave_size=1,
    )
    layer = object.__new__(MLAAttention)
    torch.nn.Module.__init__(layer)
    layer.__dict__.update(
        sizes,
        attn_backend=backend,
        impl=impl,
        W_UK_T=w_uk,
        W_UV=w_uv,
        q_pad_num_heads=None,
        use_pcp=False,
        use_sparse=False,
        prefill_backend=None,
        sliding_window=None,
        non_causal_multi_token_decode=False,
        dcp_manager=None,
        hisparse_cache=None,
        is_aiter_triton_fp4_bmm_enabled=False,
        is_aiter_triton_fp8_bmm_enabled=False,
        is_amx_bmm_enabled=False,
        _k_scale=torch.ones((), device=device),
    )
    return layer


def make_layer(shape: LatentShape) -> Any:
    """vLLM's layer, taken over as a worker does it."""
    layer = bare_layer(shape, NanoCPCPUMLABackend, CPUMLAImpl)
    LatentOnCPU().attach({"l": layer})
    return layer


def write(impl: Any, layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    if not cache.is_cuda and not isinstance(layer.impl, CPUMLAImpl):  # an operation of GPUs only
        numbers = keys[:, 0]
        if cache.dtype == torch.uint8:
            numbers = (numbers.float() / layer._k_scale).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slots // cache.shape[1], slots % cache.shape[1]] = numbers
        return
    latents, rotated = keys[:, 0, :-64], keys[..., -64:]
    layer.impl.do_kv_cache_update(latents, rotated, cache, slots, layer.kv_cache_dtype, layer._k_scale)


def forward(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
) -> None:
    layer.forward_impl(query, keys[:, 0, :-64], keys[..., -64:], cache, metadata, output=output.flatten(1))


_layers: dict[LatentShape, Any] = {}


def _layer_of(shape: LatentShape) -> Any:
    if shape not in _layers:
        _layers[shape] = make_layer(shape)
    return _layers[shape]


def stock_attention(
    shape: LatentShape, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float
) -> torch.Tensor:
    """vLLM's own, of the last queries of one request, as a decode or as a prompt's chunk behind what is cached."""
    return one_request(shape, make_builder(shape), _layer_of(shape), queries, keys, first)


def one_request(
    shape: LatentShape, builder: Any, layer: Any, queries: torch.Tensor, keys: torch.Tensor, first: int
) -> torch.Tensor:
    """A layer's attention of the last queries of one request, unsharded, where its weights are."""
    count, length, device = len(queries), len(keys), layer.W_UV.device
    blocks = -(-length // shape.block_size)
    cache = torch.zeros(shape.cache_size(blocks), dtype=shape.cache_type, device=device)
    queries, keys = queries.to(device), keys.to(device, shape.dtype)
    write(None, layer, keys, keys, cache, torch.arange(length, device=device))
    starts = torch.tensor([0, count], dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        num_reqs=1,
        num_actual_tokens=count,
        max_query_len=count,
        max_seq_len=length,
        block_table_tensor=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.arange(first, length, device=device),
        seq_lens_cpu_upper_bound=lengths,
    )
    step, context.step = context.step, None
    try:
        metadata = builder.build(0, common)
    finally:
        context.step = step
    output = torch.empty((count, shape.num_heads, shape.value_size), dtype=shape.dtype, device=device)
    forward(None, layer, queries, keys[first:], keys[first:], cache, metadata, output)
    return output.cpu()


def cpu_kernel(shape: LatentShape | None = None) -> Kernel:
    """The CPU's; next to vLLM's own attention for the one shape that is given."""
    stock = None if shape is None else functools.partial(stock_attention, shape)
    return Kernel(make_builder, lambda shape: None, _layer_of, write, torch.device("cpu"), forward, stock=stock)  # type: ignore[arg-type]
