# SPDX-License-Identifier: Apache-2.0
"""`cpu_shm_names` with a real group of two processes that share memory."""

from __future__ import annotations

import os
import uuid
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.unit.processes import run_ranks
from vllm_nanocp.patches import Outcome, PatchError, cpu_shm_names

pytest.importorskip("vllm")


@pytest.fixture(autouse=True)
def unpatched(stock: Any) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    stock(_CPUSHMDistributed, "_init_cpu_shm")


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


def _init_cpu_shm(self: Any) -> int: ...


def test_refuses_another_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    monkeypatch.setattr(_CPUSHMDistributed, "_init_cpu_shm", _init_cpu_shm)
    with pytest.raises(PatchError, match="_init_cpu_shm has changed upstream"):
        cpu_shm_names.apply()


def test_idempotent() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    assert cpu_shm_names.apply() is Outcome.APPLIED
    function = _CPUSHMDistributed._init_cpu_shm
    assert cpu_shm_names.apply() is Outcome.APPLIED
    assert _CPUSHMDistributed._init_cpu_shm is function
