# SPDX-License-Identifier: Apache-2.0
"""Which types of KV cache the families of attention read."""

from __future__ import annotations

# Values of ``--kv-cache-dtype`` with which FLASHMLA reads latents in vLLM.
FLOAT8_CACHES = ("fp8", "fp8_e4m3")
# Values that are read, by (latent attention, CUDA).
CACHE_DTYPES: dict[tuple[bool, bool], tuple[str, ...]] = {
    (False, False): ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    (False, True): ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
    (True, False): ("auto",),
    (True, True): ("auto", *FLOAT8_CACHES),
}
