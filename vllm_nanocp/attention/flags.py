# SPDX-License-Identifier: Apache-2.0
"""Flags in memory that all ranks write to, and places there: what the kernels of the routed exchange have in common.

A flag is a number that grows with every layer of every step, the epoch. Whoever waits, waits for that number or a
larger one.
"""

from __future__ import annotations

from itertools import accumulate

import triton
import triton.language as tl


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
