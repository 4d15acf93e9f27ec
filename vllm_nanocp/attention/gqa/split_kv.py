# SPDX-License-Identifier: Apache-2.0
"""Attention of single queries over paged KV on GPUs: a result for each piece of a row's KV, in float32.

This is split-KV attention (Flash-Decoding). FlashAttention's cuts rows itself, always merges the pieces into 16 bits
(which is of no use for a shard, and rounds), and can be launched only after the last query has come. Here the host cuts
the rows (``cut``), and the routed exchange builds ``attend_piece`` into a kernel that waits query by query.
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
    """Rows of one query each and what they attend to: first those of a batch, then those at the places of visits.

    Attributes:
        num_rows: rows of a batch that there is room for. A place's row is ``num_rows + place``.
        tables: int64 [places], the address of the block ids, int32, that the query at a place attends to. A batch has
            its own table.
        pieces: int64 [most pieces, 3], of each its row, first token and the one behind its last.
        starts: int64 [programs + 1], where the pieces of each program begin.
        first, count: int64 [num_rows + places], which pieces a row has.
        outputs, lses: float32 [most pieces, num_heads, head_size] and [most pieces, num_heads]: the results, and
            their natural log-sum-exps. Those of pieces not in use are not written.
        done: int32 [num_rows + places, num_kv_heads], used within a layer; 0 before and after it.
    """

    num_rows: int
    tables: torch.Tensor
    pieces: torch.Tensor
    starts: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
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
    ) -> Visits:
        """Tables for so many rows and places, with nothing in them."""
        rows, programs = num_rows + places, programs_of(num_kv_heads, device)
        most = rows + programs
        return cls(
            num_rows,
            tables=torch.zeros(places, dtype=torch.int64, device=device),
            pieces=torch.zeros((most, 3), dtype=torch.int64, device=device),
            starts=torch.zeros(programs + 1, dtype=torch.int64, device=device),
            first=torch.zeros(rows, dtype=torch.int64, device=device),
            count=torch.zeros(rows, dtype=torch.int64, device=device),
            outputs=torch.empty((most, num_heads, head_size), dtype=torch.float32, device=device),
            lses=torch.empty((most, num_heads), dtype=torch.float32, device=device),
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
    return dict(
        keys_ptr=kv.keys, values_ptr=kv.values, q_scale_ptr=q_scale, k_scale_ptr=k_scale, v_scale_ptr=v_scale,
        scale=kv.scale, block_stride=kv.keys.stride(0), token_stride=kv.keys.stride(1), head_stride=kv.keys.stride(2),
        tables_ptr=visits.tables, pieces_ptr=visits.pieces,
        starts_ptr=visits.starts, outs_ptr=visits.outputs, lses_ptr=visits.lses, num_rows=visits.num_rows,
        KV_HEADS=kv_heads, GROUP=num_heads // kv_heads, ROWS=max(16, triton.next_power_of_2(num_heads // kv_heads)),
        BLOCK=kv.keys.shape[1], HEAD=head_size, WIDE=wide, TYPE=TYPES[dtype], TILE=TILE_ELEMENTS // max(wide, 128),
        STAGES=STAGES,
    )  # fmt: skip


@triton.jit
def attend_piece(  # type: ignore[no-untyped-def]
    query, table, begin, end, kv_head,
    keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride, head_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
    TYPE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head over tokens ``begin`` to ``end`` - 1: outputs, [ROWS, WIDE], and natural
    log-sum-exps, [ROWS], of which GROUP count."""
    row, d, t = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    heads = (kv_head * GROUP + row)[:, None] * HEAD + d[None, :]
    q = tl.load(query + heads, mask=(row < GROUP)[:, None] & (d < HEAD)[None, :], other=0.0).to(TYPE)
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
        scores = tl.where(there[None, :], tl.dot(q, k.to(TYPE)) * scale, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        old_weight, weights = tl.exp2(most - new), tl.exp2(scores - new[:, None])
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
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keep what ``attend_piece`` returned."""
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    first = (piece * KV_HEADS + kv_head) * GROUP + row
    tl.store(outs_ptr + first[:, None] * HEAD + d[None, :], acc, mask=(row < GROUP)[:, None] & (d < HEAD)[None, :])
    tl.store(lses_ptr + first, lse, mask=row < GROUP)


@triton.jit
def table_at(tables_ptr, place):  # type: ignore[no-untyped-def]
    """Where the block ids of a place are."""
    return tl.load(tables_ptr + place).to(tl.pointer_type(tl.int32))


@triton.jit(do_not_specialize=["num_rows"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale, block_stride, token_stride, head_stride,
    tables_ptr, pieces_ptr, starts_ptr, outs_ptr, lses_ptr, num_rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
    WIDE: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    for piece in range(tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1)):
        place = tl.load(pieces_ptr + piece * 3) - num_rows
        begin, end = tl.load(pieces_ptr + piece * 3 + 1).to(tl.int32), tl.load(pieces_ptr + piece * 3 + 2).to(tl.int32)
        acc, lse = attend_piece(
            query_ptr + place * (KV_HEADS * GROUP * HEAD), table_at(tables_ptr, place), begin, end, kv_head,
            keys_ptr, values_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale,
            block_stride, token_stride, head_stride, GROUP, ROWS, BLOCK, HEAD, WIDE, TYPE, TILE, STAGES,
        )  # fmt: skip
        put_piece(acc, lse, outs_ptr, lses_ptr, piece, kv_head, KV_HEADS, GROUP, ROWS, HEAD, WIDE)


def attend(query: torch.Tensor, kv: KV, visits: Visits, dtype: torch.dtype) -> None:
    """Fill in the results of all pieces, none of which is of a row of the batch.

    Args:
        query: contiguous [places, num_heads, head_size].
        kv, visits, dtype: see ``kernel_arguments``.
    """
    arguments = kernel_arguments(kv, visits, query.shape[1], dtype)
    _attend_kernel[((len(visits.starts) - 1) * kv.keys.shape[2],)](query, **arguments)


@triton.jit
def put_row(  # type: ignore[no-untyped-def]
    row, head, num_heads, outs_ptr, lses_ptr, first, pieces, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one head into a row, where ``RowLayout`` has that head."""
    acc, lse = merge_pieces(outs_ptr, lses_ptr, first * num_heads + head, num_heads, pieces, HEAD, WIDE)
    d = tl.arange(0, WIDE)
    tl.store(row + head * HEAD + d, acc, mask=d < HEAD)
    tl.store(row + num_heads * HEAD + head, lse)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "row_size"])
def _pack_row_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, outs_ptr, lses_ptr, first_ptr, count_ptr, num_rows, num_heads, row_size,
    HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    pieces, first = tl.load(count_ptr + num_rows + place), tl.load(first_ptr + num_rows + place)
    row = rows_ptr + place.to(tl.int64) * row_size
    put_row(row, head, num_heads, outs_ptr, lses_ptr, first, pieces, HEAD, WIDE)


def pack(rows: torch.Tensor, layout: RowLayout, visits: Visits) -> None:
    """Merge the pieces of each place into its row.

    Args:
        rows: [places, layout.size], to write to; a place without pieces gets the row of no keys.
        layout: of rows.
        visits: with the results of all pieces.
    """
    _pack_row_kernel[(len(rows) * layout.num_heads,)](
        rows, visits.outputs, visits.lses, visits.first, visits.count, visits.num_rows, layout.num_heads, layout.size,
        HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size),
    )  # fmt: skip
