# SPDX-License-Identifier: Apache-2.0
"""The routed exchange where a vendor's kernel attends: ranks write queries and partial results into each other's
memory, and only where a row visits. For GPUs that reach each other's memory.

Places, flags and epochs are those of ``gqa/routed_layer.py``: place ``rank * capacity + i`` belongs to the i-th query
that another rank sends here, or to the i-th result that comes back from one; place ``num_ranks * capacity + i`` to the
i-th row of this rank that visits, for what is held here of its last run. What is there one kernel is four here, around
those that attend:

1. send: queries are written to their holders' places, part by part, each with a flag behind it;
2. arrive: waits until all of a step's queries are in. They lie one after another, as the next kernel reads them;
3. answer: results are written to their homes' places, some heads at a time, each time with a flag behind them;
4. collect: each result waits for the rows that it is made of, and is merged from them.

No rank waits for ever, for what a kernel waits for comes before it on every rank's stream: ``arrive`` of a layer waits
for ``send`` of that layer, which comes behind ``collect`` of the layer before; that waits for ``answer`` of that layer.
Ranks make the same calls for the same layers, also with nothing to send.

No place is written before its last use is over, without any barrier: a home sends its next query to a place after it
has merged the answer to the last one, for which the holder has read the query; a holder answers after it was asked,
and the home asks again only after it has merged. So places of one capacity are never those of another: a step of
another capacity would have them of other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.utils.torch_utils import async_tensor_h2d

from .flags import RouteMemory, await_flag, offsets_of, place_there, signal
from .flash_launches import empty_numbers, places_of, split_numbers
from .partial_rows import RowLayout

# Layers that a step's epochs have room for.
MAX_LAYERS = 4096
# Numbers of a query that a program copies, with a flag behind them; and heads of a result that it writes.
_NUMBERS, _HEADS = 2048, 4
# Programs of a launch at most: more would only take their turns.
_PROGRAMS = 2048


@dataclass
class RowRoute:
    """Which places a step uses, in device memory; a place is of one query.

    Attributes:
        asks: int64 [places, 2], a place that a query goes to, and the query's index in the batch.
        answers: int64 [places], places whose queries come here.
        counts: int64 [4], the epoch of the step's first layer; how many asks, answers and results there are.
        pick: int64 [capacity, num_ranks + 1], which places make a result; -1 for none.
        tokens: int64 [capacity], where in the batch a result goes.
    """

    asks: torch.Tensor
    answers: torch.Tensor
    counts: torch.Tensor
    pick: torch.Tensor
    tokens: torch.Tensor


class _Parts(NamedTuple):
    """Of one piece of 8-byte numbers; or how many each has."""

    asks: Any
    answers: Any
    counts: Any
    pick: Any
    tokens: Any


class RowRoutes(RouteMemory):
    """The buffer, the tables and the kernels of one capacity.

    Args:
        capacity: queries for each pair of ranks, and of a rank's own rows that visit.
        num_ranks: N.
        rank: this one.
        layout: of partial results.
        query_bytes: of a query, over all heads, whose numbers have 16 bits; a multiple of 16.
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
        assert query_bytes % 16 == 0, "copied 16 bytes at a time"
        parts = _parts(places_of(capacity, num_ranks), layout, query_bytes)
        super().__init__(capacity, num_ranks, rank, layout, parts, buffer, pointers)
        self.numbers = query_bytes // 2
        self._copies, self._groups = triton.cdiv(self.numbers, _NUMBERS), triton.cdiv(layout.num_heads, _HEADS)
        width = num_ranks + 1
        self._sizes = _Parts(2 * self.places, self.places, 4, capacity * width, capacity)
        self._ints = empty_numbers(self._sizes, self.pointers.device)
        at = _Parts(*split_numbers(self._ints, self._sizes))
        self.route = RowRoute(at.asks.view(-1, 2), at.answers, at.counts, at.pick.view(-1, width), at.tokens)

    @staticmethod
    def size(capacity: int, num_ranks: int, layout: RowLayout, query_bytes: int) -> int:
        """Bytes of a buffer."""
        return offsets_of(_parts(places_of(capacity, num_ranks), layout, query_bytes))[-1]

    def fill(self, serial: int, pick: np.ndarray, tokens: np.ndarray, answers: np.ndarray) -> RowRoute:
        """Write a step's route, in one copy.

        Args:
            serial: of the step, see ``ShardedStep``.
            pick: int64 [results, num_ranks + 1], the places that make each result, in the order in which they are
                merged: of this rank's own first, then of those visited; -1 for none.
            tokens: int64 [results], where in the batch each is.
            answers: int64 [any], places whose queries come here, this rank's own among them.

        Returns:
            The same tensors each time.
        """
        host = np.zeros(len(self._ints), dtype=np.int64)
        at = _Parts(*split_numbers(host, self._sizes))
        mine, away = pick[:, 0], pick[:, 1:]
        visited = away >= 0
        # What travels furthest leaves first.
        places = np.concatenate((away[visited], mine))
        asks = at.asks.reshape(-1, 2)[: len(places)]
        asks[:, 0], asks[:, 1] = places, np.concatenate((np.repeat(tokens, visited.sum(1)), tokens))
        at.answers[: len(answers)] = answers
        at.counts[:] = serial * MAX_LAYERS, len(asks), len(answers), len(pick)
        at.pick[: pick.size] = pick.reshape(-1)
        at.tokens[: len(tokens)] = tokens
        at.pick[pick.size :], at.tokens[len(tokens) :] = -1, -1
        async_tensor_h2d(host, out=self._ints)
        return self.route

    def send(self, queries: torch.Tensor, layer: int) -> None:
        """Write the batch's queries to where they visit.

        Args:
            queries: [tokens, num_heads, query size], a token's numbers contiguous.
            layer: its number, the same on all ranks.
        """
        numbers, route = queries.flatten(1).view(torch.int16), self.route
        assert numbers.shape[1] == self.numbers
        _send_kernel[(min(_PROGRAMS, self.places * self._copies),)](
            numbers, numbers.stride(0), route.asks, route.counts, self.pointers, self.rank, layer, self.capacity,
            self.num_ranks, self._queries_at, self._asked_at, self._copies, NUMBERS=self.numbers, BLOCK=_NUMBERS,
        )  # fmt: skip

    def arrive(self, layer: int) -> None:
        """Wait until the layer's queries are at their places here."""
        route = self.route
        _arrive_kernel[(min(_PROGRAMS // 8, self.places * self._copies),)](
            route.answers, route.counts, self._asked, layer, self._copies, num_warps=1
        )

    def answer(
        self, outputs: torch.Tensor, lses: torch.Tensor, empty: torch.Tensor | None, first: int, layer: int
    ) -> None:
        """Write partial results to the homes of their queries.

        Args:
            outputs: float32 [places of a launch, num_heads, value size], a head's numbers contiguous.
            lses: float32 [places of a launch, num_heads], natural.
            empty: bool [places of a launch], which have no keys; None: none.
            first: the launch's first place.
            layer: see ``send``.
        """
        route, layout, count = self.route, self.layout, len(outputs)
        assert outputs.stride(2) == 1 and outputs.shape[1:] == (layout.num_heads, layout.head_size)
        _answer_kernel[(min(_PROGRAMS, count * self._groups),)](
            outputs, outputs.stride(0), outputs.stride(1), lses, lses.stride(0), lses.stride(1),
            None if empty is None else empty.view(torch.uint8),
            route.answers, route.counts, self.pointers, first, first + count, self.rank, layer, self.capacity,
            self.num_ranks, layout.num_heads, layout.size, self._groups, self._rows_at, self._answered_at,
            HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size), HEADS=_HEADS,
        )  # fmt: skip

    def collect(self, output: torch.Tensor, layer: int) -> None:
        """Merge what has come back, and write it to the batch's output.

        Args:
            output: [tokens, num_heads, value size], a token's numbers contiguous.
            layer: see ``send``.
        """
        route, layout = self.route, self.layout
        assert output.stride()[1:] == (layout.head_size, 1)
        width = self.num_ranks + 1
        _collect_kernel[(min(_PROGRAMS, self.capacity * layout.num_heads),)](
            self.rows, self._answered, route.pick, route.tokens, route.counts, output, output.stride(0), layer,
            layout.num_heads, layout.size, self._groups, width, PARTIALS=max(2, triton.next_power_of_2(width)),
            HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size), HEADS=_HEADS, num_warps=1,
        )  # fmt: skip

    def warm_up(self, dtype: torch.dtype, query_size: int) -> None:
        """Compile the kernels. The route is empty, so nothing is sent and nobody waits.

        Args:
            dtype: of queries and output.
            query_size: numbers of a head's query.
        """
        layout, device = self.layout, self.pointers.device
        query = torch.zeros((1, layout.num_heads, query_size), dtype=dtype, device=device)
        # As the product of matrices leaves them: heads come first in memory.
        values = torch.zeros((layout.num_heads, self.places, layout.head_size), device=device).transpose(0, 1)
        lses = torch.zeros((layout.num_heads, self.places), device=device).transpose(0, 1)
        output = torch.zeros((1, layout.num_heads, layout.head_size), dtype=dtype, device=device)
        self.send(query, 0)
        self.arrive(0)
        # With several queries a place a launch may begin at any place, and Triton has a kernel of its own for addresses
        # that are no multiples of 16.
        for skipped in (0, 8):
            empty = torch.ones(skipped + self.places, dtype=torch.bool, device=device)[skipped:]
            self.answer(values, lses, empty, 0, 0)
        self.collect(output, 0)


def _parts(places: int, layout: RowLayout, query_bytes: int) -> tuple[int, int, int, int]:
    """Bytes of a buffer's parts: queries, rows, a flag for each part of a query, and for some heads of a row."""
    copies, groups = triton.cdiv(query_bytes // 2, _NUMBERS), triton.cdiv(layout.num_heads, _HEADS)
    return places * query_bytes, places * layout.size * 4, places * copies * 8, places * groups * 8


@triton.jit(do_not_specialize=["me", "layer", "capacity", "num_ranks", "copies"])
def _send_kernel(  # type: ignore[no-untyped-def]
    query_ptr, query_stride, asks_ptr, counts_ptr, pointers_ptr, me, layer, capacity, num_ranks, queries_at, asked_at,
    copies, NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1. Send. A program copies ``BLOCK`` numbers of a query, then raises their flag.

    Args: those of ``RowRoute``, as pointers; ``query_ptr`` and its stride from one token to the next; where in a buffer
        the queries and their flags begin, in bytes; ``copies``, how many parts a query has.
    """
    epoch = tl.load(counts_ptr) + layer
    for item in range(tl.program_id(0), tl.load(counts_ptr + 1).to(tl.int32) * copies, tl.num_programs(0)):
        ask, part = item // copies, item % copies
        peer, there = place_there(tl.load(asks_ptr + ask * 2), me, capacity, num_ranks)
        base = tl.load(pointers_ptr + peer)
        at = part * BLOCK + tl.arange(0, BLOCK)
        some = tl.load(query_ptr + tl.load(asks_ptr + ask * 2 + 1) * query_stride + at, mask=at < NUMBERS)
        target = (base + queries_at + there * (NUMBERS * 2)).to(tl.pointer_type(tl.int16))
        # Said to the compiler, which would write number by number.
        tl.store(tl.multiple_of(target, 16) + at, some, mask=at < NUMBERS)
        signal(base + asked_at + (there * copies + part) * 8, epoch)


@triton.jit(do_not_specialize=["layer", "copies"])
def _arrive_kernel(answers_ptr, counts_ptr, asked_ptr, layer, copies):  # type: ignore[no-untyped-def]
    """2. Arrive: wait for the flags of all parts of all queries that come here."""
    epoch = tl.load(counts_ptr) + layer
    for item in range(tl.program_id(0), tl.load(counts_ptr + 2).to(tl.int32) * copies, tl.num_programs(0)):
        await_flag(asked_ptr + tl.load(answers_ptr + item // copies) * copies + item % copies, epoch)


@triton.jit(
    do_not_specialize=[
        "lse_row", "lse_head", "first", "end", "me", "layer", "capacity", "num_ranks", "num_heads", "groups",
    ]
)  # fmt: skip
def _answer_kernel(  # type: ignore[no-untyped-def]
    out_ptr, out_row, out_head, lse_ptr, lse_row, lse_head, empty_ptr, answers_ptr, counts_ptr, pointers_ptr, first,
    end, me, layer, capacity, num_ranks, num_heads, row_size, groups, rows_at, answered_at,
    HEAD: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """3. Answer. A program writes ``HEADS`` heads of a result to its home, then raises their flag.

    Args: those of ``RowRoutes.answer``, with strides in elements; places from ``first`` to ``end`` - 1 are the
        launch's; ``groups`` of heads has a row.
    """
    epoch = tl.load(counts_ptr) + layer
    i, d = tl.arange(0, HEADS), tl.arange(0, WIDE)
    for item in range(tl.program_id(0), tl.load(counts_ptr + 2).to(tl.int32) * groups, tl.num_programs(0)):
        place, group = tl.load(answers_ptr + item // groups), item % groups
        if (place >= first) & (place < end):
            home, there = place_there(place, me, capacity, num_ranks)
            base = tl.load(pointers_ptr + home)
            head, row = group * HEADS + i, place - first
            inside = (head < num_heads)[:, None] & (d < HEAD)[None, :]
            out = tl.load(out_ptr + row * out_row + (head.to(tl.int64) * out_head)[:, None] + d[None, :], mask=inside)
            lse = tl.load(lse_ptr + row * lse_row + head.to(tl.int64) * lse_head, mask=head < num_heads)
            if empty_ptr is not None:  # whatever a kernel says of rows without keys, they weigh nothing
                lse = tl.where(tl.load(empty_ptr + row) != 0, float("-inf"), lse)
            target = (base + rows_at + there * row_size * 4).to(tl.pointer_type(tl.float32))
            tl.store(tl.multiple_of(target, 16) + head[:, None] * HEAD + d[None, :], out, mask=inside)
            tl.store(target + num_heads * HEAD + head, lse, mask=head < num_heads)
            signal(base + answered_at + (there * groups + group) * 8, epoch)


@triton.jit(do_not_specialize=["layer", "num_heads", "groups", "num_partials"])
def _collect_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, answered_ptr, pick_ptr, token_ptr, counts_ptr, output_ptr, output_stride, layer, num_heads, row_size,
    groups, num_partials, PARTIALS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """4. Collect. A program waits until all partial rows of a result have one head, merges these by their log-sum-exps,
    and writes the head to the output.

    Args: this rank's rows and their flags; those of ``RowRoute``; PARTIALS: a power of two, at least ``num_partials``.
    """
    epoch = tl.load(counts_ptr) + layer
    i, d = tl.arange(0, PARTIALS), tl.arange(0, WIDE)
    for item in range(tl.program_id(0), tl.load(counts_ptr + 3).to(tl.int32) * num_heads, tl.num_programs(0)):
        result, head = item // num_heads, item % num_heads
        place = tl.load(pick_ptr + result * num_partials + i, mask=i < num_partials, other=-1)
        used = place >= 0
        flags = answered_ptr + place * groups + head // HEADS
        while tl.min(tl.where(used, tl.atomic_add(flags, 0, mask=used, sem="acquire", scope="sys"), epoch), 0) < epoch:
            pass
        base = rows_ptr + place * row_size
        lse = tl.load(base + num_heads * HEAD + head, mask=used, other=float("-inf"))
        o = tl.load(base[:, None] + head * HEAD + d[None, :], mask=used[:, None] & (d < HEAD)[None, :], other=0.0)
        most = tl.max(lse, 0)
        weight = tl.exp(lse - tl.where(most == float("-inf"), 0.0, most))
        total = tl.sum(weight, 0)
        acc = tl.sum(tl.where(weight[:, None] > 0, o, 0.0) * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
        to = output_ptr + tl.load(token_ptr + result) * output_stride + head * HEAD + d
        tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=d < HEAD)
