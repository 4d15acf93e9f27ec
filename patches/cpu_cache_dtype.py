# SPDX-License-Identifier: Apache-2.0
"""A 16-bit KV cache of a float32 model, on CPU.

Wrong upstream: with `--kv-cache-dtype bfloat16` (or `float16`) the cache is allocated in 16 bits, but the CPU kernels
take the type of what they keep from the queries and keys (csrc/cpu/cpu_attn.cpp: `cpu_attn_reshape_and_cache`,
`cpu_attention_with_kv_cache`) and the strides from the cache. Of a float32 model they write 4 bytes for each 2: keys
and values overlap, and blocks in the second half of the cache are written behind its end. Tokens are wrong, and other
memory of the process is overwritten. (In a 16-bit model the other 16-bit type is the same width; its numbers are kept
in the model's type, which is right.)

Versions: 0.32.0, 0.33.0.

Repair: keys and values are rounded to the cache's type before they are written, and attention is computed in that type
and its result widened (vllm/v1/attention/backends/cpu_attn.py).

Can go: when vLLM refuses this, or its kernels know the cache's type.

Of the same kind on GPUs, where the bits are taken for another type:
https://github.com/vllm-project/vllm/pull/54338.
"""

from __future__ import annotations

from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_INIT: set[str] = {"e08fe55779aa8eed"}  # 0.32.0
_KNOWN_BUILD: set[str] = {"bb44996987cb056d"}  # 0.32.0
_KNOWN_FORWARD: set[str] = {"63f9284c7b9727bf"}  # 0.32.0
_KNOWN_UPDATE: set[str] = {"62d1988366c007ee"}  # 0.32.0


def apply() -> Outcome:
    """Let vLLM's CPU attention keep what the cache was allocated for. Idempotent.

    Raises `PatchError` if it is not the known one.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as Impl
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    return replace(
        __name__,
        Guarded(Builder, "__init__", _KNOWN_INIT, _with_narrow_scratch),
        Guarded(Builder, "build", _KNOWN_BUILD),
        Guarded(Impl, "forward", _KNOWN_FORWARD, _attending_in_the_caches_type),
        Guarded(Impl, "do_kv_cache_update", _KNOWN_UPDATE, _rounding_first),
    )


def _with_narrow_scratch(init: Any) -> Any:
    def _init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not self.is_encoder_only_attention:  # which keeps nothing
            # The kernel's scratch is laid out for the type that it will compute in.
            self.dtype = _computed_in(self.kv_cache_spec.dtype, self.dtype)

    return _init


def _rounding_first(update: Any) -> Any:
    def _update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        if _narrower(kv_cache, key):
            key, value = key.to(kv_cache.dtype), value.to(kv_cache.dtype)
        update(self, layer, key, value, kv_cache, slot_mapping)

    return _update


def _attending_in_the_caches_type(forward: Any) -> Any:
    def _forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Any:
        scales = (output_scale, output_block_scale)
        if attn_metadata is None or attn_metadata.encoder_cache is not None or not _narrower(kv_cache, query):
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        rounded = output.new_empty(output.shape, dtype=kv_cache.dtype)
        forward(self, layer, query.to(kv_cache.dtype), key, value, kv_cache, attn_metadata, rounded, *scales)
        used = slice(attn_metadata.num_actual_tokens)
        output[used] = rounded[used]
        return output

    return _forward


def _narrower(kv_cache: Any, numbers: Any) -> bool:
    """Whether a cache holds fewer bytes a number than these have, and is not quantized."""
    return bool(_computed_in(kv_cache.dtype, numbers.dtype) != numbers.dtype)


def _computed_in(kept: Any, dtype: Any) -> Any:
    """The type of attention over a cache of type `kept` in a model of type `dtype`."""
    return kept if kept.is_floating_point and kept.itemsize < dtype.itemsize else dtype
