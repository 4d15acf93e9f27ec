# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries a row over paged KV on GPUs: a result for each piece of a row's KV, in float32.

This is split-KV attention (Flash-Decoding). FlashAttention's cuts rows itself, always merges the pieces into 16 bits
(which is of no use for a shard, and rounds), and can be launched only after the last query has come. Here the host cuts
the rows (``cut``), and the routed exchange builds ``attend_piece`` into a kernel that waits query by query. Where
requests are decoded with drafts a row has 1 + k queries, which read its KV once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..partial_rows import RowLayout, merge_pieces

# Programs for each streaming multiprocessor (SM) of a GPU: each waits for memory most of the time.
PROGRAMS = 2
_SMS = 8  # without a GPU
# Elements of a tile of keys, and how many tiles are on their way.
TILE_ELEMENTS, STAGES = 16384, 3
# What products are computed in, by the type of attention's output.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Visits:
    """Rows of as many queries each and what they attend to: first those of a batch, then those at the places of visits.

    Attributes:
        queries: of a row. Rows of a batch have pieces only where it is 1.
        num_rows: rows of a batch that there is room for. A place's row is ``num_rows + place``.
        tables: int64 [places], the address of the block ids, int32, that the query at a place attends to. A batch has
            its own table.
        pieces: int64 [most pieces, 3], of each its row, first token and the one behind its last.
        starts: int64 [programs + 1], where the pieces of each program begin.
        first, count: int64 [num_rows + places], which pieces a row has.
        ends: whether ``seen`` counts; always with several queries.
        seen: int32 [places]: tokens that the last query sees and each before it one less, if there are pieces for more,
            too; 0 where each sees all, as in a shard that was complete before they were made.
        outputs, lses: float32 [most pieces, queries, num_heads, head_size] and [most pieces, queries, num_heads]: the
            results, and their natural log-sum-exps. Those of pieces not in use are not written.
        done: int32 [num_rows + places, num_kv_heads], used within a layer; 0 before and after it.
    """

    queries: int
    num_rows: int
    ends: bool
    tables: torch.Tensor
    pieces: torch.Tensor
    starts: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    seen: torch.Tensor
    outputs: torch.Tensor
    lses: torch.Tensor
    done: torch.Tensor

    @classmethod
    def empty(
        cls,
        num_rows: int,
        places: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device,
        queries: int = 1,
        ends: bool = False,
    ) -> Visits:
        """Tables for so many rows and places, with nothing in them."""
        rows, programs = num_rows + places, programs_of(num_kv_heads, device)
        most = rows + programs
        return cls(
            queries,
            num_rows,
            ends or queries > 1,
            tables=torch.zeros(places, dtype=torch.int64, device=device),
            pieces=torch.zeros((most, 3), dtype=torch.int64, device=device),
            starts=torch.zeros(programs + 1, dtype=torch.int64, device=device),
            first=torch.zeros(rows, dtype=torch.int64, device=device),
            count=torch.zeros(rows, dtype=torch.int64, device=device),
            seen=torch.zeros(places, dtype=torch.int32, device=device),
            outputs=torch.empty((most, queries, num_heads, head_size), dtype=torch.float32, device=device),
            lses=torch.empty((most, queries, num_heads), dtype=torch.float32, device=device),
            done=torch.zeros((rows, num_kv_heads), dtype=torch.int32, device=device),
        )


@dataclass
class KV:
    """What is attended to.

    Attributes:
        keys, values: [num_blocks, block_size, num_kv_heads, head_size], of the same strides, the last one 1.
        scale: of the scores.
        scales: factors of float8 queries, keys and values, float32 [1]; None: none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    scales: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)


def programs_of(num_kv_heads: int, device: torch.device) -> int:
    """How many programs for each KV head keep a device busy."""
    cuda = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else _SMS
    return max(1, PROGRAMS * sms // num_kv_heads)


def kernel_arguments(kv: KV, visits: Visits, num_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels of this attention take, by name.

    Args:
        kv: attended to.
        visits: the rows.
        num_heads: of a query.
        dtype: of attention's output: bfloat16 or float16.
    """
    kv_heads, head_size = kv.keys.shape[2:]
    wide = triton.next_power_of_2(head_size)
    q_scale, k_scale, v_scale = kv.scales
    group = num_heads // kv_heads
    return dict(
        keys_ptr=kv.keys, values_ptr=kv.values, q_scale_ptr=q_scale, k_scale_ptr=k_scale, v_scale_ptr=v_scale,
        scale=kv.scale, block_stride=kv.keys.stride(0), token_stride=kv.keys.stride(1), head_stride=kv.keys.stride(2),
        tables_ptr=visits.tables, pieces_ptr=visits.pieces, seen_ptr=visits.seen,
        starts_ptr=visits.starts, outs_ptr=visits.outputs, lses_ptr=visits.lses, num_rows=visits.num_rows,
        QUERIES=visits.queries, ENDS=visits.ends, KV_HEADS=kv_heads, GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group * visits.queries)),
        BLOCK=kv.keys.shape[1], HEAD=head_size, WIDE=wide, TYPE=TYPES[dtype], TILE=TILE_ELEMENTS // max(wide, 128),
        STAGES=STAGES,
    )  # fmt: skip


@triton.jit
def seen_at(seen_ptr, place, end, ENDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a piece at a place that ends so: what the last query sees (see ``Visits``), and where the piece ends."""
    seen = 0
    if ENDS:
        seen = tl.load(seen_ptr + place)
        end = tl.where(seen > 0, tl.minimum(end, seen), end)
    return seen, end


@triton.jit
def attend_piece(  # type: ignore[no-untyped-def]
    query, table, begin, end, seen, kv_head,
    keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride, head_stride,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HEAD: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head over tokens ``begin`` to ``end`` - 1: outputs, [ROWS, WIDE], and natural
    log-sum-exps, [ROWS]; the first QUERIES * GROUP of them count, query by query. ``seen``: see ``Visits``."""
    row, d, t = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    heads = (row // GROUP * KV_HEADS * GROUP + kv_head * GROUP + row % GROUP)[:, None] * HEAD + d[None, :]
    q = tl.load(query + heads, mask=(row < QUERIES * GROUP)[:, None] & (d < HEAD)[None, :], other=0.0).to(TYPE)
    if QUERIES > 1:
        last = tl.where(seen > 0, seen - tl.maximum(QUERIES - 1 - row // GROUP, 0), end)
    scale = scale * 1.4426950408889634  # powers of 2 cost less
    if q_scale_ptr is not None:
        scale = scale * tl.load(q_scale_ptr)
    if k_scale_ptr is not None:
        scale = scale * tl.load(k_scale_ptr)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, WIDE], 0.0, tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + t
        there = at < end
        block = tl.load(table + at // BLOCK, mask=there, other=0).to(tl.int64)
        base = block * block_stride + (at % BLOCK) * token_stride + kv_head * head_stride
        k = tl.load(keys_ptr + base[None, :] + d[:, None], mask=there[None, :] & (d < HEAD)[:, None], other=0.0)
        scores = tl.dot(q, k.to(TYPE)) * scale
        if QUERIES > 1:  # the first ones may see nothing of a piece
            scores = tl.where(there[None, :] & (at[None, :] < last[:, None]), scores, float("-inf"))
            new = tl.maximum(most, tl.max(scores, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
        else:
            scores = tl.where(there[None, :], scores, float("-inf"))
            new = tl.maximum(most, tl.max(scores, 1))
            safe = new
        old_weight, weights = tl.exp2(most - safe), tl.exp2(scores - safe[:, None])
        total = total * old_weight + tl.sum(weights, 1)
        v = tl.load(values_ptr + base[:, None] + d[None, :], mask=there[:, None] & (d < HEAD)[None, :], other=0.0)
        acc = acc * old_weight[:, None] + tl.dot(weights.to(TYPE), v.to(TYPE))
        most = new
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if v_scale_ptr is not None:
        acc = acc * tl.load(v_scale_ptr)
    return acc, (most + tl.log2(total)) * 0.6931471805599453


@triton.jit
def put_piece(  # type: ignore[no-untyped-def]
    acc, lse, outs_ptr, lses_ptr, piece, kv_head,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Keep what ``attend_piece`` returned."""
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    mine = row < QUERIES * GROUP
    first = ((piece * QUERIES + row // GROUP) * KV_HEADS + kv_head) * GROUP + row % GROUP
    tl.store(outs_ptr + first[:, None] * HEAD + d[None, :], acc, mask=mine[:, None] & (d < HEAD)[None, :])
    tl.store(lses_ptr + first, lse, mask=mine)


@triton.jit
def table_at(tables_ptr, place):  # type: ignore[no-untyped-def]
    """Where the block ids of a place are."""
    return tl.load(tables_ptr + place).to(tl.pointer_type(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride, head_stride,
    tables_ptr, pieces_ptr, seen_ptr, starts_ptr, outs_ptr, lses_ptr, num_rows,
    QUERIES: tl.constexpr, ENDS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    for piece in range(tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1)):
        place = tl.load(pieces_ptr + piece * 3) - num_rows
        begin, end = tl.load(pieces_ptr + piece * 3 + 1).to(tl.int32), tl.load(pieces_ptr + piece * 3 + 2).to(tl.int32)
        seen, end = seen_at(seen_ptr, place, end, ENDS)
        acc, lse = attend_piece(
            query_ptr + place * (QUERIES * KV_HEADS * GROUP * HEAD), table_at(tables_ptr, place), begin, end, seen,
            kv_head, keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride,
            head_stride, QUERIES, KV_HEADS, GROUP, ROWS, BLOCK, HEAD, WIDE, TYPE, TILE, STAGES,
        )  # fmt: skip
        put_piece(acc, lse, outs_ptr, lses_ptr, piece, kv_head, QUERIES, KV_HEADS, GROUP, ROWS, HEAD, WIDE)


def attend(query: torch.Tensor, kv: KV, visits: Visits, dtype: torch.dtype) -> None:
    """Fill in the results of all pieces, none of which is of a row of the batch.

    Args:
        query: contiguous [places * queries, num_heads, head_size], those of a place one after another.
        kv, visits, dtype: see ``kernel_arguments``.
    """
    arguments = kernel_arguments(kv, visits, query.shape[1], dtype)
    _attend_kernel[((len(visits.starts) - 1) * kv.keys.shape[2],)](query, **arguments)


@triton.jit
def put_row(  # type: ignore[no-untyped-def]
    row, query, head, num_heads, outs_ptr, lses_ptr, first, pieces,
    QUERIES: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one query and head into a row, where ``RowLayout`` has that head."""
    at = (first * QUERIES + query) * num_heads + head
    acc, lse = merge_pieces(outs_ptr, lses_ptr, at, QUERIES * num_heads, pieces, HEAD, WIDE)
    d = tl.arange(0, WIDE)
    tl.store(row + head * HEAD + d, acc, mask=d < HEAD)
    tl.store(row + num_heads * HEAD + head, lse)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "row_size"])
def _pack_row_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, outs_ptr, lses_ptr, first_ptr, count_ptr, num_rows, num_heads, row_size,
    QUERIES: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    place, query = number // QUERIES, number % QUERIES
    pieces, first = tl.load(count_ptr + num_rows + place), tl.load(first_ptr + num_rows + place)
    row = rows_ptr + number.to(tl.int64) * row_size
    put_row(row, query, head, num_heads, outs_ptr, lses_ptr, first, pieces, QUERIES, HEAD, WIDE)


def pack(rows: torch.Tensor, layout: RowLayout, visits: Visits) -> None:
    """Merge the pieces of each place into its rows.

    Args:
        rows: [places * queries, layout.size], to write to; a place without pieces gets rows of no keys.
        layout: of rows.
        visits: with the results of all pieces.
    """
    _pack_row_kernel[(len(rows) * layout.num_heads,)](
        rows, visits.outputs, visits.lses, visits.first, visits.count, visits.num_rows, layout.num_heads, layout.size,
        QUERIES=visits.queries, HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size),
    )  # fmt: skip
