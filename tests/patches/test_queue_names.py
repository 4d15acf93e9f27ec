# SPDX-License-Identifier: Apache-2.0
"""`queue_names` with queues between threads, each end of which opens the shared memory for itself."""

from __future__ import annotations

import gc
import inspect
import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vllm_nanocp import patches
from vllm_nanocp.patches import Outcome, PatchError, queue_names

pytest.importorskip("vllm")

LIMIT_S = 10.0
# In which a writer that does not wait would have gone on.
MOMENT_S = 0.5
SMALL = dict(max_chunk_bytes=1 << 12, max_chunks=2, connect_ip="127.0.0.1")


@pytest.fixture(autouse=True)
def queues(stock: Any) -> Any:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    return stock(MessageQueue, "wait_until_ready")


def _named(queue: Any) -> list[bool]:
    """Whether the memory of a queue has a name, and that of its arena, where it has one."""
    memories = [memory for memory in (queue.buffer, queue.tensor_arena) if memory is not None]
    return [os.path.exists(f"/dev/shm/{memory.shared_memory.name}") for memory in memories]


def _wait(queues: Sequence[Any]) -> list[threading.Thread]:
    waiting = [threading.Thread(target=queue.wait_until_ready, daemon=True) for queue in queues]
    for thread in waiting:
        thread.start()
    return waiting


def _join(waiting: Sequence[threading.Thread]) -> None:
    for thread in waiting:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def _check_messages(writer: Any, readers: Sequence[Any]) -> None:
    for message in range(5):  # more than there are chunks
        writer.enqueue(message, timeout=LIMIT_S)
        assert [reader.dequeue(timeout=LIMIT_S) for reader in readers] == [message] * len(readers)


@pytest.mark.parametrize("patched", [False, True])
def test_names(queues: Any, patched: bool) -> None:
    """Named in stock vLLM for as long as the writer lives; with the patch until all readers have it."""
    if patched:
        assert queue_names.apply() is Outcome.APPLIED
    writer = queues(2, 2, **SMALL)
    path = f"/dev/shm/{writer.buffer.shared_memory.name}"
    readers = [queues.create_from_handle(writer.export_handle(), rank) for rank in range(2)]
    assert _named(writer) == [True]
    _join(_wait([writer, *readers]))
    assert _named(writer) == [not patched]
    _check_messages(writer, readers)
    del writer, readers
    gc.collect()
    assert not os.path.exists(path)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_reader_comes_late(queues: Any, late: int) -> None:
    """The names stay until it has come, if it is one of two on this machine (0, 1) or one elsewhere (2)."""
    queue_names.apply()
    writer = queues(3, 2, **SMALL)
    readers = {rank: queues.create_from_handle(writer.export_handle(), rank) for rank in range(3) if rank != late}
    waiting = _wait([writer, *readers.values()])
    waiting[0].join(MOMENT_S)
    assert waiting[0].is_alive() and _named(writer) == [True]
    readers[late] = queues.create_from_handle(writer.export_handle(), late)
    _join([*waiting, *_wait([readers[late]])])
    assert _named(writer) == [False]
    _check_messages(writer, list(readers.values()))


def test_readers_elsewhere_only(queues: Any) -> None:
    """There is no shared memory then."""
    queue_names.apply()
    writer = queues(1, 0, **SMALL)
    reader = queues.create_from_handle(writer.export_handle(), 0)
    _join(_wait([writer, reader]))
    assert _named(writer) == []
    _check_messages(writer, [reader])


def test_arena(queues: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second segment, for large tensors, which go through it after it has lost its name."""
    from vllm.distributed.device_communicators import shm_tensor_arena

    monkeypatch.setattr(shm_tensor_arena, "_ARENA_MIN_BYTES", 1 << 14)
    queue_names.apply()
    writer = queues(1, 1, **SMALL)
    writer.tensor_arena = shm_tensor_arena.ShmTensorArena(1, slot_bytes=1 << 16, n_slots=2)
    writer.handle.tensor_arena_handle = writer.tensor_arena.handle()
    reader = queues.create_from_handle(writer.export_handle(), 0)
    assert _named(writer) == [True, True]
    _join(_wait([writer, reader]))
    assert _named(writer) == [False, False]
    sent = torch.arange(1 << 12)
    writer.enqueue(sent, timeout=LIMIT_S)
    with writer.tensor_arena._slot(0, sent.nbytes) as slot:
        assert bytes(slot) == sent.numpy().tobytes(), "it took another way"
    assert torch.equal(reader.dequeue(timeout=LIMIT_S), sent)


def test_readers_remove_nothing(queues: Any) -> None:
    """The memory is the writer's."""
    writer = queues(1, 1, **SMALL)
    reader = queues.create_from_handle(writer.export_handle(), 0)
    queue_names.unlink(reader)
    assert _named(writer) == [True]
    queue_names.unlink(writer)
    queue_names.unlink(writer)
    assert _named(writer) == [False]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_platforms(queues: Any, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Workers of every kind keep their answers in such a queue."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", platform)
    chosen = [patch for patch in patches.PATCHES if patch.name == "queue_names"]
    assert patches.apply_all(chosen) == {"queue_names": Outcome.APPLIED}
    assert inspect.unwrap(queues.wait_until_ready) is not queues.wait_until_ready


def test_idempotent(queues: Any) -> None:
    assert queue_names.apply() is Outcome.APPLIED
    function = queues.wait_until_ready
    assert queue_names.apply() is Outcome.APPLIED
    assert queues.wait_until_ready is function


def _other(self: Any) -> None: ...


@pytest.mark.parametrize("name", ["wait_until_ready", "create_from_handle"])
def test_refuses_another_upstream(queues: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(queues, name, _other)
    with pytest.raises(PatchError, match=r"^queue_names: _other has changed upstream .*vLLM \d"):
        queue_names.apply()
