# SPDX-License-Identifier: Apache-2.0
"""The routed exchange: ranks write into each other's memory, and only where a row visits. For GPUs that reach each
other's memory.

Every rank has a buffer that all ranks can write to. In it, place ``rank * capacity + i`` belongs to the i-th query that
another rank sends here, or to the i-th result that comes back from one; each place has flags. Which places a step uses
is in device memory, so that one captured graph serves any route. A layer takes two kernels beside attention:

1. ``dispatch``: queries are written to their holders' buffers, then their flags; it ends when the queries of all guests
   are in;
2. ``combine``: pieces of attention are merged and written to the homes' buffers, head by head, then the flags; each
   result waits for the rows that it is made of, and is merged from them.

In both, programs that wait come behind those that send, so they cannot keep these from running.

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

from ..attention.partial_rows import RowLayout, add_piece, merge_pieces

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
        """Send this rank's queries to their places, and hold the stream until all that come here are in.

        Args:
            query: [tokens, num_heads, head_size], a token's numbers contiguous.
            route: of the step.
            layer: number of the layer, the same on all ranks.
        """
        assert query.stride(2) == 1 and query.stride(1) == query.shape[2]
        words = query.view(torch.int32)
        count = words.shape[1] * words.shape[2]
        _dispatch_kernel[(2 * self.places,)](
            words, route.send, route.sent, route.received, route.epoch, self.pointers, self._asked,
            self.rank, layer, self.capacity, self.places, words.stride(0), self._queries_at, self._asked_at,
            WORDS=count, BLOCK=min(2048, triton.next_power_of_2(count)),
        )  # fmt: skip

    def combine(
        self,
        outputs: torch.Tensor,
        lses: torch.Tensor,
        pieces: torch.Tensor,
        pick: torch.Tensor,
        tokens: torch.Tensor,
        output: torch.Tensor,
        route: Route,
        layer: int,
    ) -> None:
        """Send the results of guests home, and merge those that come back as they come.

        Args:
            outputs: contiguous [most pieces, num_heads, places, head_size], float32.
            lses: contiguous [most pieces, num_heads, places], float32, natural; infinite where a piece has no keys.
            pieces: int32 [places], how many pieces each was cut into.
            pick: int64 [num_results, num_partials], which places make a result; -1 for none.
            tokens: int64 [num_results], where in ``output`` a result goes; -1 for nowhere.
            output: [num_tokens, num_heads, head_size], a token's numbers contiguous.
            route, layer: as of ``dispatch``.
        """
        layout = self.layout
        num_results, num_partials = pick.shape
        _combine_kernel[((self.places + num_results) * layout.num_heads,)](
            outputs, lses, pieces, route.received, self.pointers, self.rows, self._answered, pick, tokens, output,
            route.epoch, self.rank, layer, self.capacity, self.places, layout.num_heads, layout.size, num_partials,
            output.stride(0), self._rows_at, self._answered_at,
            HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size),
        )  # fmt: skip

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels now, not in front of the first long request. Nothing is sent.

        Args:
            dtype: of queries and of attention's output.
        """
        layout, device = self.layout, self.rows.device
        none = torch.zeros(self.places, dtype=torch.int64, device=device)
        route = Route(none, none[: len(self.pointers)], none[: len(self.pointers)], none[:1])
        query = torch.zeros((1, layout.num_heads, layout.head_size), dtype=dtype, device=device)
        outputs = torch.zeros((1, layout.num_heads, self.places, layout.head_size), device=device)
        nowhere = torch.full((1, 1), -1, dtype=torch.int64, device=device)
        self.dispatch(query, route, 0)
        self.combine(outputs, outputs[..., 0].contiguous(), none.int(), nowhere, nowhere[0], query, route, 0)


def _parts(places: int, layout: RowLayout, query_bytes: int) -> tuple[int, int, int, int]:
    """Bytes of a buffer's parts: queries, rows, a flag for each query, and one for each head of a row."""
    return places * query_bytes, places * layout.size * 4, places * 8, places * layout.num_heads * 8


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


@triton.jit
def _signal(flag, epoch):  # type: ignore[no-untyped-def]
    """Raise a flag once all that this program wrote can be seen behind it."""
    tl.debug_barrier()  # one thread writes it, after what all have written
    tl.atomic_xchg(flag.to(tl.pointer_type(tl.int64)), epoch, sem="release", scope="sys")


@triton.jit(
    do_not_specialize=["me", "layer", "capacity", "places", "query_stride", "queries_at", "asked_at"],
)
def _dispatch_kernel(  # type: ignore[no-untyped-def]
    query_ptr, send_ptr, sent_ptr, received_ptr, epoch_ptr, pointers_ptr, asked_ptr,
    me, layer, capacity, places, query_stride, queries_at, asked_at,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) % places
    peer, slot = place // capacity, place % capacity
    epoch = tl.load(epoch_ptr) + layer
    if tl.program_id(0) < places:
        if slot < tl.load(sent_ptr + peer):
            base, there = tl.load(pointers_ptr + peer), (me * capacity + slot).to(tl.int64)
            source = query_ptr + tl.load(send_ptr + place) * query_stride
            target = (base + queries_at + there * (WORDS * 4)).to(tl.pointer_type(tl.int32))
            for first in range(0, WORDS, BLOCK):
                at = first + tl.arange(0, BLOCK)
                tl.store(target + at, tl.load(source + at, mask=at < WORDS), mask=at < WORDS)
            _signal(base + asked_at + there * 8, epoch)
    elif slot < tl.load(received_ptr + peer):
        _await(asked_ptr + place, epoch)


@triton.jit(
    do_not_specialize=[
        "me", "layer", "capacity", "places", "num_heads", "row_size", "num_partials", "output_stride", "rows_at",
        "answered_at",
    ]
)  # fmt: skip
def _combine_kernel(  # type: ignore[no-untyped-def]
    outs_ptr, lses_ptr, pieces_ptr, received_ptr, pointers_ptr, rows_ptr, answered_ptr, pick_ptr, token_ptr,
    output_ptr, epoch_ptr,
    me, layer, capacity, places, num_heads, row_size, num_partials, output_stride, rows_at, answered_at,
    HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    epoch = tl.load(epoch_ptr) + layer
    d = tl.arange(0, WIDE)
    if number < places:
        home, slot = number // capacity, number % capacity
        if slot < tl.load(received_ptr + home):
            first = head.to(tl.int64) * places + number
            pieces = tl.load(pieces_ptr + number)
            acc, lse = merge_pieces(outs_ptr, lses_ptr, first, num_heads * places, pieces, HEAD, WIDE)
            base, there = tl.load(pointers_ptr + home), (me * capacity + slot).to(tl.int64)
            row = (base + rows_at + there * row_size * 4).to(tl.pointer_type(tl.float32))
            tl.store(row + head * HEAD + d, acc, mask=d < HEAD)
            tl.store(row + num_heads * HEAD + head, lse)
            _signal(base + answered_at + (there * num_heads + head) * 8, epoch)
    else:
        token = tl.load(token_ptr + number - places)
        if token >= 0:
            most = tl.full([1], float("-inf"), tl.float32)
            total = tl.full([1], 0.0, tl.float32)
            acc = tl.full([1, WIDE], 0.0, tl.float32)
            for i in range(num_partials):
                place = tl.load(pick_ptr + (number - places) * num_partials + i)
                if place >= 0:
                    _await(answered_ptr + place * num_heads + head, epoch)
                    base = rows_ptr + place * row_size
                    lse = tl.load(base + num_heads * HEAD + head + tl.arange(0, 1))
                    o = tl.load(base + head * HEAD + d, mask=d < HEAD, other=0.0)[None, :]
                    most, total, acc = add_piece(o, lse, most, total, acc)
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
            to = output_ptr + token * output_stride + head * HEAD + d[None, :]
            tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=(d < HEAD)[None, :])
