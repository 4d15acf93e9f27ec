# SPDX-License-Identifier: Apache-2.0
"""What workers of a test's engine can do besides: stand in for an engine of weight transfers, and say who they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Trainer:
    """Goes into vLLM's worker by ``worker_extension_cls``; its methods are called by ``collective_rpc``."""

    def expect_weights(self: Any) -> None:
        """Begin an update; what comes is kept, not loaded."""
        self.came = []
        self.weight_transfer_engine = SimpleNamespace(
            update_weights=self.came.append, reset_weight_update_target=lambda: None, shutdown=lambda: None
        )
        self._weight_update_active = True

    def weights_that_came(self: Any) -> list[Any]:
        """End the update."""
        self.weight_transfer_engine, self._weight_update_active = None, False
        came: list[Any] = self.came
        return came

    def numbers(self: Any) -> tuple[int, int, int, int]:
        """Its data-parallel rank, its number in that, what ends the name of its traces, and its number in a group with
        a trainer, as vLLM's engines of weight transfers count it."""
        from vllm.distributed.utils import get_worker_rank_suffix

        suffix, parallel = get_worker_rank_suffix(global_rank=self.rank), self.parallel_config
        in_group = parallel.data_parallel_index * parallel.world_size + parallel.rank
        return parallel.data_parallel_index, self.rank, int(suffix.rpartition("rank")[2]), in_group
