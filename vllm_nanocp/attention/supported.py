# SPDX-License-Identifier: Apache-2.0
"""Whether the attention of a loaded model can be cut into shards, asked of its layers.

Configurations name one feature in many ways, or do not name it at all; what a layer and its implementation were built
with is what will run. Only what is known passes: vLLM's plain ``Attention`` on this package's backend, with every
attribute of its implementation either known or empty. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from ..errors import UNSHARDED, refuse

if TYPE_CHECKING:
    from .family import Family

Feature = tuple[tuple[Any, ...], str]
# What an implementation's attribute holds where the layer has none of a feature; and the feature.
FEATURES: dict[str, Feature] = {
    "sinks": ((None,), "attention sinks"),
    "sliding_window": ((None, -1, (-1, -1)), "sliding-window attention"),
    "window_left": ((-1,), "sliding-window attention"),
    "alibi_slopes": ((None,), "ALiBi attention"),
    "logits_soft_cap": ((None, 0), "softcapped attention"),
    "attn_type": ((AttentionType.DECODER,), "attention that is no decoder's"),
    "kv_sharing_target_layer_name": ((None,), "KV that layers share"),
    "fa4_hd256": ((False,), "FlashAttention 4"),
    "dcp_world_size": ((1,), "decode context parallelism"),
    "pcp_world_size": ((1,), "prefill context parallelism"),
}
# The same of the layer itself, which some backends ask instead.
LAYER_FEATURES: dict[str, Feature] = {
    "has_sink": ((False,), "attention sinks"),
    "sliding_window": ((None,), "sliding-window attention"),
    "use_alibi_sqrt": ((False,), "ALiBi attention"),
    "use_mm_prefix": ((False,), "attention to later tokens of an image"),
    "mm_prefix_clamp_sliding_window": ((False,), "attention to later tokens of an image"),
    "attn_type": FEATURES["attn_type"],
    "kv_sharing_target_layer_name": FEATURES["kv_sharing_target_layer_name"],
}
# Attributes of the implementations that shards take into account, or that do not concern them.
KNOWN = frozenset(
    [
        *("num_heads", "num_kv_heads", "num_queries_per_kv", "head_size", "scale", "kv_cache_dtype", "is_fp8_kv_cache"),
        *("use_zentorch_sdpa", "vllm_flash_attn_version", "batch_invariant_enabled", "supports_quant_query_input"),
        *("need_to_return_lse_for_decode", "dcp_rank", "pcp_rank", "total_cp_world_size", "total_cp_rank"),
        *("dcp_combine", "_dcp_dtype", "_dcp_max_num_tokens", "cp_kv_cache_interleave_size"),
        # of FlashInfer; the buffer is of 0.33, room for counters of stock attention's kernels on Blackwell
        *("cache_dtype", "supports_xqa_or_trtllm_gen_decode", "bmm1_scale", "bmm2_scale"),
        "_multi_ctas_kv_counter_buffer",
        # of latent attention
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
        *("kv_b_proj", "q_pad_num_heads", "_use_flashinfer_concat_mla_k", "_pad_v"),
    ]
)
LATENT_FEATURES: dict[str, Feature] = {
    "sliding_window": ((None,), "sliding-window attention"),
    "non_causal_multi_token_decode": ((False,), "queries that see later tokens"),
    "use_pcp": ((False,), "prefill context parallelism"),
    "dcp_manager": ((None,), "decode context parallelism"),
    "hisparse_cache": ((None,), "latents that are kept elsewhere"),
}
_SCALES = ("_q_scale", "_k_scale", "_v_scale")


def check_layers(layers: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Refuse a model with an attention layer that shards would change.

    Args:
        layers: all that vLLM's forward context knows, by name; those that are no attention are passed over.
        family: to which all layers must belong.

    Returns:
        The attention layers, by name.

    Raises:
        NanoCPConfigError
    """
    attention = {name: layer for name, layer in layers.items() if _is_attention(layer)}
    if not attention:
        refuse("a model without attention layers with max_degree above 1", "there is no KV to be cut", UNSHARDED)
    _refuse_any(attention, family.problem)
    dtypes = {layer.kv_cache_dtype for layer in attention.values()}
    for dtype in sorted(dtypes - set(family.cache_dtypes)):
        refuse(f"a KV cache of {dtype} with max_degree above 1", "the attention path here cannot read it", UNSHARDED)
    if len(dtypes) > 1:
        refuse(
            f"KV caches of several types ({', '.join(sorted(dtypes))}) with max_degree above 1",
            "a step's attention is laid out for one",
            "leave out --kv-cache-dtype-skip-layers, or " + UNSHARDED,
        )
    shapes = {family.shape(layer) for layer in attention.values()}
    if len(shapes) > 1:
        refuse(
            "attention whose layers differ in heads or head size with max_degree above 1",
            f"the exchange and its memory are laid out for one shape, not {', '.join(map(str, sorted(shapes)))}",
            UNSHARDED,
        )
    return attention


def _is_attention(layer: Any) -> bool:
    """Whether it keeps KV or a state, or attends."""
    return isinstance(layer, AttentionLayerBase) or getattr(layer, "impl", None) is not None


def _refuse_any(layers: Mapping[str, Any], problem: Callable[[Any], tuple[str, str] | None]) -> None:
    """Refuse the first problem, with the layers that have it."""
    found = {name: said for name, layer in layers.items() if (said := problem(layer)) is not None}
    if not found:
        return
    first = next(iter(found))
    what, why = found[first]
    others = sum(said == found[first] for said in found.values()) - 1
    where = first + (f" and {others} more" if others else "")
    refuse(f"{what} ({where}) with max_degree above 1", why, UNSHARDED)


def grouped_query_problem(layer: Any, backend: type[Any]) -> tuple[str, str] | None:
    """``Family.problem`` of vLLM's plain attention on one of this package's backends."""
    found = _kind_problem(layer, Attention, backend) or _feature_problem(layer, LAYER_FEATURES)
    if found is not None:
        return found
    if layer.head_size_v != layer.head_size:
        return "attention whose values are not as long as its keys", "a partial result has one length"
    return one_scale_problem(layer)


def one_scale_problem(layer: Any) -> tuple[str, str] | None:
    """Whether a cache of 8 bits has more than one scale a layer."""
    if any(getattr(layer, name).numel() != 1 for name in _SCALES):
        return "KV scales of each head", "the attention path here knows one for a layer"
    return None


def latent_problem(layer: Any, backend: type[Any]) -> tuple[str, str] | None:
    """``Family.problem`` of multi-head latent attention on one of this package's backends."""
    if getattr(layer, "use_sparse", False) or getattr(getattr(layer, "impl", None), "is_sparse", False):
        why = "each query looks for its best keys over the whole context, and a shard knows its own only"
        return "sparse latent attention (DSA)", why
    return _kind_problem(layer, MLAAttention, backend) or _feature_problem(layer, LATENT_FEATURES)


def _kind_problem(layer: Any, kind: type[Any], backend: type[Any]) -> tuple[str, str] | None:
    if type(layer) is not kind:
        return f"attention of the kind {type(layer).__name__}", f"only vLLM's {kind.__name__} can be cut into shards"
    if layer.attn_backend is not backend or type(layer.impl) is not backend.get_impl_cls():
        return f"the attention backend {layer.attn_backend.__name__}", f"only {backend.__name__} serves shards"
    return None


def _feature_problem(layer: Any, of_layer: Mapping[str, Feature]) -> tuple[str, str] | None:
    """What a layer or its implementation has that this package does not know."""
    impl = layer.impl
    why = "partial results over shards would not be those of the whole"
    for holder, features in ((impl, FEATURES), (layer, of_layer)):
        for name, (without, feature) in features.items():
            if hasattr(holder, name) and not _is_one_of(getattr(holder, name), without):
                return feature, why
    unknown = [name for name in vars(impl) if name not in FEATURES and name not in KNOWN]
    for name in unknown:
        if not _is_one_of(getattr(impl, name), (None, False, 0)):
            return f"attention with {name!r}", "this package does not know it"
    return None


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether a value is one of some plain ones; a tensor never is."""
    return not isinstance(value, torch.Tensor) and any(value is a or value == a for a in accepted)
