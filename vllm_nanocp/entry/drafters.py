# SPDX-License-Identifier: Apache-2.0
"""Ways to draft, and what of them cannot work: the conditions of ``refusals.py`` on speculative decoding."""

from __future__ import annotations

from typing import Any, get_args

from ..attention.cache_dtypes import FLOAT8_CACHES
from ..attention.families import flashinfer_chosen
from ..errors import refuse

CPU_WORKER = "vllm_nanocp.worker.cpu_worker.NanoCPCPUWorker"
GPU_WORKER = "vllm_nanocp.worker.gpu_worker.NanoCPGPUWorker"

# Ways to draft without a model, on CPU: they keep no KV, and take no part in the ranks' collectives. Those with one,
# that reads the target's hidden states. And those for GPUs only.
DRAFTERS = ("ngram", "suffix", "custom_class")
MODEL_DRAFTERS = ("eagle", "eagle3", "mtp")
GPU_DRAFTERS = ("ngram_gpu",)

# What else vLLM says of drafts than that their configuration is wrong: there is no such method, a package is missing.
_NO_VALIDATION = ((NotImplementedError, "speculative method"), (ImportError, "suffix decoding"))


def _named(drafts: Any) -> Any:
    """The method that a flag names: of ``--spec-method`` its value, of a configuration a part. As vLLM will call it: it
    still takes the names that MTP layers had for each model, and has only one."""
    from vllm.config.speculative import MTPModelTypes

    method = drafts.get("method") if isinstance(drafts, dict) else drafts
    return "mtp" if method in get_args(MTPModelTypes) else method


def given_drafts(drafts: Any) -> Any:
    """A flag's value as a line shows it: of a configuration the method."""
    return f"with the method {drafts.get('method')}" if isinstance(drafts, dict) else drafts


def other_drafter(drafts: Any) -> bool:
    """Whether a method is one that is served nowhere; of a configuration, if it says so."""
    method = _named(drafts)
    return isinstance(method, str) and method not in (*DRAFTERS, *MODEL_DRAFTERS, *GPU_DRAFTERS, "[ngram]")


def drafts_on_a_gpu(drafts: Any) -> bool:
    """Whether a method, or a configuration that names one, drafts by what has not been run there."""
    from vllm.platforms import current_platform

    method = _named(drafts)
    served = (*GPU_DRAFTERS, *MODEL_DRAFTERS)
    return isinstance(method, str) and method not in served and not current_platform.is_cpu()


def draft_method(vllm_config: Any) -> Any:
    """The method by which requests are decoded with drafts; None if they are not."""
    return None if vllm_config.speculative_config is None else vllm_config.speculative_config.method


def drafts_with_flashinfer(vllm_config: Any) -> bool:
    """Whether the ranks decode with drafts by FlashInfer, which vLLM was told to take, or takes by itself."""
    if draft_method(vllm_config) is None or vllm_config.model_config.use_mla:
        return False
    return vllm_config.parallel_config.worker_cls == GPU_WORKER and flashinfer_chosen(vllm_config)


def drafts_by_model(vllm_config: Any) -> bool:
    """Whether requests are decoded with drafts that a model makes from the target's hidden states."""
    return draft_method(vllm_config) in MODEL_DRAFTERS


def unequal_drafts(vllm_config: Any) -> bool:
    """Whether a draft model's forwards have other tokens than the target's, which the other ranks cannot know."""
    drafts = vllm_config.speculative_config
    return drafts_by_model(vllm_config) and bool(
        drafts.disable_padded_drafter_batch
        or drafts.parallel_drafting
        or drafts.use_multi_module_mtp()
        or drafts.enable_adaptive_verification
        or drafts.uses_dynamic_speculative_decoding()
    )


def shorter_draft(vllm_config: Any) -> bool:
    drafts = vllm_config.speculative_config
    return drafts_by_model(vllm_config) and (
        drafts.draft_model_config.max_model_len < vllm_config.model_config.max_model_len
    )


def other_attention(vllm_config: Any) -> bool:
    """Whether a draft model's layers attend, or keep KV, in another way than the target's."""
    drafts = vllm_config.speculative_config
    return drafts_by_model(vllm_config) and (
        drafts.attention_backend not in (None, vllm_config.attention_config.backend)
        or drafts.kv_cache_dtype not in (None, vllm_config.cache_config.cache_dtype)
    )


def unrun_target(vllm_config: Any) -> bool:
    """Whether a draft model is beside what no draft model has been run with."""
    model = vllm_config.model_config
    return drafts_by_model(vllm_config) and bool(
        model.is_hybrid or model.is_multimodal_model or vllm_config.lora_config is not None
    )


def other_than_latent_mtp(vllm_config: Any) -> bool:
    """Whether a draft model beside latent attention is none of MTP layers that attend so, too. Shards' attention is
    laid out for one family."""
    drafts = vllm_config.speculative_config
    return (
        drafts_by_model(vllm_config)
        and vllm_config.model_config.use_mla
        and not (drafts.method == "mtp" and drafts.draft_model_config.use_mla)
    )


def drafts_over_float8_latents(vllm_config: Any) -> bool:
    """Whether rows of several queries are to attend to latents of 8 bits, on GPUs."""
    on_gpus = vllm_config.parallel_config.worker_cls == GPU_WORKER
    cache = vllm_config.cache_config.cache_dtype
    return bool(
        on_gpus
        and draft_method(vllm_config) is not None
        and vllm_config.model_config.use_mla
        and cache in FLOAT8_CACHES
    )


def other_verification(vllm_config: Any) -> bool:
    """Whether drafts are to be verified in a way that vLLM's sampler on CPU does not have."""
    return (
        draft_method(vllm_config) is not None
        and vllm_config.speculative_config.rejection_sample_method != "standard"
        and vllm_config.parallel_config.worker_cls == CPU_WORKER
    )


def check_drafter(engine_args: Any, error: Exception) -> None:
    """Refuse a drafter that vLLM itself does not take: as the model of another method, or of none, or for a package.

    Args:
        engine_args: vLLM's, of which no configuration could be made.
        error: vLLM's. Where it is not about speculative decoding nothing is done.

    Raises:
        NanoCPConfigError
    """
    given = engine_args.speculative_config or {"method": engine_args.spec_method, "model": engine_args.spec_model}
    if getattr(error, "title", "") == "SpeculativeConfig":
        first = error.errors()[0]  # type: ignore[attr-defined]
        said = ": ".join(str(part) for part in (*first["loc"][:1], first["msg"].removeprefix("Value error, ")))
    elif any(isinstance(error, kind) and words in str(error) for kind, words in _NO_VALIDATION):
        said = str(error)
    else:
        return
    said = said.partition(" Supported architectures:")[0]
    named = [f"the {key} {given[key]}" for key in ("method", "model") if given.get(key)]
    without_model = _named(given) in (*DRAFTERS, *GPU_DRAFTERS)
    refuse(
        "speculative decoding with " + (" and ".join(named) or "this configuration"),
        "vLLM does not take it: " + said.partition("\n")[0][:300].rstrip(". "),
        "give it what it needs, or leave it out"
        if without_model
        else "name a drafter that was made for this model, and what it needs, or leave it out",
    )
