# SPDX-License-Identifier: Apache-2.0
"""`cpu_shm_names` with a real group of two processes that share memory, and with a queue between two threads."""

from __future__ import annotations

import gc
import inspect
import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.unit.processes import run_ranks
from vllm_nanocp.patches import Outcome, PatchError, cpu_shm_names

pytest.importorskip("vllm")

LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """vLLM's classes without the patch; afterwards they are as they were before the test."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    init, wait = _CPUSHMDistributed._init_cpu_shm, MessageQueue.wait_until_ready
    _CPUSHMDistributed._init_cpu_shm, MessageQueue.wait_until_ready = inspect.unwrap(init), inspect.unwrap(wait)
    yield
    _CPUSHMDistributed._init_cpu_shm, MessageQueue.wait_until_ready = init, wait


class _Communicator:
    """The attributes of a `CpuCommunicator` that `_CPUSHMDistributed` reads."""

    def __init__(self, rank: int, size: int) -> None:
        self.unique_name, self.ranks = "tp:0", list(range(size))
        self.rank, self.world_size, self.device_group = rank, size, dist.group.WORLD


def _share(rank: int, size: int, ident: str, patched: bool) -> tuple[float, list[str]]:
    """What an all-reduce over shared memory gives, and the names that there are meanwhile."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    os.environ["VLLM_DIST_IDENT"] = ident
    if patched:
        cpu_shm_names.apply()
    memory: Any = _CPUSHMDistributed(_Communicator(rank, size))  # type: ignore[arg-type]
    value = torch.full((70_000,), float(rank + 1))
    for _ in range(3):
        memory.all_reduce(value)
    dist.barrier()
    names = [name for name in os.listdir("/dev/shm") if name.startswith(ident)]
    dist.barrier()
    return value.unique().item(), names


@pytest.mark.parametrize("patched", [False, True])
def test_names(patched: bool) -> None:
    """Named in stock vLLM for as long as a worker lives, so that they stay when it is killed; not with the patch."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_shm_manager"):
        pytest.skip("no shared memory between workers on this processor")
    ident = f"nanocp-test-{uuid.uuid4().hex}"
    try:
        for value, names in run_ranks(2, _share, ident, patched):
            assert value == 3.0 * 2 * 2
            assert len(names) == (0 if patched else 2)
    finally:
        for name in os.listdir("/dev/shm"):
            if name.startswith(ident):
                os.unlink(f"/dev/shm/{name}")


@pytest.mark.parametrize("patched", [False, True])
def test_names_of_queues(patched: bool) -> None:
    """Named in stock vLLM for as long as the writer lives; with the patch until all readers have it."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    if patched:
        cpu_shm_names.apply()
    writer = MessageQueue(2, 2, max_chunk_bytes=1 << 12, max_chunks=2)
    path = f"/dev/shm/{writer.buffer.shared_memory.name}"
    readers = [MessageQueue.create_from_handle(writer.export_handle(), rank) for rank in range(2)]
    waiting = [threading.Thread(target=queue.wait_until_ready, daemon=True) for queue in (writer, *readers)]
    assert os.path.exists(path)
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert os.path.exists(path) is not patched
    for message in range(5):  # more than there are chunks
        writer.enqueue(message, timeout=LIMIT_S)
        assert [reader.dequeue(timeout=LIMIT_S) for reader in readers] == [message] * 2
    del writer, readers, waiting, thread
    gc.collect()
    assert not os.path.exists(path)


def _init_cpu_shm(self: Any) -> int: ...


def wait_until_ready(self: Any) -> None: ...


@pytest.mark.parametrize("other", [_init_cpu_shm, wait_until_ready])
def test_refuses_another_upstream(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    owner: Any = _CPUSHMDistributed if other is _init_cpu_shm else MessageQueue
    monkeypatch.setattr(owner, other.__name__, other)
    with pytest.raises(PatchError, match=f"{other.__name__} has changed upstream"):
        cpu_shm_names.apply()


def test_idempotent() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    assert cpu_shm_names.apply() is Outcome.APPLIED
    function = MessageQueue.wait_until_ready
    assert cpu_shm_names.apply() is Outcome.APPLIED
    assert MessageQueue.wait_until_ready is function
