# SPDX-License-Identifier: Apache-2.0
"""Ranks as Ray actors, on any number of nodes. Touches vLLM 0.32's ``RayExecutorV2``."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group_table
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from ... import config as nanocp_config
from ... import patches
from ...environment import variable
from ...errors import refuse
from ..multiproc import OneWorld
from .actor import RankActor
from .placement import bundles_of_workers, nodes_of_ranks, same_node

logger = init_logger(f"vllm.{__name__}")

# How long devices that another engine still holds, or that just left one, are waited for.
FREE_LIMIT_S = 60.0
# How often actors are looked at while their queues are awaited, which takes milliseconds as a rule.
_LOOK_EVERY_S = 1.0
# How long Ray has to take a placement group back; it does at once as a rule.
_REMOVE_LIMIT_S = 2.0
_BUNDLES = "VLLM_RAY_BUNDLE_INDICES"
_INSTEAD = "add nodes, or use fewer ranks or a smaller --tensor-parallel-size"


class NanoCPRayExecutor(OneWorld, RayExecutorV2):
    """The executor for ranks that are Ray actors.

    Where vLLM was given a placement group (by Ray Serve, for instance), its bundles are used; otherwise one is made.
    """

    _own_group: PlacementGroup | None = None

    def _init_executor(self) -> None:
        """Start the actors; none is left if one of them fails.

        Raises:
            NanoCPConfigError: the workers of a rank would be on different nodes.
            RuntimeError: an actor's loop has ended before all queues were connected.
        """
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
        with (
            _instead(ray_executor_v2, "RayWorkerProc", RankActor),
            _instead(MessageQueue, "wait_until_ready", _waiting(MessageQueue.wait_until_ready, self._check_actors)),
            variable(_BUNDLES, ",".join(map(str, bundles))),
        ):
            try:
                super()._init_executor()
            except BaseException:
                self.shutdown()
                raise

    def _check_actors(self) -> None:
        """Raises RuntimeError: the loop of an actor has ended."""
        loops: list[Any] = [handle.run_ref for handle in self.ray_worker_handles]
        ended, _ = ray.wait(loops, num_returns=len(loops), timeout=0)
        if not ended:
            return
        ranks = [handle.rank for handle in self.ray_worker_handles if handle.run_ref in ended]
        failed = f"RayWorkerProc rank={ranks} died unexpectedly before the engine was up"
        try:
            ray.get(ended[0])
        except ray.exceptions.RayError as error:
            raise RuntimeError(failed) from error
        raise RuntimeError(failed)

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
            # Waits for Ray's head for a minute if that is gone, and the engine would not hear meanwhile that it failed.
            removal = threading.Thread(target=ray.util.remove_placement_group, args=(group,), daemon=True)
            removal.start()
            removal.join(_REMOVE_LIMIT_S)


def _devices(resources: Mapping[str, Mapping[str, float]], key: str) -> dict[str, int]:
    return {node: int(found.get(key, 0)) for node, found in resources.items()}


def _numbers(room: Mapping[str, int]) -> str:
    return "+".join(str(number) for number in sorted(room.values(), reverse=True)) or "no"


def _waiting(wait: Callable[[MessageQueue], None], check: Callable[[], None]) -> Callable[[MessageQueue], None]:
    """vLLM's ``wait``, which has no time limit, until ``check`` raises.

    vLLM watches its actors only once all queues are connected: one that has died before that would be awaited for ever.
    """

    def wait_until_ready(queue: MessageQueue) -> None:
        ready: Future[None] = Future()

        def connect() -> None:
            try:
                wait(queue)
                ready.set_result(None)
            except BaseException as error:
                ready.set_exception(error)

        threading.Thread(target=connect, daemon=True, name="RayQueueReady").start()
        while not ready.done():
            futures.wait([ready], timeout=_LOOK_EVERY_S)
            check()
        ready.result()

    return wait_until_ready


@contextlib.contextmanager
def _instead(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Another attribute of a module or class of vLLM's, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)
