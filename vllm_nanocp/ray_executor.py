# SPDX-License-Identifier: Apache-2.0
"""Ranks as Ray actors, on any number of nodes. Touches vLLM 0.32's ``RayExecutorV2``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc
from vllm.v1.executor.ray_utils import available_resources_per_node

from . import config as nanocp_config
from . import patches
from .engine_config import refuse
from .environment import variable
from .executor import OneWorld
from .ray_actor import RankActor
from .ray_placement import bundles_of_workers, nodes_of_ranks, same_node

logger = init_logger(f"vllm.{__name__}")

# How long devices that another engine still holds, or that just left one, are waited for.
FREE_LIMIT_S = 60.0
_BUNDLES = "VLLM_RAY_BUNDLE_INDICES"
_INSTEAD = "add nodes, or use fewer ranks or a smaller --tensor-parallel-size"


class NanoCPRayExecutor(OneWorld, RayExecutorV2):
    """The executor for ranks that are Ray actors.

    Where vLLM was given a placement group (by Ray Serve, for instance), its bundles are used; otherwise one is made.
    """

    _own_group: PlacementGroup | None = None

    def _init_executor(self) -> None:
        """Raises NanoCPConfigError: the workers of a rank would be on different nodes."""
        patches.apply_all(patches.RAY_PATCHES)
        config, parallel = nanocp_config.of(self.vllm_config), self.parallel_config
        self.ranks, self.workers = config.ranks, parallel.tensor_parallel_size
        # vLLM asks the placement group for so many devices before it asks for the sizes.
        parallel.world_size = self.ranks * self.workers
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(runtime_env=parallel.ray_runtime_env)
        home = ray.get_runtime_context().get_node_id()
        group = parallel.placement_group or ray.util.get_current_placement_group()
        if group is None:
            group = self._own_group = self._make_group(home)
        parallel.placement_group = group
        bundles, nodes = self._bundles(group, home)
        of_ranks = ", ".join(node[:8] for node in nodes[:: self.workers])
        logger.info("nanocp: %d ranks on %d nodes (%s)", self.ranks, len(set(nodes)), of_ranks)
        with _worker_class(RankActor), variable(_BUNDLES, ",".join(map(str, bundles))):
            super()._init_executor()

    def _make_group(self, home: str) -> PlacementGroup:
        """One bundle a worker, each bound to the node of its rank."""
        key = current_platform.ray_device_key
        deadline = time.monotonic() + FREE_LIMIT_S
        while (nodes := nodes_of_ranks(_devices(available_resources_per_node(), key), *self._shape(home))) is None:
            everything = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            have = _devices(everything, key)
            if nodes_of_ranks(have, *self._shape(home)) is None:
                self._refuse(f"the nodes of the Ray cluster have {_numbers(have)} {key}s")
            if time.monotonic() > deadline:
                free = _devices(available_resources_per_node(), key)
                self._refuse(f"{_numbers(free)} of the {_numbers(have)} {key}s of the Ray cluster's nodes are free")
            time.sleep(1.0)
        bound = [{"ray.io/node-id": node} for node in nodes for _ in range(self.workers)]
        group = ray.util.placement_group([{key: 1.0}] * len(bound), bundle_label_selector=bound)
        if not group.wait(max(1.0, deadline - time.monotonic())):
            ray.util.remove_placement_group(group)
            self._refuse(f"other programs took {key}s of the Ray cluster meanwhile")
        return group

    def _bundles(self, group: PlacementGroup, home: str) -> tuple[list[int], list[str]]:
        """The bundle and the node of each worker, in the order of the world."""
        key, placed = current_platform.ray_device_key, placement_group_table(group)["bundles_to_node_id"]
        usable = [index for index, bundle in enumerate(group.bundle_specs) if bundle.get(key)]
        given = os.environ.get(_BUNDLES)
        if given:
            bundles = [int(index) for index in given.split(",")]
        else:
            chosen = bundles_of_workers([placed[index] for index in usable], *self._shape(home))
            bundles = [] if chosen is None else [usable[index] for index in chosen]
        nodes = [placed[index] for index in bundles]
        if len(nodes) != self.ranks * self.workers or not same_node(nodes, self.workers):
            self._refuse(f"the placement group has {len(usable)} bundles with a {key}, or {_BUNDLES} mixes nodes")
        return bundles, nodes

    def _shape(self, home: str) -> tuple[int, int, str]:
        return self.ranks, self.workers, home

    def _refuse(self, found: str) -> None:
        what = f"placing {self.ranks} ranks of {self.workers} workers each"
        refuse(what, f"all workers of a rank must be on one node, and {found}", _INSTEAD)

    def shutdown(self) -> None:
        super().shutdown()
        group, self._own_group = self._own_group, None
        if group is not None and ray.is_initialized():
            ray.util.remove_placement_group(group)


def _devices(resources: Mapping[str, Mapping[str, float]], key: str) -> dict[str, int]:
    return {node: int(found.get(key, 0)) for node, found in resources.items()}


def _numbers(room: Mapping[str, int]) -> str:
    return "+".join(str(number) for number in sorted(room.values(), reverse=True)) or "no"


@contextlib.contextmanager
def _worker_class(kind: type[RayWorkerProc]) -> Iterator[None]:
    """The class of which vLLM's executor makes actors."""
    before = ray_executor_v2.RayWorkerProc
    ray_executor_v2.RayWorkerProc = kind  # type: ignore[misc]
    try:
        yield
    finally:
        ray_executor_v2.RayWorkerProc = before  # type: ignore[misc]
