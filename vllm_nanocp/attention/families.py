# SPDX-License-Identifier: Apache-2.0
"""Which family of attention a model belongs to, on which platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cache_dtypes import FLOAT8_CACHES

if TYPE_CHECKING:
    from .family import Family


def flashinfer_chosen(vllm_config: Any) -> bool:
    """Whether vLLM attends with FlashInfer on CUDA: told so (``--attention-backend``), or by its own order on the first
    generation of Blackwell (``vllm/platforms/cuda.py``).

    Args:
        vllm_config: finished, of a model without latent attention.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    chosen = vllm_config.attention_config.backend
    if chosen is not None:
        return bool(chosen == AttentionBackendEnum.FLASHINFER)
    capability = current_platform.get_device_capability()
    return capability is not None and capability.major == 10


def family_of(vllm_config: Any) -> Family:
    """The family whose backend and partial attention serve a model here. ``check_model`` has refused the others.

    Args:
        vllm_config: finished.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        if vllm_config.model_config.use_mla:
            if vllm_config.cache_config.cache_dtype in FLOAT8_CACHES:
                from .mla.flashmla_backend import LatentOfFloat8OnHopper

                return LatentOfFloat8OnHopper(vllm_config)
            from .mla.flash_backend import LatentOnHopper

            return LatentOnHopper(vllm_config)
        if flashinfer_chosen(vllm_config):
            from .gqa.flashinfer_backend import GroupedQueryWithFlashInfer

            return GroupedQueryWithFlashInfer(vllm_config)
        from .gqa.flash_backend import GroupedQueryOnHopper

        return GroupedQueryOnHopper(vllm_config)
    if vllm_config.model_config.use_mla:
        from .mla.cpu_backend import LatentOnCPU

        return LatentOnCPU()
    from .gqa.cpu_backend import GroupedQueryOnCPU

    return GroupedQueryOnCPU()
