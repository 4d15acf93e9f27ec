# SPDX-License-Identifier: Apache-2.0
"""What front-ends say of the number of workers. Over HTTP: ``tests/server/test_routers.py``."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig

from vllm_nanocp.executor.multiproc import OneWorld

from .world_shapes import vllm_config  # noqa: F401  (a fixture)


def test_a_configuration_tells_of_all_ranks(vllm_config: Any) -> None:  # noqa: F811
    parallel = vllm_config.parallel_config
    assert (parallel.world_size_across_dp, parallel.world_size) == (2, 1)
    two = copy(parallel)
    two.tensor_parallel_size = two.world_size = 2
    assert (two.world_size_across_dp, two.world_size) == (4, 2)
    # In a worker, which is told of N ranks by vLLM's own fields.
    two.data_parallel_size = 2
    assert two.world_size_across_dp == 4


def test_other_engines_are_left_alone(vllm_config: Any) -> None:  # noqa: F811
    parallel = ParallelConfig(tensor_parallel_size=2)
    assert parallel.world_size_across_dp == 2
    parallel.data_parallel_size = 3
    assert parallel.world_size_across_dp == 6


class _Stock:
    """vLLM's executor, as far as sizes go."""

    def __init__(self, vllm_config: Any) -> None:  # noqa: F811
        self.vllm_config, self.parallel_config = vllm_config, vllm_config.parallel_config
        self.sizes = self._get_parallel_sizes()

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        return self.parallel_config.tensor_parallel_size, 1, 1


class _Executor(OneWorld, _Stock):  # type: ignore[misc]
    pass


def test_the_world_is_the_workers_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, and a front-end in its process, go on with the size of one rank."""
    monkeypatch.setattr("vllm_nanocp.executor.longest_request.install", lambda _: None)
    parallel = SimpleNamespace(tensor_parallel_size=2, world_size=2)
    config = SimpleNamespace(parallel_config=parallel, additional_config={"nanocp": {"ranks": 3}})
    executor: Any = _Executor(config)
    assert executor.sizes == (6, 1, 1) and executor.vllm_config.parallel_config.world_size == 6
    assert config.parallel_config is parallel and parallel.world_size == 2
