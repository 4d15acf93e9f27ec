# SPDX-License-Identifier: Apache-2.0
"""The routed exchange: ranks write into each other's memory, and only where a row visits. For GPUs that reach each
other's memory.

Every rank has a buffer that all ranks can write to. In it, place ``rank * capacity + i`` belongs to the i-th query that
another rank sends here, or to the i-th result that comes back from one; each place has a flag. Which places a step uses
is in device memory, so that one captured graph serves any route. A layer takes four kernels beside attention:

1. ``dispatch``: queries are written to their holders' buffers, then their flags;
2. ``wait``: until the queries of all guests are in. What does not depend on them runs between the two;
3. ``answer``: pieces of attention are merged and written to the homes' buffers, then the flags;
4. ``merge``: each result waits for the rows that it is made of.

A flag is a number that grows with every layer of every step, the epoch; the step's part of it comes with the plan, so
that all ranks agree also after a step that failed. Whoever waits, waits for that number or a larger one.

No place is ever written before its last use is over, without any barrier: only one rank writes to a place. A home sends
its next query to a place after it has merged the answer to the last one, so the holder has read that; a holder answers
after it was asked, and the home asks again only after it has merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..attention.partial_rows import RowLayout, add_piece

# Layers that a step's epochs have room for.
MAX_LAYERS = 4096


@dataclass
class Route:
    """Which places a step uses, in device memory.

    Attributes:
        send: int64 [places], index in the batch of the query that goes to a place; anything for an unused one.
        sent: int64 [num_ranks], how many places at each rank this one writes to.
        received: int64 [num_ranks], how many of this rank's places each rank writes to.
        epoch: int64 [1], that of the step's first layer.
    """

    send: torch.Tensor
    sent: torch.Tensor
    received: torch.Tensor
    epoch: torch.Tensor


class Routes:
    """The buffer and kernels of one capacity.

    Args:
        capacity: places for each pair of ranks.
        num_ranks: N.
        rank: this one.
        layout: of partial results.
        query_bytes: most bytes of a query, over all heads; a multiple of 4.
        buffer: uint8 [``size``], this rank's, zeroed before any rank writes to it.
        pointers: int64 [num_ranks], where each rank's buffer is in this process's address space.
    """

    def __init__(
        self,
        capacity: int,
        num_ranks: int,
        rank: int,
        layout: RowLayout,
        query_bytes: int,
        buffer: torch.Tensor,
        pointers: torch.Tensor,
    ) -> None:
        self.capacity, self.rank, self.layout, self.pointers = capacity, rank, layout, pointers
        self.places = capacity * num_ranks
        parts = _parts(self.places, layout, query_bytes)
        self._queries_at, self._rows_at, self._asked_at, self._answered_at, _ = offsets = _offsets(parts)
        queries, rows, asked, answered = (buffer[a : a + n] for a, n in zip(offsets, parts, strict=False))
        self._queries = queries
        self.rows = rows.view(torch.float32).view(self.places, layout.size)
        self._asked, self._answered = asked.view(torch.int64), answered.view(torch.int64)
        # Heads of a place's answer that are written.
        self._heads = torch.zeros(self.places, dtype=torch.int32, device=buffer.device)

    @staticmethod
    def size(capacity: int, num_ranks: int, layout: RowLayout, query_bytes: int) -> int:
        """Bytes of a buffer."""
        return _offsets(_parts(capacity * num_ranks, layout, query_bytes))[-1]

    def visiting(self, like: torch.Tensor) -> torch.Tensor:
        """The queries that were sent here: [places, num_heads, head_size].

        Args:
            like: [tokens, num_heads, head_size], of the type that is sent.
        """
        row = like.shape[1] * like.shape[2]
        return self._queries.view(like.dtype)[: self.places * row].view(self.places, *like.shape[1:])

    def dispatch(self, query: torch.Tensor, route: Route, layer: int) -> None:
        """Send this rank's queries to their places.

        Args:
            query: [tokens, num_heads, head_size], a token's numbers contiguous.
            route: of the step.
            layer: number of the layer, the same on all ranks.
        """
        assert query.stride(2) == 1 and query.stride(1) == query.shape[2]
        words = query.view(torch.int32)
        count = words.shape[1] * words.shape[2]
        _dispatch_kernel[(self.places,)](
            words, route.send, route.sent, route.epoch, self.pointers,
            self.rank, layer, self.capacity, words.stride(0), self._queries_at, self._asked_at,
            WORDS=count, BLOCK=min(2048, triton.next_power_of_2(count)), num_warps=8,
        )  # fmt: skip

    def wait(self, route: Route, layer: int) -> None:
        """Hold the stream until all queries for this rank are in."""
        _wait_kernel[(self.places,)](
            self._asked, route.received, route.epoch, layer, self.capacity, num_warps=1
        )  # fmt: skip

    def answer(self, outputs: torch.Tensor, lses: torch.Tensor, pieces: torch.Tensor, route: Route, layer: int) -> None:
        """Merge the pieces of each guest's attention and send the result home.

        Args:
            outputs: contiguous [most pieces, num_heads, places, head_size], float32.
            lses: contiguous [most pieces, num_heads, places], float32, natural; infinite where a piece has no keys.
            pieces: int32 [places], how many pieces each was cut into.
            route, layer: as of ``dispatch``.
        """
        layout = self.layout
        _answer_kernel[(self.places, layout.num_heads)](
            outputs, lses, pieces, route.received, route.epoch, self.pointers, self._heads,
            self.rank, layer, self.capacity, layout.num_heads, layout.size, self.places,
            self._rows_at, self._answered_at,
            HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size),
        )  # fmt: skip

    def merge(self, pick: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor, route: Route, layer: int) -> None:
        """Merge the rows that come back as they come.

        Args:
            pick: int64 [num_results, num_partials], which places make a result; -1 for none.
            tokens: int64 [num_results], where in ``output`` a result goes; -1 for nowhere.
            output: [num_tokens, num_heads, head_size], a token's numbers contiguous.
            route, layer: as of ``dispatch``.
        """
        layout = self.layout
        num_results, num_partials = pick.shape
        _merge_kernel[(num_results, layout.num_heads)](
            self.rows, self._answered, pick, tokens, output, route.epoch,
            layer, num_partials, layout.num_heads, layout.size, output.stride(0),
            HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size),
        )  # fmt: skip


def _parts(places: int, layout: RowLayout, query_bytes: int) -> tuple[int, int, int, int]:
    """Bytes of a buffer's parts: queries, rows, and the flags of both."""
    return places * query_bytes, places * layout.size * 4, places * 8, places * 8


def _offsets(parts: tuple[int, ...]) -> list[int]:
    """Where each part begins, at multiples of 128 bytes, and where all end."""
    at, offsets = 0, []
    for part in parts:
        offsets.append(at)
        at += -(-part // 128) * 128
    return [*offsets, at]


@triton.jit
def _await(flag, epoch):  # type: ignore[no-untyped-def]
    """Until a rank has written this epoch, or a later one, behind what the flag guards."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < epoch:
        pass


@triton.jit(do_not_specialize=["me", "layer", "capacity", "query_stride", "queries_at", "asked_at"])
def _dispatch_kernel(  # type: ignore[no-untyped-def]
    query_ptr, send_ptr, sent_ptr, epoch_ptr, pointers_ptr, me, layer, capacity, query_stride, queries_at, asked_at,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    peer, slot = place // capacity, place % capacity
    if slot < tl.load(sent_ptr + peer):
        base, there = tl.load(pointers_ptr + peer), (me * capacity + slot).to(tl.int64)
        epoch = tl.load(epoch_ptr) + layer
        source = query_ptr + tl.load(send_ptr + place) * query_stride
        target = (base + queries_at + there * (WORDS * 4)).to(tl.pointer_type(tl.int32))
        for first in range(0, WORDS, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at, mask=at < WORDS), mask=at < WORDS)
        tl.debug_barrier()  # the flag is written by one thread, after what all have written
        tl.atomic_xchg((base + asked_at + there * 8).to(tl.pointer_type(tl.int64)), epoch, sem="release", scope="sys")


@triton.jit(do_not_specialize=["layer", "capacity"])
def _wait_kernel(asked_ptr, received_ptr, epoch_ptr, layer, capacity):  # type: ignore[no-untyped-def]
    place = tl.program_id(0)
    if place % capacity < tl.load(received_ptr + place // capacity):
        _await(asked_ptr + place, tl.load(epoch_ptr) + layer)


@triton.jit(do_not_specialize=["me", "layer", "capacity", "num_heads", "row_size", "places", "rows_at", "answered_at"])
def _answer_kernel(  # type: ignore[no-untyped-def]
    outs_ptr, lses_ptr, pieces_ptr, received_ptr, epoch_ptr, pointers_ptr, heads_ptr,
    me, layer, capacity, num_heads, row_size, places, rows_at, answered_at,
    HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0), tl.program_id(1)
    home, slot = place // capacity, place % capacity
    if slot < tl.load(received_ptr + home):
        d = tl.arange(0, WIDE)
        most = tl.full([1], float("-inf"), tl.float32)
        total = tl.full([1], 0.0, tl.float32)
        acc = tl.full([1, WIDE], 0.0, tl.float32)
        for piece in range(tl.load(pieces_ptr + place)):
            at = (piece * num_heads + head).to(tl.int64) * places + place
            lse = tl.load(lses_ptr + at + tl.arange(0, 1))
            o = tl.load(outs_ptr + at * HEAD + d, mask=d < HEAD, other=0.0)[None, :]
            most, total, acc = add_piece(o, lse, most, total, acc)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        base, there = tl.load(pointers_ptr + home), (me * capacity + slot).to(tl.int64)
        row = (base + rows_at + there * row_size * 4).to(tl.pointer_type(tl.float32))
        tl.store(row + head * HEAD + d[None, :], acc, mask=(d < HEAD)[None, :])
        tl.store(row + num_heads * HEAD + head + tl.arange(0, 1), most + tl.log(total))
        tl.debug_barrier()
        # The last head to be written sets the flag, for all.
        if tl.atomic_add(heads_ptr + place, 1, sem="acq_rel", scope="sys") == num_heads - 1:
            tl.atomic_xchg(heads_ptr + place, 0, sem="relaxed")
            flag = (base + answered_at + there * 8).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(flag, tl.load(epoch_ptr) + layer, sem="release", scope="sys")


@triton.jit(do_not_specialize=["layer", "num_partials", "num_heads", "row_size", "output_stride"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, answered_ptr, pick_ptr, token_ptr, output_ptr, epoch_ptr,
    layer, num_partials, num_heads, row_size, output_stride,
    HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    result, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(token_ptr + result)
    if token >= 0:
        epoch = tl.load(epoch_ptr) + layer
        d = tl.arange(0, WIDE)
        most = tl.full([1], float("-inf"), tl.float32)
        total = tl.full([1], 0.0, tl.float32)
        acc = tl.full([1, WIDE], 0.0, tl.float32)
        for i in range(num_partials):
            place = tl.load(pick_ptr + result * num_partials + i)
            if place >= 0:
                _await(answered_ptr + place, epoch)
                base = rows_ptr + place * row_size
                lse = tl.load(base + num_heads * HEAD + head + tl.arange(0, 1))
                o = tl.load(base + head * HEAD + d, mask=d < HEAD, other=0.0)[None, :]
                most, total, acc = add_piece(o, lse, most, total, acc)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = output_ptr + token * output_stride + head * HEAD + d[None, :]
        tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=(d < HEAD)[None, :])
