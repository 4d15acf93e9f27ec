# SPDX-License-Identifier: Apache-2.0
"""`cpu_gatherv` with real gloo groups of two and three processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vllm_nanocp.patches import Outcome, PatchError, cpu_gatherv


class _Group:
    """The attributes of a device communicator that the collectives read."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank_in_group, self.world_size = rank, world_size
        self.ranks = list(range(world_size))
        self.device_group = dist.group.WORLD


def _values(rank: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + rows)
    if dtype.is_floating_point:
        return torch.randn(rows, *shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (rows, *shape), generator=generator).to(dtype)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return not left.numel() or torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def _splits(world_size: int) -> list[list[int]]:
    uneven = [[3, 5, 2], [0, 4, 7], [4, 0, 1], [0, 0, 1], [0, 0, 0], [6, 6, 6], [300, 1, 0]]
    return [split[:world_size] for split in uneven]


def _check_gather(group: _Group) -> None:
    rank = group.rank_in_group
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((64,), torch.float32),
        ((8,), torch.int32),
        ((3,), torch.bool),
        ((2, 5), torch.bfloat16),
        ((), torch.int64),
        ((16,), torch.float8_e4m3fn),
        ((1000,), torch.float32),  # with the 300 rows: more than is packed
    ]
    for sizes in _splits(group.world_size):
        inputs = [_values(rank, sizes[rank], shape, dtype) for shape, dtype in shapes]
        wanted = [
            torch.cat([_values(i, n, shape, dtype).view(torch.uint8) for i, n in enumerate(sizes)]).view(dtype)
            if dtype.itemsize == 1
            else torch.cat([_values(i, n, shape, dtype) for i, n in enumerate(sizes)])
            for shape, dtype in shapes
        ]
        gathered = cpu_gatherv.all_gatherv(group, inputs, 0, sizes)
        assert all(map(_same_bits, gathered, wanted)), sizes
        few = cpu_gatherv.all_gatherv(group, inputs[:3], sizes=sizes)
        assert all(map(_same_bits, few, wanted)), sizes
        assert _same_bits(cpu_gatherv.all_gatherv(group, inputs[0], 0, sizes), wanted[0])
        # A view with strides must not matter.
        columns = cpu_gatherv.all_gatherv(group, inputs[0][:, ::2], 0, sizes)
        assert _same_bits(columns, wanted[0][:, ::2].contiguous())
    even = _values(rank, 4, (8,), torch.float32)
    wanted_even = torch.cat([_values(i, 4, (8,), torch.float32) for i in group.ranks])
    assert _same_bits(cpu_gatherv.all_gatherv(group, even), wanted_even)
    with pytest.raises(NotImplementedError, match="dim 0"):
        cpu_gatherv.all_gatherv(group, even, dim=1)
    with pytest.raises(ValueError, match="rows"):
        cpu_gatherv.all_gatherv(group, even, sizes=[5] * group.world_size)


def _check_scatter(group: _Group) -> None:
    rank = group.rank_in_group
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for sizes in _splits(group.world_size):
            addends = [_values(i, sum(sizes), (33,), dtype) for i in group.ranks]
            # The contract: rank order, in at least float32, whoever owns the row.
            total = addends[0].to(torch.promote_types(dtype, torch.float32))
            for addend in addends[1:]:
                total = total + addend
            wanted = total.to(dtype).split(sizes)[rank]
            kept = addends[rank].clone()
            result = cpu_gatherv.reduce_scatterv(group, addends[rank], 0, sizes)
            assert _same_bits(result, wanted), (dtype, sizes)
            assert _same_bits(addends[rank], kept), "the input must stay as it is"
    wide = _values(0, 4, (2 * group.world_size,), torch.float32)
    last = cpu_gatherv.reduce_scatterv(group, wide)
    assert torch.allclose(last, wide[:, 2 * rank : 2 * rank + 2] * group.world_size)
    with pytest.raises(ValueError, match="do not fit"):
        cpu_gatherv.reduce_scatterv(group, wide, 0, [1] * group.world_size)
    with pytest.raises(ValueError, match="do not divide"):
        cpu_gatherv.reduce_scatterv(group, wide.new_empty(group.world_size + 1, 2), 0)


def _worker(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        _check_gather(_Group(rank, world_size))
        _check_scatter(_Group(rank, world_size))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_are_exact(world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (world_size, str(tmp_path / "store")), nprocs=world_size)


def test_single_rank_needs_no_group() -> None:
    group: Any = type("Group", (), {"world_size": 1, "rank_in_group": 0})()
    value = torch.arange(6.0).view(3, 2)
    assert torch.equal(cpu_gatherv.all_gatherv(group, value), value)
    assert torch.equal(cpu_gatherv.reduce_scatterv(group, value, 0), value)


@pytest.fixture
def communicator(stock: Any) -> Any:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    return stock(CpuCommunicator, *_OURS)


_OURS = ("all_gatherv", "reduce_scatterv")


def test_upstream_lacks_the_collectives(communicator: type) -> None:
    """The defect. When this fails, the patch can go."""
    bare: Any = communicator.__new__(communicator)
    with pytest.raises(NotImplementedError):
        bare.all_gatherv(torch.ones(1, 1))
    with pytest.raises(NotImplementedError):
        bare.reduce_scatterv(torch.ones(1, 1))


def test_apply_is_idempotent(communicator: type) -> None:
    assert cpu_gatherv.apply() is Outcome.APPLIED
    methods = [vars(communicator)[name] for name in _OURS]
    assert cpu_gatherv.apply() is Outcome.APPLIED
    assert methods == [vars(communicator)[name] for name in _OURS]


def test_apply_leaves_an_upstream_repair_alone(communicator: type) -> None:
    def upstream(self: Any) -> None: ...

    for name in _OURS:
        setattr(communicator, name, upstream)
    assert cpu_gatherv.apply() is Outcome.NOT_NEEDED
    assert vars(communicator)["all_gatherv"] is upstream


def test_apply_refuses_half_a_repair(communicator: type) -> None:
    communicator.all_gatherv = lambda self: None  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match=r"^cpu_gatherv: .*all_gatherv only.*vLLM \d"):
        cpu_gatherv.apply()


def _renamed(self: Any, tensor: Any, dim: int = 0, sizes: Any = None) -> None: ...


def test_apply_refuses_another_contract(communicator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators import base_device_communicator as base

    renamed: Callable[..., None] = _renamed
    monkeypatch.setattr(base.DeviceCommunicatorBase, "reduce_scatterv", renamed)
    with pytest.raises(PatchError, match="cpu_gatherv: _renamed takes"):
        cpu_gatherv.apply()
    assert not any(name in vars(communicator) for name in _OURS)
