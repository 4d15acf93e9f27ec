# SPDX-License-Identifier: Apache-2.0
"""Variable-size all-gather and reduce-scatter on CPU.

Wrong upstream: `CpuCommunicator` (vllm/distributed/device_communicators/cpu_communicator.py)
chooses the all-gather/reduce-scatter all-to-all manager for data-parallel MoE layers, but has
neither of the two collectives which that manager calls: `all_gatherv` and `reduce_scatterv` are
inherited from `DeviceCommunicatorBase`, where they raise a bare `NotImplementedError`. Any
`--data-parallel-size` above 1 with a MoE model dies in its first forward pass.

Versions: 0.32.0, 0.33.0. Earlier ones have the same gap; later ones are served as long as the base
class's signatures stay.

Repair: both collectives over the group's gloo backend.

* `all_gatherv` broadcasts each rank's rows to where they belong in the result. Small payloads are
  packed first, so that several tensors cost one round. Ranks with no rows are skipped.
* `reduce_scatterv` exchanges row pieces and sums them in rank order, in float32 where the dtype is
  narrower. A row's sum is thus bitwise the same whichever rank owns it and whatever the sizes: a
  request's tokens do not depend on where in the batch, or on which rank, it runs.

Can go: when `CpuCommunicator` defines both methods.

Known upstream: https://github.com/vllm-project/vllm/issues/57837. https://github.com/vllm-project/vllm/pull/47778 would
add both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm_nanocp.patches._guard import Outcome, PatchError, is_ours, mark, require_parameters

if TYPE_CHECKING:
    import torch

_NAMES = ("all_gatherv", "reduce_scatterv")

# Below this many bytes a rank, a round trip costs more than the copies into and out of one buffer.
_PACK_BYTES = 1 << 18


def apply() -> Outcome:
    """Give `CpuCommunicator` the two collectives. Idempotent.

    Raises `PatchError` if only one of them exists upstream or the base class's contract changed.
    """
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    own = [name for name in _NAMES if name in vars(CpuCommunicator)]
    if len(own) == len(_NAMES):
        return Outcome.APPLIED if is_ours(CpuCommunicator.all_gatherv) else Outcome.NOT_NEEDED
    if own:
        raise PatchError(__name__, f"CpuCommunicator defines {own[0]} only")
    for name in _NAMES:
        base = getattr(DeviceCommunicatorBase, name, None)
        if base is None:
            raise PatchError(__name__, f"DeviceCommunicatorBase has no {name}")
        require_parameters(__name__, base, ("self", "input_", "dim", "sizes"))
    mark(all_gatherv)
    CpuCommunicator.all_gatherv = all_gatherv  # type: ignore[method-assign]
    CpuCommunicator.reduce_scatterv = reduce_scatterv  # type: ignore[method-assign]
    return Outcome.APPLIED


def all_gatherv(
    self: Any,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Gather rows from every rank, in rank order; ranks may hold different numbers of rows.

    `input_`: a tensor [rows, ...] of any dtype, or a list of tensors with the same number of rows.
    Rank i has `sizes[i]` rows, which may be 0; without `sizes` all have as many as this one.
    Returns [sum of sizes, ...] a tensor, a list for a list.
    Raises `NotImplementedError` for `dim` other than 0, `ValueError` if the input contradicts
    `sizes`.
    """
    if dim != 0:
        raise NotImplementedError("only dim 0 all-gatherv is supported")
    tensors = input_ if isinstance(input_, list) else [input_]
    if not tensors or self.world_size == 1:
        return input_
    sizes = sizes or [tensors[0].shape[0]] * self.world_size
    if len(sizes) != self.world_size:
        raise ValueError(f"{len(sizes)} sizes for {self.world_size} ranks")
    for tensor in tensors:
        if tensor.shape[0] != sizes[self.rank_in_group]:
            raise ValueError(
                f"rank {self.rank_in_group} has {tensor.shape[0]} rows, not the {sizes[self.rank_in_group]} of `sizes`"
            )
    rows = [_as_bytes(tensor) for tensor in tensors]
    width = sum(row.shape[1] for row in rows)
    packed = len(rows) > 1 and max(sizes) * width <= _PACK_BYTES
    gathered = (_gather_packed if packed else _gather_direct)(self, rows, sizes)
    results = [
        result.view(tensor.dtype).view(-1, *tensor.shape[1:])
        if result.numel()
        else tensor.new_empty((sum(sizes), *tensor.shape[1:]))
        for tensor, result in zip(tensors, gathered, strict=True)
    ]
    return results if isinstance(input_, list) else results[0]


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Sum `input_` over the ranks and keep this rank's part of dimension `dim`.

    `input_`: floating point, the same shape on every rank; `sizes[i]` entries of `dim` go to rank
    i, an equal share without `sizes`. The sum is taken in rank order in at least float32, so an
    entry's bits depend on the addends only. Returns a new tensor like `input_` with
    `sizes[own rank]` entries in `dim`.
    Raises `ValueError` if `dim` has another length than the sum of `sizes`.
    """
    import torch
    import torch.distributed as dist

    if self.world_size == 1:
        return input_
    rows = input_.movedim(dim, 0).contiguous()
    if sizes is None:
        if rows.shape[0] % self.world_size:
            raise ValueError(f"{rows.shape[0]} rows do not divide by {self.world_size} ranks")
        sizes = [rows.shape[0] // self.world_size] * self.world_size
    if len(sizes) != self.world_size or sum(sizes) != rows.shape[0]:
        raise ValueError(f"sizes {sizes} do not fit {rows.shape[0]} rows, {self.world_size} ranks")
    own = sizes[self.rank_in_group]
    pieces = rows.new_empty((self.world_size * own, *rows.shape[1:]))
    dist.all_to_all_single(
        _as_bytes(pieces),  # a view: `pieces` is contiguous
        _as_bytes(rows),
        output_split_sizes=[own] * self.world_size,
        input_split_sizes=sizes,
        group=self.device_group,
    )
    parts = pieces.view(self.world_size, own, *rows.shape[1:]).unbind(0)
    total = parts[0].to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(rows.dtype).movedim(0, dim).contiguous()


def _gather_direct(self: Any, rows: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """Gather uint8 tensors [own rows, width]: each rank's part goes straight into the result."""
    results = [part.new_empty((sum(sizes), part.shape[1])) for part in rows]
    slots: list[tuple[int, torch.Tensor]] = []
    for part, result in zip(rows, results, strict=True):
        parts = result.split(sizes)
        parts[self.rank_in_group].copy_(part)
        slots += enumerate(parts)
    _broadcast_all(self, slots)
    return results


def _gather_packed(self: Any, rows: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """As `_gather_direct`, with one broadcast a rank: its parts of all tensors side by side."""
    import torch

    widths = [part.shape[1] for part in rows]
    packed = torch.empty((sum(sizes), sum(widths)), dtype=torch.uint8)
    ranks = packed.split(sizes)
    torch.cat(rows, dim=1, out=ranks[self.rank_in_group])
    _broadcast_all(self, list(enumerate(ranks)))
    # clone, not contiguous(): a slice of a single row may start where no wider dtype can.
    return [part.clone(memory_format=torch.contiguous_format) for part in packed.split(widths, 1)]


def _broadcast_all(self: Any, slots: list[tuple[int, torch.Tensor]]) -> None:
    """Fill every tensor from the rank of the group beside it; all are in flight at once."""
    import torch.distributed as dist

    works = [
        dist.broadcast(tensor, self.ranks[rank], group=self.device_group, async_op=True)
        for rank, tensor in slots
        if tensor.numel()
    ]
    for work in works:
        work.wait()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [rows, ...] as contiguous uint8 [rows, bytes a row]; gloo takes few dtypes."""
    import torch

    width = math.prod(tensor.shape[1:])
    if not tensor.numel():  # counts as contiguous whatever its strides, which view() then refuses
        return torch.empty((tensor.shape[0], width * tensor.element_size()), dtype=torch.uint8)
    return tensor.reshape(tensor.shape[0], width).contiguous().view(torch.uint8)
