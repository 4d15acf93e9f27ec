# SPDX-License-Identifier: Apache-2.0
"""Which family of attention a model belongs to, on which platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family import Family


def family_of(vllm_config: Any) -> Family:
    """The family whose backend and partial attention serve a model here. ``check_model`` has refused the others.

    Args:
        vllm_config: finished.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        if vllm_config.model_config.use_mla:
            from .mla.flash_backend import LatentOnHopper

            return LatentOnHopper(vllm_config)
        from .gqa.flash_backend import GroupedQueryOnHopper

        return GroupedQueryOnHopper(vllm_config)
    if vllm_config.model_config.use_mla:
        from .mla.cpu_backend import LatentOnCPU

        return LatentOnCPU()
    from .gqa.cpu_backend import GroupedQueryOnCPU

    return GroupedQueryOnCPU()
