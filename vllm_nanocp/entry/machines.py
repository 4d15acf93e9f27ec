# SPDX-License-Identifier: Apache-2.0
"""Where ranks are: all on this machine, with a GPU for each worker, but with Ray."""

from __future__ import annotations

import os
from typing import Any

from ..errors import refuse
from .refusals import EXECUTORS


def all_here(args: Any, ranks: int) -> None:
    """Leave out flags for ranks on several machines where they say that this one has all: so does vLLM.

    Args:
        args: an argparse namespace or ``EngineArgs``; changed.
        ranks: how many there are.
    """
    local, first = (getattr(args, f"data_parallel_{name}", None) for name in ("size_local", "start_rank"))
    if local == ranks and first in (None, 0):
        args.data_parallel_size_local = args.data_parallel_start_rank = None
        args.data_parallel_hybrid_lb = False


def check_gpus(parallel: Any, ranks: int) -> None:
    """Refuse more workers than this machine has GPUs, which would end in each of those that find none.

    Args:
        parallel: vLLM's finished ``ParallelConfig``.
        ranks: how many there are.

    Raises:
        NanoCPConfigError
    """
    from vllm.platforms import current_platform

    # NCCL then lets ranks share GPUs, which tests are good for.
    shared = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if shared or not current_platform.is_cuda() or parallel.distributed_executor_backend != EXECUTORS["mp"]:
        return
    given, workers = parallel.assigned_physical_gpu_ids, parallel.tensor_parallel_size
    count = current_platform.device_count() if given is None else len(given)
    if 0 < count < ranks * workers:
        refuse(
            f"{ranks} ranks of {workers} workers each on {count} GPUs",
            "each worker has a GPU of this machine",
            "use fewer --data-parallel-size ranks, or a smaller --tensor-parallel-size; ranks on several machines "
            "need --distributed-executor-backend ray",
        )
