# SPDX-License-Identifier: Apache-2.0
"""The routed exchange: ranks write into each other's memory, and only where a row visits. For GPUs that reach each
other's memory.

Every rank has a buffer that all ranks can write to. In it, place ``rank * capacity + i`` belongs to the i-th query that
another rank sends here, or to the i-th result that comes back from one; place ``num_ranks * capacity + i`` to the i-th
row of this rank that visits, for what is held here of its last run. Each place has flags. Which places a step uses
is in device memory, so that one captured graph serves any route, and costs what is used, not what there is room for.
All of a layer's attention is one kernel, whose programs do one of four things, each for as many places as come to it:

1. send: a query is written to its holder's buffer, then its flag;
2. attend: to a piece of a row's KV, for a visit once its query is in. Rows of the batch that visit nobody are among
   these; the last program of such a row, if it has more than one, merges and writes its result;
3. answer: when all pieces of a visit have their result, these are merged and written to the home's buffer, head by
   head, then the flags;
4. collect: a result waits for the rows that it is made of, and is merged from them.

Programs that wait come behind those they wait for, here and on all other ranks, so they cannot keep these from running.

Where requests are decoded with drafts a place is of 1 + k queries: they are sent at once, attend together, and
have as many results. Rows that visit nobody are not this kernel's then.

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

from ..flags import RouteMemory, await_flag, offsets_of, place_there, signal
from ..flash_launches import places_of
from ..partial_rows import RowLayout, add_piece
from .split_kv import KV, Visits, attend_piece, kernel_arguments, programs_of, put_piece, put_row, seen_at, table_at

# Layers that a step's epochs have room for.
MAX_LAYERS = 4096


@dataclass
class Route:
    """Which places a step uses, in device memory.

    Attributes:
        asks: int64 [places, 2], a place that queries go to, and the first one's index in the batch.
        answers: int64 [places], places whose queries come here.
        counts: int64 [4], the epoch of the step's first layer; how many asks, answers and results there are.
        pick: int64 [most results, num_partials], which rows make a result, of each place as many as it has queries; -1
            for none.
        tokens: int64 [most results], where in the batch a result goes.
    """

    asks: torch.Tensor
    answers: torch.Tensor
    counts: torch.Tensor
    pick: torch.Tensor
    tokens: torch.Tensor


@dataclass
class LocalBatch:
    """This rank's rows.

    Attributes:
        query: [tokens, num_heads, head_size], a token's numbers contiguous.
        output: [tokens, num_heads, head_size], likewise; bfloat16 or float16.
        block_table: int32 [num_rows, most blocks], of rows that have pieces.
        seq_lens: int32 [num_rows], theirs; pieces may be for more tokens, but then see these only.
    """

    query: torch.Tensor
    output: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


class Routes(RouteMemory):
    """The buffer and kernels of one capacity.

    Args:
        capacity: places for each pair of ranks, and for a rank's own rows.
        num_ranks: N.
        rank: this one.
        layout: of partial results.
        query_bytes: most bytes of a query, over all heads; a multiple of 4.
        buffer: uint8 [``size``], this rank's, zeroed before any rank writes to it.
        pointers: int64 [num_ranks], where each rank's buffer is in this process's address space.
        queries: of a place.
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
        queries: int = 1,
    ) -> None:
        self.queries = queries
        parts = _parts(places_of(capacity, num_ranks), layout, query_bytes, queries)
        super().__init__(capacity, num_ranks, rank, layout, parts, buffer, pointers)

    @staticmethod
    def size(capacity: int, num_ranks: int, layout: RowLayout, query_bytes: int, queries: int = 1) -> int:
        """Bytes of a buffer."""
        return offsets_of(_parts(places_of(capacity, num_ranks), layout, query_bytes, queries))[-1]

    def attend(self, batch: LocalBatch, kv: KV, visits: Visits, route: Route, layer: int) -> None:
        """Attention of a layer: of all rows that have pieces, and of those that visit.

        Args:
            batch: this rank's. Rows that neither have pieces nor visit are not written to.
            kv: held here.
            visits: rows of the batch, and the places.
            route: of the step.
            layer: number of the layer, the same on all ranks.
        """
        query, output, layout = batch.query, batch.output, self.layout
        assert query.stride()[1:] == output.stride()[1:] == (layout.head_size, 1)
        assert visits.queries == self.queries
        words = query.view(torch.int32)
        arguments = kernel_arguments(kv, visits, layout.num_heads, output.dtype)
        most_results, num_partials = route.pick.shape
        # As many as a GPU runs at once: more would only take their turns.
        most = programs_of(1, query.device)
        attending = (len(visits.starts) - 1) * arguments["KV_HEADS"]
        sending, answering = min(most, self.places), min(most, self.rows.shape[0] * layout.num_heads)
        collecting = min(most, most_results * layout.num_heads)
        _layer_kernel[(sending + attending + answering + collecting,)](
            query_ptr=query, words_ptr=words, query_stride=query.stride(0), words_stride=words.stride(0),
            output_ptr=output, output_stride=output.stride(0), seq_lens_ptr=batch.seq_lens,
            batch_table_ptr=batch.block_table, batch_table_stride=batch.block_table.stride(0),
            first_ptr=visits.first, count_ptr=visits.count, done_ptr=visits.done,
            asks_ptr=route.asks, answers_ptr=route.answers, counts_ptr=route.counts,
            pick_ptr=route.pick, token_ptr=route.tokens, num_partials=num_partials,
            visiting_ptr=self.visiting(query), rows_ptr=self.rows, asked_ptr=self._asked, answered_ptr=self._answered,
            pointers_ptr=self.pointers, me=self.rank, layer=layer, capacity=self.capacity, num_ranks=self.num_ranks,
            sending=sending, attending=attending, answering=answering, collecting=collecting, row_size=layout.size,
            queries_at=self._queries_at, rows_at=self._rows_at,
            asked_at=self._asked_at, answered_at=self._answered_at,
            WORDS=words.shape[1] * words.shape[2], BLOCK_WORDS=min(2048, triton.next_power_of_2(words[0].numel())),
            PARTIALS=max(2, triton.next_power_of_2(num_partials)),
            **arguments,
        )  # fmt: skip


def _parts(places: int, layout: RowLayout, query_bytes: int, queries: int) -> tuple[int, int, int, int]:
    """Bytes of a buffer's parts: queries, rows, a flag for each place, and one for each head of a row."""
    rows = places * queries
    return rows * query_bytes, rows * layout.size * 4, places * 8, rows * layout.num_heads * 8


@triton.jit
def _send(  # type: ignore[no-untyped-def]
    ask, epoch, words_ptr, words_stride, asks_ptr, pointers_ptr, me, capacity, num_ranks, queries_at, asked_at,
    QUERIES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """1. Send: copy a row's queries, as 4-byte words, to their holder's buffer, then raise the flag of their place
    there.

    Args:
        ask: which of the step's asks.
        words_ptr, words_stride: the batch's queries, and words from one token's to the next.
        asks_ptr: see ``Route.asks``.
        pointers_ptr: int64, where each rank's buffer is; this rank's own once more behind them.
        queries_at, asked_at: bytes into a buffer, of queries and of their flags.
    """
    peer, there = place_there(tl.load(asks_ptr + ask * 2), me, capacity, num_ranks)
    base = tl.load(pointers_ptr + peer)
    source = words_ptr + tl.load(asks_ptr + ask * 2 + 1) * words_stride
    target = (base + queries_at + there * (QUERIES * WORDS * 4)).to(tl.pointer_type(tl.int32))
    for query in range(QUERIES):
        for first in range(0, WORDS, BLOCK_WORDS):
            at = first + tl.arange(0, BLOCK_WORDS)
            word = tl.load(source + query * words_stride + at, mask=at < WORDS)
            tl.store(target + query * WORDS + at, word, mask=at < WORDS)
    signal(base + asked_at + there * 8, epoch)


@triton.jit
def _merge_row(  # type: ignore[no-untyped-def]
    outs_ptr, lses_ptr, output_ptr, output_stride, row, first, pieces, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge a row of the batch from its pieces, all query heads of a KV head."""
    i, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    mine = (i < GROUP)[:, None] & (d < HEAD)[None, :]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, WIDE], 0.0, tl.float32)
    for piece in range(first, first + pieces):
        at = (piece * KV_HEADS + kv_head) * GROUP + i
        lse = tl.load(lses_ptr + at, mask=i < GROUP, other=float("-inf"))
        o = tl.load(outs_ptr + at[:, None] * HEAD + d[None, :], mask=mine, other=0.0)
        most, total, acc = add_piece(o, lse, most, total, acc)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    _put_result(acc, output_ptr, output_stride, row, kv_head, GROUP, ROWS, HEAD, WIDE)


@triton.jit
def _put_result(  # type: ignore[no-untyped-def]
    acc, output_ptr, output_stride, row, kv_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The result of a row of the batch, of all query heads of a KV head."""
    i, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    to = output_ptr + row * output_stride + (kv_head * GROUP + i)[:, None] * HEAD + d[None, :]
    tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=(i < GROUP)[:, None] & (d < HEAD)[None, :])


@triton.jit
def _answer(  # type: ignore[no-untyped-def]
    place, query, head, epoch, outs_ptr, lses_ptr, first_ptr, count_ptr, done_ptr, pointers_ptr,
    me, capacity, num_ranks, num_rows, row_size, rows_at, answered_at,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """3. Answer: once all pieces of a place's KV head have their result, merge them for one query head into the row at
    the home, then raise that head's flag there.

    ``done`` counts finished pieces of a row and KV head. Behind them it counts the heads of the group that have
    read it, so that the last of these can put it back to 0 for the next layer.

    Args:
        place, query, head: of the visit, which of its queries, and the query head.
        outs_ptr, lses_ptr, first_ptr, count_ptr, done_ptr: see ``Visits``.
        rows_at, answered_at: bytes into a buffer, of result rows and of their flags.
    """
    home, there = place_there(place, me, capacity, num_ranks)
    pieces, first = tl.load(count_ptr + num_rows + place), tl.load(first_ptr + num_rows + place)
    done = done_ptr + (num_rows + place) * KV_HEADS + head // GROUP
    while tl.atomic_add(done, 0, sem="acquire", scope="gpu") < pieces:
        pass
    heads = KV_HEADS * GROUP
    base = tl.load(pointers_ptr + home)
    there = there * QUERIES + query
    row = (base + rows_at + there * row_size * 4).to(tl.pointer_type(tl.float32))
    put_row(row, query, head, heads, outs_ptr, lses_ptr, first, pieces, QUERIES, HEAD, WIDE)
    signal(base + answered_at + (there * heads + head) * 8, epoch)
    # The last of the heads that wait for the same pieces leaves the count as it was.
    if tl.atomic_add(done, 1, sem="relaxed", scope="gpu") == pieces + QUERIES * GROUP - 1:
        tl.store(done, 0)


@triton.jit
def _collect(  # type: ignore[no-untyped-def]
    result, head, epoch, rows_ptr, answered_ptr, pick_ptr, token_ptr, output_ptr, output_stride,
    num_heads, row_size, num_partials, PARTIALS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """4. Collect: wait until all partial rows of one result have this head, merge them by their log-sum-exps, and write
    the head to the output.

    Args:
        result, head: which of the step's results, and the query head.
        rows_ptr, answered_ptr: this rank's buffer: result rows, and a flag for each of their heads.
        pick_ptr, token_ptr: see ``Route.pick`` and ``Route.tokens``.
        PARTIALS: a power of two, at least ``num_partials``.
    """
    token = tl.load(token_ptr + result)
    i, d = tl.arange(0, PARTIALS), tl.arange(0, WIDE)
    place = tl.load(pick_ptr + result * num_partials + i, mask=i < num_partials, other=-1)
    used = place >= 0
    flags = answered_ptr + place * num_heads + head
    while tl.min(tl.where(used, tl.atomic_add(flags, 0, mask=used, sem="acquire", scope="sys"), epoch), 0) < epoch:
        pass
    base = rows_ptr + place * row_size
    lse = tl.load(base + num_heads * HEAD + head, mask=used, other=float("-inf"))
    o = tl.load(base[:, None] + head * HEAD + d[None, :], mask=used[:, None] & (d < HEAD)[None, :], other=0.0)
    most = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight, 0)
    acc = tl.sum(tl.where(weight[:, None] > 0, o, 0.0) * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    to = output_ptr + token * output_stride + head * HEAD + d
    tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=d < HEAD)


@triton.jit(
    do_not_specialize=[
        "batch_table_stride", "num_rows", "num_partials", "me", "layer", "capacity", "num_ranks", "sending",
        "attending", "answering", "collecting", "row_size", "queries_at", "rows_at", "asked_at", "answered_at",
    ]
)  # fmt: skip
def _layer_kernel(  # type: ignore[no-untyped-def]
    query_ptr, words_ptr, query_stride, words_stride, output_ptr, output_stride, seq_lens_ptr, batch_table_ptr,
    batch_table_stride, first_ptr, count_ptr, done_ptr, asks_ptr, answers_ptr, counts_ptr, pick_ptr,
    token_ptr, num_partials, visiting_ptr, rows_ptr, asked_ptr, answered_ptr, pointers_ptr, me, layer, capacity,
    num_ranks, sending, attending, answering, collecting, row_size, queries_at, rows_at, asked_at, answered_at,
    keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride, head_stride,
    tables_ptr, pieces_ptr, seen_ptr, starts_ptr, outs_ptr, lses_ptr, num_rows,
    WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, PARTIALS: tl.constexpr, QUERIES: tl.constexpr, ENDS: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
    WIDE: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All of a layer's attention; see the module for its four parts and why they cannot wait for each other for ever.

    Program numbers say which part: the first ``sending``, then ``attending``, ``answering`` and ``collecting``. How
    many items a part has in this step is in ``counts_ptr``; its programs take them in turn. An attending program is
    one KV head of one stretch of pieces (``starts_ptr``), which are laid out so that all have the same work (Stream-K,
    arXiv 2301.03598). A row below ``num_rows`` is the batch's own, one from there on a place.

    Args: those of ``Routes.attend``, as pointers and strides in elements; and of ``kernel_arguments``, for the KV.
    """
    epoch = tl.load(counts_ptr) + layer
    program, heads = tl.program_id(0), KV_HEADS * GROUP
    behind = program - sending - attending
    if program < sending:
        for ask in range(program, tl.load(counts_ptr + 1).to(tl.int32), sending):
            _send(
                ask, epoch, words_ptr, words_stride, asks_ptr, pointers_ptr, me, capacity, num_ranks, queries_at,
                asked_at, QUERIES, WORDS, BLOCK_WORDS,
            )  # fmt: skip
    elif behind < 0:
        number, kv_head = (program - sending) // KV_HEADS, (program - sending) % KV_HEADS
        for piece in range(tl.load(starts_ptr + number), tl.load(starts_ptr + number + 1)):
            row, begin = tl.load(pieces_ptr + piece * 3), tl.load(pieces_ptr + piece * 3 + 1).to(tl.int32)
            end, seen = tl.load(pieces_ptr + piece * 3 + 2).to(tl.int32), 0
            if row < num_rows:
                query, table = query_ptr + row * query_stride, batch_table_ptr + row * batch_table_stride
                end = tl.minimum(end, tl.load(seq_lens_ptr + row))
            else:
                place = row - num_rows
                await_flag(asked_ptr + place, epoch)
                query, table = visiting_ptr + place * (QUERIES * KV_HEADS * GROUP * HEAD), table_at(tables_ptr, place)
                seen, end = seen_at(seen_ptr, place, end, ENDS)
            acc, lse = attend_piece(
                query, table, begin, end, seen, kv_head,
                keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride,
                head_stride, QUERIES, KV_HEADS, GROUP, ROWS, BLOCK, HEAD, WIDE, TYPE, TILE, STAGES,
            )  # fmt: skip
            pieces = tl.load(count_ptr + row)
            if (row < num_rows) & (pieces == 1):
                _put_result(acc, output_ptr, output_stride, row, kv_head, GROUP, ROWS, HEAD, WIDE)
            else:
                put_piece(acc, lse, outs_ptr, lses_ptr, piece, kv_head, QUERIES, KV_HEADS, GROUP, ROWS, HEAD, WIDE)
                tl.debug_barrier()
                done = done_ptr + row * KV_HEADS + kv_head
                before = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu")
                if (row < num_rows) & (before == pieces - 1):
                    tl.store(done, 0)
                    _merge_row(
                        outs_ptr, lses_ptr, output_ptr, output_stride, row, tl.load(first_ptr + row), pieces, kv_head,
                        KV_HEADS, GROUP, ROWS, HEAD, WIDE,
                    )  # fmt: skip
    elif behind < answering:
        for item in range(behind, tl.load(counts_ptr + 2).to(tl.int32) * QUERIES * heads, answering):
            _answer(
                tl.load(answers_ptr + item // (QUERIES * heads)), item // heads % QUERIES, item % heads, epoch,
                outs_ptr, lses_ptr, first_ptr, count_ptr, done_ptr, pointers_ptr, me, capacity, num_ranks, num_rows,
                row_size, rows_at, answered_at, QUERIES, KV_HEADS, GROUP, HEAD, WIDE,
            )  # fmt: skip
    else:
        for item in range(behind - answering, tl.load(counts_ptr + 3).to(tl.int32) * heads, collecting):
            _collect(
                item // heads, item % heads, epoch, rows_ptr, answered_ptr, pick_ptr, token_ptr, output_ptr,
                output_stride, heads, row_size, num_partials, PARTIALS, HEAD, WIDE,
            )  # fmt: skip
