# SPDX-License-Identifier: Apache-2.0
"""Repairs of vLLM defects, one module each.

A module's docstring says what is wrong upstream, where, in which versions, how it is repaired and
when the module can go. Its `apply()` is idempotent, does nothing where upstream has the repair,
and raises `PatchError` where upstream is not what the module was written for. Importing this
package changes nothing and imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_nanocp.patches._guard import Outcome, PatchError

__all__ = ["CONFIG_PATCHES", "PATCHES", "RAY_PATCHES", "Outcome", "Patch", "PatchError", "apply_all"]


@dataclass(frozen=True)
class Patch:
    """A patch module and the platform it concerns (`None`: every platform)."""

    name: str
    platform: str | None = None

    def apply(self) -> Outcome:
        """Import the module and apply it. Raises `PatchError`."""
        module = importlib.import_module(f"{__name__}.{self.name}")
        function: Callable[[], Outcome] = module.apply
        return function()


PATCHES = (
    Patch("metadata_alias"),
    Patch("queue_names"),
    Patch("cpu_gatherv", platform="cpu"),
    Patch("cpu_expert_map", platform="cpu"),
    Patch("cpu_moe_opaque", platform="cpu"),
    Patch("cpu_lora_moe", platform="cpu"),
    Patch("cpu_lora_none", platform="cpu"),
    Patch("cpu_seeded_chunks", platform="cpu"),
    Patch("cpu_shm_names", platform="cpu"),
    Patch("cpu_cache_dtype", platform="cpu"),
    Patch("deepseek_one_token"),
    Patch("draft_top_k"),
    Patch("cpu_draft_expand", platform="cpu"),
    Patch("cpu_mla_rope", platform="cpu"),
    Patch("cpu_mla_chunks", platform="cpu"),
)
# For processes that make an engine's configuration or check it again: front-end and engine.
CONFIG_PATCHES = (
    Patch("startup_interrupt"),
    Patch("detokenizer_prompt"),
    Patch("cpu_mla_chunks", platform="cpu"),
)
# For executors whose workers are Ray actors, and for these before vLLM's worker is built.
RAY_PATCHES = (
    Patch("remote_queue_shutdown"),
    Patch("cpu_ray", platform="cpu"),
)


def apply_all(wanted: Sequence[Patch] = PATCHES) -> dict[str, Outcome]:
    """Apply those of the patches that concern the current platform, in order.

    Returns what each did, by name. Raises the first `PatchError`; patches before it stay applied.
    """
    from vllm.platforms import current_platform

    return {patch.name: patch.apply() for patch in wanted if patch.platform in (None, current_platform.device_type)}
