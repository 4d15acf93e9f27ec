# SPDX-License-Identifier: Apache-2.0
"""Memory that all ranks of one machine can write to. Touches ``torch.distributed._symmetric_memory`` (torch 2.11)
and vLLM's ``CudaPlatform.is_fully_connected`` and ``.visible_device_id_to_physical_device_id``.

Multicast is not used: it needs NVSwitch features that virtual machines often lack.
"""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist

from ..environment import variable


def allocate(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A zeroed buffer on every rank, mapped into all. A collective: every member of the group calls it alike.

    Args:
        size: bytes.
        group: one member a rank, in rank order.
        device: this rank's GPU.

    Returns:
        This rank's buffer, uint8 [size]; and where all ranks' are in this process, int64 [num_ranks] on the device. The
        buffer lives as long as the process.

    Raises:
        RuntimeError: the GPUs do not reach each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric

    # Only of this memory: vLLM's own, of its all-reduce, may have it.
    with variable("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"):
        buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        buffer.zero_()
        handle = symmetric.rendezvous(buffer, group)
    _KEPT.append((buffer, handle))
    pointers = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return buffer, pointers


_KEPT: list[object] = []


def reachable(device: torch.device, group: dist.ProcessGroup) -> str:
    """Why the ranks cannot write into each other's memory, the same on all; empty if they can. A collective.

    Over NVLink only: flags are atomic operations on another GPU's memory, which PCIe need not have.

    Args:
        device: this rank's GPU.
        group: of the ranks, over CPUs.
    """
    from vllm.platforms import current_platform

    # Several nodes may have one name, and a node's containers several.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    physical = current_platform.visible_device_id_to_physical_device_id(device.index)
    mine = (f"{socket.gethostname()} {boot}", physical, device.index)
    everyone: list[tuple[str, int, int]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    problem = ""
    if any(host != mine[0] for host, _, _ in everyone):
        problem = "ranks are on several machines"
    elif not current_platform.is_fully_connected(sorted({number for _, number, _ in everyone})):
        problem = "the ranks' GPUs are not all linked by NVLink"
    else:
        for _, number, index in everyone:
            if number != physical and not _can_access(device.index, index):
                problem = f"GPU {physical} cannot reach the memory of GPU {number}"
    return first_problem(problem, group)


def _can_access(device: int, peer: int) -> bool:
    """Whether this process sees both GPUs, by those numbers, and they reach each other."""
    if peer == device or peer >= torch.cuda.device_count():
        return False  # the other rank was given its GPUs alone, and counts them from 0
    return torch.cuda.can_device_access_peer(device, peer)


def first_problem(problem: str, group: dist.ProcessGroup) -> str:
    """What the first rank that has a problem says; empty if none has. A collective."""
    problems = [problem] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group)
    return next((p for p in problems if p), "")
