# SPDX-License-Identifier: Apache-2.0
"""What the ranks would ask each other before a step, from the step plan that all of them have.

Stock vLLM agrees on batch sizes and graphs with one all-reduce a step: ``vllm/v1/worker/gpu/dp_utils.py`` (V2) and
``vllm/v1/worker/dp_utils.py`` (V1). One scheduler knows all batches, so each rank computes what the others
would have answered. ``tests/unit/test_agreement.py`` holds this against vLLM's own functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState

from .. import compat
from ..plan import Batch
from .sharded_graphs import ShardedCapture, ShardedDescriptor


def agree(
    manager: ShardedCapture | None, batches: Sequence[Batch], rank: int, sharded: bool, visits: int | None
) -> tuple[BatchExecutionDescriptor, DPSyncState]:
    """This rank's graph and the sizes of all, as ``sync_cudagraph_and_dp_padding`` would find them.

    Args:
        manager: of the graphs; None when there are none.
        batches: one a rank, each with tokens.
        rank: this one.
        sharded: whether rows visit shards. Such a step replays only graphs that know shards.
        visits: see ``StepPlan.most_visits``.
    """
    mine, most = batches[rank], max(batch.num_tokens for batch in batches)
    uniform = mine.queries if mine.queries and all(batch.queries == mine.queries for batch in batches) else None
    desc: BatchExecutionDescriptor | None = None
    if sharded:
        if manager is not None and uniform == manager.decode_query_len and visits is not None:
            desc = manager.sharded_graph(most, visits)
        if desc is None:
            uniform, batches = None, [Batch(b.num_reqs, b.num_tokens, 0) for b in batches]
    if desc is None and manager is not None:
        wanted = [manager.dispatch(b.num_reqs, b.num_tokens, b.queries or None, 0).cg_mode for b in batches]
        if CUDAGraphMode.NONE not in wanted:
            desc = manager.dispatch(mine.num_reqs, most, uniform, 0)
    if desc is None:
        desc = BatchExecutionDescriptor(CUDAGraphMode.NONE, mine.num_tokens, mine.num_reqs)
        tokens = torch.tensor([batch.num_tokens for batch in batches], dtype=torch.int32)
        return desc, DPSyncState(tokens, uniform, eager=True, num_reqs=max(b.num_reqs for b in batches))
    tokens = torch.full((len(batches),), desc.num_tokens, dtype=torch.int32)
    full = desc.cg_mode == CUDAGraphMode.FULL and compat.agreed_requests_are_padded()
    padded = desc.num_reqs if full else None
    most_reqs = padded or max(batch.num_reqs for batch in batches)
    return desc, DPSyncState(tokens, uniform, eager=False, num_reqs=most_reqs)


def capacity_of(desc: BatchExecutionDescriptor) -> int:
    """Visits that the graph of a step has room for; 0 when attention runs outside of graphs."""
    return desc.capacity if isinstance(desc, ShardedDescriptor) else 0
