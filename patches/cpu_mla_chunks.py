# SPDX-License-Identifier: Apache-2.0
"""Chunked prefill and prefix caching of latent attention on CPU.

Wrong upstream: for models with multi-head latent attention `CpuPlatform.check_and_update_config`
(vllm/platforms/cpu.py) turns chunked prefill and prefix caching off, whatever the user said, and raises
`max_num_batched_tokens` to `max_model_len`, unless the backend is AMX_MLA. The CPU_MLA backend's docstring says the
same, but nothing in it needs this: prompts attend to what the cache holds of them through the same chunked-context code
as on GPUs, of which vLLM has the CPU parts (`gather_mla_context_cache_cpu`,
`CPUSDPAMLAPrefillBackend.run_prefill_context_chunk`).

Versions: 0.32.0, 0.33.0.

Repair: configurations of this package (`additional_config` has "nanocp") keep the three settings that they had when the
platform was asked. Others in the same process are as upstream makes them, and so are models with sparse latent
attention (`index_topk`: DeepSeek-V3.2, V4), whose backends are others. The line that upstream logs stays, and is
followed by one that says what was kept. It is needed where configurations are made, and where they are checked again:
the engine does so once it runs (`EngineCoreProc._perform_handshakes`). Its scheduler knows the tokens of a step then,
but still asks whether prompts may be chunked, so longer ones would wait for ever. Workers may copy configurations.

Can go: when the platform leaves the settings alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_CHECK: set[str] = {"65ae4960bdf28214", "9f8dd07ab1101536"}  # 0.32.0; 0.33.0 (block sizes are chosen elsewhere)
_KEY = "nanocp"
logger = logging.getLogger("vllm.cpu_mla_chunks")


def apply() -> Outcome:
    """Let this package's configurations keep chunked prefill and prefix caching. Idempotent.

    Raises `PatchError` if the CPU platform's `check_and_update_config` is not the known one.
    """
    from vllm.platforms.cpu import CpuPlatform

    return replace(__name__, Guarded(CpuPlatform, "check_and_update_config", _KNOWN_CHECK, _kept))


def _kept(original: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        scheduler, cache, model = vllm_config.scheduler_config, vllm_config.cache_config, vllm_config.model_config
        chunked, tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        prefix_caching = cache.enable_prefix_caching
        original(cls, vllm_config)
        if model is None or not model.use_mla or not _concerned(vllm_config):
            return
        if hasattr(model.hf_text_config, "index_topk"):
            return
        if (chunked, prefix_caching) != (scheduler.enable_chunked_prefill, cache.enable_prefix_caching):
            logger.info("Kept as they were: chunked prefill %s, prefix caching %s.", chunked, prefix_caching)
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunked, tokens
        cache.enable_prefix_caching = prefix_caching

    return check_and_update_config


def _concerned(vllm_config: Any) -> bool:
    """Whether a configuration is one of this package."""
    additional = vllm_config.additional_config  # a dict, or any object that has a hash
    return isinstance(additional, Mapping) and _KEY in additional
