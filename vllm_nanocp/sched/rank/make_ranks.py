# SPDX-License-Identifier: Apache-2.0
"""How the ranks' schedulers come to be: all in this process, or each in one of its own."""

from __future__ import annotations

from copy import copy
from typing import Any

from vllm.v1.structured_output import StructuredOutputManager

from ... import config as nanocp_config
from . import rank_process
from .cached_blocks import Whereabouts
from .interface import Rank
from .rank_spec import RankSpec
from .remote_rank import RemoteRank


def make_ranks(spec: RankSpec, manager: StructuredOutputManager, mm_registry: Any) -> list[Rank]:
    """One for each rank.

    Args:
        spec: of the first one.
        manager: of this process's requests with structured output. Schedulers elsewhere have their own.
        mm_registry: vLLM's.
    """
    config = nanocp_config.of(spec.vllm_config)
    specs = [copy(spec) for _ in range(config.ranks)]
    for rank, one in enumerate(specs):
        one.rank = rank
    if config.scheduler_processes is not True:
        return [one.make(manager, mm_registry) for one in specs]
    channels = rank_process.open_channels(specs)
    # Grammars are compiled where they are used.
    manager.grammar_init = lambda request: None  # type: ignore[method-assign]
    where: Whereabouts = {}
    return [RemoteRank(one.rank, channel, one.block_size, where) for one, channel in zip(specs, channels, strict=True)]
