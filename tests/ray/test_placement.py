# SPDX-License-Identifier: Apache-2.0
"""Which nodes ranks go to; those that fit none are refused with one line, at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .nodes import CPUS, Nodes

pytestmark = pytest.mark.engine

# In a process of its own: it changes vLLM, and connects to Ray.
MAKE_GROUP = """
import ray, sys
from vllm_nanocp import patches
from vllm_nanocp.executor.ray.executor import NanoCPRayExecutor
patches.apply_all(patches.RAY_PATCHES)
ray.init(logging_level="ERROR")
executor = object.__new__(NanoCPRayExecutor)
home = ray.get_runtime_context().get_node_id()
workers = int(sys.argv[1])
executor.ranks, executor.workers = 2, workers
group = executor._make_group(home)
bundles, nodes = executor._bundles(group, home)
print("placed", bundles, [node == home for node in nodes])
ray.util.remove_placement_group(group)
executor.ranks, executor.workers = 1, 2 * workers
executor._make_group(home)
"""


def test_a_rank_is_kept_together(nodes: Nodes) -> None:
    """Two ranks of as many workers as a node has CPUs; then one of twice as many, for which there is no node."""
    command = [sys.executable, "-c", MAKE_GROUP, str(CPUS)]
    said = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=240)
    # The node of the engine first.
    assert "placed [0, 1, 2, 3] [True, True, False, False]" in said.stdout, said.stderr[-2000:]
    assert said.stderr.strip().splitlines()[-1] == (
        "vllm_nanocp.errors.NanoCPConfigError: nanocp: placing 1 ranks of 4 workers each is not supported: "
        "all workers of a rank must be on one node, and the nodes of the Ray cluster have 2+2 CPUs; "
        "add nodes, or use fewer ranks or a smaller --tensor-parallel-size"
    )
