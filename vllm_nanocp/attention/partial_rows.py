# SPDX-License-Identifier: Apache-2.0
"""Partial results on GPUs: how one travels, and the two kernels that make and use them.

A row is one query's output, [num_heads, head_size], and behind it the natural log-sum-exps of its heads, all float32:
rounded to bfloat16 before the merge, partial outputs would make the error of the whole 1.3 times that of attention in
one piece. One row is one piece of memory, so that one exchange carries both.

The merge is that of split-KV attention (FlashAttention, FlashInfer's ``merge_states``), which both kernels do: over the
pieces that a GPU cuts a shard's KV into, and over the shards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


class RowLayout:
    """Where the parts of a row are.

    Args:
        num_heads: query heads of this worker.
        head_size: elements.
    """

    def __init__(self, num_heads: int, head_size: int) -> None:
        self.num_heads, self.head_size = num_heads, head_size
        # Rows begin at multiples of 16 bytes.
        self.size = -(-num_heads * (head_size + 1) // 4) * 4

    def query_bytes(self, dtype: torch.dtype) -> int:
        """Of one query of these heads."""
        return self.num_heads * self.head_size * dtype.itemsize

    def empty(self, rows: int, device: torch.device) -> torch.Tensor:
        """[rows, size], float32, uninitialised."""
        return torch.empty((rows, self.size), dtype=torch.float32, device=device)

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """The outputs of rows: a view [rows, num_heads, head_size]."""
        return rows[:, : self.num_heads * self.head_size].unflatten(1, (self.num_heads, self.head_size))

    def lses(self, rows: torch.Tensor) -> torch.Tensor:
        """The log-sum-exps of rows: a view [rows, num_heads]."""
        first = self.num_heads * self.head_size
        return rows[:, first : first + self.num_heads]


def _tile(rows: int) -> int:
    """Rows a program works on: few rows are spread over the GPU, many are read in larger pieces."""
    return 1 if rows <= 512 else 16


@triton.jit
def add_piece(o, lse, most, total, acc):  # type: ignore[no-untyped-def]
    """Take one more piece into a running softmax. A piece without keys (-inf, or FlashAttention's +inf) weighs 0,
    whatever its output holds."""
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    new = tl.maximum(most, lse)
    safe = tl.where(new == float("-inf"), 0.0, new)
    old_weight, weight = tl.exp(most - safe), tl.exp(lse - safe)
    o = tl.where(weight[:, None] > 0, o, 0.0)
    return new, total * old_weight + weight, acc * old_weight[:, None] + o * weight[:, None]


# Pieces that are read at once: one after another, each would wait for memory.
_TOGETHER = tl.constexpr(64)


@triton.jit
def merge_pieces(outs_ptr, lses_ptr, first, stride, pieces, HEAD: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row and head from its pieces, the first at ``first`` (in results), the next ones ``stride`` further: the
    output, [WIDE], and its log-sum-exp."""
    d = tl.arange(0, WIDE)
    most = float("-inf")
    total = 0.0
    acc = tl.full([WIDE], 0.0, tl.float32)
    for start in range(0, pieces, _TOGETHER):
        piece = start + tl.arange(0, _TOGETHER)
        at = first + piece.to(tl.int64) * stride
        lse = tl.load(lses_ptr + at, mask=piece < pieces, other=float("-inf"))
        lse = tl.where(lse == float("inf"), float("-inf"), lse)
        inside = (piece < pieces)[:, None] & (d < HEAD)[None, :]
        o = tl.load(outs_ptr + at[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
        new = tl.maximum(most, tl.max(lse, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        old_weight, weight = tl.exp(most - safe), tl.exp(lse - safe)
        o = tl.where(weight[:, None] > 0, o, 0.0)
        total = total * old_weight + tl.sum(weight, 0)
        acc = acc * old_weight + tl.sum(o * weight[:, None], 0)
        most = new
    return acc / tl.where(total > 0, total, 1.0), most + tl.log(total)


@triton.jit(do_not_specialize=["num_rows", "max_pieces"])
def _pack_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, outs_ptr, lses_ptr, pieces_ptr, launch_row_ptr, num_rows, num_heads, row_size, max_pieces,
    HEAD: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Merge one head of ``TILE`` rows from the pieces that FlashAttention has left of them, into rows.

    Args: those of ``pack_rows``; ``SAME`` says that each row is a launch's row by itself.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    there = row < num_rows
    at = row.to(tl.int64)
    launch_row = at if SAME else tl.load(launch_row_ptr + at, mask=there, other=0)
    pieces = tl.load(pieces_ptr + launch_row, mask=there, other=0)
    d = tl.arange(0, WIDE)
    inside = there[:, None] & (d < HEAD)[None, :]
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    acc = tl.full([TILE, WIDE], 0.0, tl.float32)
    bound = max_pieces
    if TILE == 1:  # most of the pieces that few rows may have are often unused
        first = tl.program_id(0)
        bound = tl.load(pieces_ptr + (first if SAME else tl.load(launch_row_ptr + first)))
    for piece in range(bound):
        place = (piece * num_heads + head).to(tl.int64) * num_rows + at
        used = there & (piece < pieces)
        lse = tl.load(lses_ptr + place, mask=used, other=float("-inf"))
        o = tl.load(outs_ptr + place[:, None] * HEAD + d[None, :], mask=inside & used[:, None], other=0.0)
        most, total, acc = add_piece(o, lse, most, total, acc)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    base = rows_ptr + at * row_size
    tl.store(base[:, None] + head * HEAD + d[None, :], acc, mask=inside)
    tl.store(base + num_heads * HEAD + head, most + tl.log(total), mask=there)


def pack_pieces(
    rows: torch.Tensor,
    layout: RowLayout,
    outputs: torch.Tensor,
    lses: torch.Tensor,
    pieces: torch.Tensor,
    launch_row: torch.Tensor | None = None,
) -> None:
    """Merge the pieces of each query's attention and write the result as a row.

    Args:
        rows: [num_rows, layout.size], to write to.
        layout: of rows.
        outputs: contiguous [most pieces, num_heads, num_rows, head_size], float32.
        lses: contiguous [most pieces, num_heads, num_rows], float32, natural; infinite where a piece has no keys.
        pieces: int32, how many pieces each row of the launch was cut into.
        launch_row: int64 [num_rows], which row of the launch a query belongs to; None: one query each.
    """
    num_rows = len(rows)
    if not num_rows:
        return
    tile = _tile(num_rows)
    _pack_kernel[(triton.cdiv(num_rows, tile), layout.num_heads)](
        rows, outputs, lses, pieces, pieces if launch_row is None else launch_row,
        num_rows, layout.num_heads, layout.size, len(outputs),
        HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size), TILE=tile, SAME=launch_row is None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_results", "num_partials"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, pick_ptr, token_ptr, output_ptr, num_results, num_partials, num_heads, row_size, output_stride,
    HEAD: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Merge one head of ``TILE`` results from the rows that each is made of, and write it to the output.

    Args: those of ``merge_rows``.
    """
    result = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    there = result < num_results
    token = tl.load(token_ptr + result, mask=there, other=-1)
    d = tl.arange(0, WIDE)
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    acc = tl.full([TILE, WIDE], 0.0, tl.float32)
    for i in range(num_partials):
        row = tl.load(pick_ptr + result * num_partials + i, mask=token >= 0, other=-1)
        used = row >= 0
        base = rows_ptr + row * row_size
        lse = tl.load(base + num_heads * HEAD + head, mask=used, other=float("-inf"))
        inside = used[:, None] & (d < HEAD)[None, :]
        o = tl.load(base[:, None] + head * HEAD + d[None, :], mask=inside, other=0.0)
        most, total, acc = add_piece(o, lse, most, total, acc)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = output_ptr + token[:, None] * output_stride + head * HEAD + d[None, :]
    tl.store(to, acc.to(output_ptr.dtype.element_ty), mask=(token >= 0)[:, None] & (d < HEAD)[None, :])


def merge_rows(
    rows: torch.Tensor, layout: RowLayout, pick: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor
) -> None:
    """Attention over several disjoint sets of keys from attention over each, written to where it belongs.

    Args:
        rows: [num_rows, layout.size], the partial results.
        layout: of rows.
        pick: int64 [num_results, num_partials], which rows make a result; -1 for none.
        tokens: int64 [num_results], where in ``output`` a result goes; -1 for nowhere.
        output: [num_tokens, num_heads, head_size], a token's numbers contiguous.
    """
    num_results, num_partials = pick.shape
    if not num_results:
        return
    assert output.stride()[1:] == (layout.head_size, 1)
    tile = _tile(num_results)
    _merge_kernel[(triton.cdiv(num_results, tile), layout.num_heads)](
        rows, pick, tokens, output, num_results, num_partials, layout.num_heads, layout.size, output.stride(0),
        HEAD=layout.head_size, WIDE=triton.next_power_of_2(layout.head_size), TILE=tile,
    )  # fmt: skip


def warm_up(layout: RowLayout, dtype: torch.dtype, device: torch.device) -> None:
    """Compile every variant of the kernels now, not in front of the first long request.

    Args:
        layout: of rows.
        dtype: of attention's output.
        device: a GPU.
    """
    many = 1024
    rows = layout.empty(many, device)
    outputs = torch.zeros((2, layout.num_heads, many, layout.head_size), dtype=torch.float32, device=device)
    lses = torch.zeros((2, layout.num_heads, many), dtype=torch.float32, device=device)
    pieces = torch.full((many,), 2, dtype=torch.int32, device=device)
    index = torch.zeros(many, dtype=torch.int64, device=device)
    output = torch.empty((many, layout.num_heads, layout.head_size), dtype=dtype, device=device)
    for n in (1, many):
        for launch_row in (None, index[:n]):
            pack_pieces(
                rows[:n], layout, outputs[:, :, :n].contiguous(), lses[:, :, :n].contiguous(), pieces, launch_row
            )
        merge_rows(rows, layout, index[:n, None], index[:n], output)
