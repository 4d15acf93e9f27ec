# SPDX-License-Identifier: Apache-2.0
"""Memory that all ranks write to, places there, and flags: what the kernels of the routed exchange have in common.

A flag is a number that grows with every layer of every step, the epoch. Whoever waits, waits for that number or a
larger one.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from .flash_launches import places_of
from .partial_rows import RowLayout


class RouteMemory:
    """The buffer of one capacity: queries and result rows at places, and behind these the flags of both.

    Args:
        capacity: places for each pair of ranks, and for a rank's own rows.
        num_ranks: N.
        rank: this one.
        layout: of partial results.
        parts: bytes of queries, of rows, and of the flags of either.
        buffer: uint8, as many as the parts take; this rank's, zeroed before any rank writes to it.
        pointers: int64 [num_ranks], where each rank's buffer is in this process's address space.
    """

    def __init__(
        self,
        capacity: int,
        num_ranks: int,
        rank: int,
        layout: RowLayout,
        parts: tuple[int, int, int, int],
        buffer: torch.Tensor,
        pointers: torch.Tensor,
    ) -> None:
        self.capacity, self.num_ranks, self.rank, self.layout = capacity, num_ranks, rank, layout
        # The rank's own buffer once more, as that of rank ``num_ranks``: own rows go through the same steps as visits.
        self.pointers = torch.cat([pointers, pointers[rank : rank + 1]])
        self.places = places_of(capacity, num_ranks)
        self._queries_at, self._rows_at, self._asked_at, self._answered_at, _ = offsets = offsets_of(parts)
        self._queries, rows, asked, answered = (buffer[a : a + n] for a, n in zip(offsets, parts, strict=False))
        self.rows = rows.view(torch.float32).view(-1, layout.size)
        self._asked, self._answered = asked.view(torch.int64), answered.view(torch.int64)

    def visiting(self, like: torch.Tensor) -> torch.Tensor:
        """The queries that were sent here, of all places: [rows, num_heads, query size].

        Args:
            like: [tokens, num_heads, query size], of the type that is sent.
        """
        row, rows = like.shape[1] * like.shape[2], len(self.rows)
        return self._queries.view(like.dtype)[: rows * row].view(rows, *like.shape[1:])


def offsets_of(parts: tuple[int, ...]) -> list[int]:
    """Where parts of so many bytes begin, at multiples of 128 bytes, and where all end."""
    return [0, *accumulate(-(-part // 128) * 128 for part in parts)]


@triton.jit
def await_flag(flag, epoch):  # type: ignore[no-untyped-def]
    """Until a rank has written this epoch, or a later one, behind what the flag guards."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < epoch:
        pass


@triton.jit
def signal(flag, epoch):  # type: ignore[no-untyped-def]
    """Raise a flag once all that this program wrote can be seen behind it."""
    tl.debug_barrier()  # one thread writes it, after what all have written
    tl.atomic_xchg(flag.to(tl.pointer_type(tl.int64)), epoch, sem="release", scope="sys")


@triton.jit
def place_there(place, me, capacity, num_ranks):  # type: ignore[no-untyped-def]
    """Where the other end of a place has it: at this rank's number, or among a rank's own."""
    peer = place // capacity
    return peer, tl.where(peer < num_ranks, me, num_ranks).to(tl.int64) * capacity + place % capacity
