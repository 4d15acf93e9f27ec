# SPDX-License-Identifier: Apache-2.0
"""Run a function in N real processes that are one gloo group. Each ends within the time limit, or is killed."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# The server imports what is slow to import once; the processes are forked from it, before any thread of OpenMP.
_CONTEXT = mp.get_context("forkserver")
if "tests.forked" not in sys.modules:  # that has more of it imported, for engines
    _CONTEXT.set_forkserver_preload(["vllm.v1.attention.backends.cpu_attn"])


def gpu_of(rank: int) -> torch.device:
    """The GPU of a rank; ranks share GPUs where there are fewer."""
    return torch.device("cuda", rank % torch.cuda.device_count())


def _main(
    function: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    seconds: float,
    args: tuple[Any, ...],
    answer: Connection,
    backend: str,
) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(gpu_of(rank))
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        answer.send((True, function(rank, size, *args)))
        dist.destroy_process_group()
    except BaseException:
        answer.send((False, traceback.format_exc()))


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, seconds: float = 100, backend: str = "gloo"
) -> list[Any]:
    """``function(rank, size, *args)`` in ``size`` processes; what each returned.

    Args:
        size: number of processes.
        function: of a module, so that it can be pickled.
        args: picklable.
        seconds: time limit of all together.
        backend: of the group; with ``nccl`` each process has a GPU, see ``gpu_of``.

    Raises:
        AssertionError: one failed, or the time ran out.
    """
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes, pipes = [], []
        for rank in range(size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_main, args=(function, rank, size, store, seconds, args, theirs, backend), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        answers: dict[int, Any] = {}
        try:
            while len(answers) < size:
                ready = wait([p for r, p in enumerate(pipes) if r not in answers], deadline - time.monotonic())
                missing = [r for r in range(size) if r not in answers]
                assert ready, f"no answer of ranks {missing} within {seconds} s"
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        fine, answers[rank] = pipes[rank].recv()
                    except EOFError:
                        fine, answers[rank] = False, "the process died"
                    assert fine, f"rank {rank}: {answers[rank]}"
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [answers[rank] for rank in range(size)]
