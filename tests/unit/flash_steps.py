# SPDX-License-Identifier: Apache-2.0
"""The FlashAttention backend under ``attention_steps``: on GPUs with the real kernels, on CPU with references for
FlashAttention and with Triton's interpreter, so that all its tables and merges run on any machine."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, Triton's own as well

import triton
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn

from tests.unit.attention_steps import Kernel, Shape
from tests.unit.processes import gpu_of
from vllm_nanocp.attention import gpu_rows
from vllm_nanocp.attention.flash_launches import ShardLaunch
from vllm_nanocp.attention.gqa import flash_backend, flash_splits, flash_tables, gpu_layer
from vllm_nanocp.attention.gqa import split_kv as decode_pieces
from vllm_nanocp.attention.gqa.flash_backend import NanoCPFlashAttentionImpl, NanoCPFlashAttentionMetadataBuilder
from vllm_nanocp.attention.gqa.routed_layer import Routes
from vllm_nanocp.attention.gqa.split_kv import KV, Visits
from vllm_nanocp.attention.partial_rows import RowLayout
from vllm_nanocp.attention.stream_k import cut

MAX_REQS = 64
if not torch.cuda.is_available():
    decode_pieces.TYPES[torch.bfloat16] = triton.language.float32  # the interpreter multiplies bfloat16 wrongly


def make_builder(shape: Shape, device: torch.device, max_reqs: int = MAX_REQS) -> NanoCPFlashAttentionMetadataBuilder:
    """A metadata builder without the engine's configuration."""
    cuda = device.type == "cuda"
    values: dict[str, Any] = {
        "block_size": shape.block_size,
        "num_heads_q": shape.num_heads,
        "num_heads_kv": shape.num_kv_heads,
        "headdim": shape.head_size,
        "kv_cache_dtype": shape.dtype,
        "model_config": SimpleNamespace(dtype=shape.dtype),
        "cache_config": SimpleNamespace(num_gpu_blocks=80, cache_dtype="auto"),
        "vllm_config": SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=max_reqs)),
        "device": device,
        "aot_schedule": cuda,
        "aot_sliding_window": (-1, -1),
        "use_full_cuda_graph": cuda,
        "max_cudagraph_size": max_reqs,
        "max_num_splits": 32 if cuda else 0,
        "scheduler_metadata": torch.zeros(1 + 16 * max_reqs, dtype=torch.int32, device=device),
        "dcp_world_size": 1,
        "rswa_window": None,
        "mm_prefix_query_ranges_np": None,
    }
    builder = object.__new__(NanoCPFlashAttentionMetadataBuilder)
    builder.__dict__.update(values)
    return builder


def make_impl(shape: Shape) -> NanoCPFlashAttentionImpl:
    """An attention implementation without the engine's configuration."""
    values: dict[str, Any] = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "num_queries_per_kv": shape.num_heads // shape.num_kv_heads,
        "head_size": shape.head_size,
        "scale": shape.scale,
        "alibi_slopes": None,
        "sliding_window": (-1, -1),
        "logits_soft_cap": 0,
        "kv_cache_dtype": "auto",
        "attn_type": AttentionType.DECODER,
        "sinks": None,
        "fa4_hd256": False,
        "vllm_flash_attn_version": 3,
        "supports_quant_query_input": False,
        "dcp_world_size": 1,
    }
    impl = object.__new__(NanoCPFlashAttentionImpl)
    impl.__dict__.update(values)
    return impl


def make_layer(device: torch.device) -> Any:
    one = torch.ones(1, device=device)
    return SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one, is_draft_layer=False)


def write(impl: Any, layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    """vLLM's operation on GPUs; the same on CPU, where it does not exist."""
    if cache.is_cuda:
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
        return
    size = cache.shape[2]
    block, at = slots // size, slots % size
    cache[block, :, at] = torch.cat([keys, values], dim=-1)


def reference_schedule(launch: ShardLaunch, **_: Any) -> None:
    """Each row is cut into 2 to 4 pieces."""
    rows = torch.arange(len(launch.lengths), dtype=torch.int32)
    launch.pieces = 2 + (rows + launch.lengths) % 3


def reference_pieces(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, launch: ShardLaunch, scale: float, descale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention leaves unwritten is NaN, and so is the output of a piece without keys."""
    num_queries, num_heads, head_size = query.shape
    outputs = torch.full((4, num_heads, num_queries, head_size), float("nan"))
    lses = torch.full((4, num_heads, num_queries), float("nan"))
    group = num_heads // keys.shape[2]
    starts = launch.query_starts.tolist()
    assert launch.pieces is not None
    for row, (length, pieces) in enumerate(zip(launch.lengths.tolist(), launch.pieces.tolist(), strict=True)):
        part = slice(starts[row], starts[row + 1])
        blocks = launch.block_table[row, : -(-length // keys.shape[1])].long()
        k, v = (x[blocks].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[part].double(), k) * scale
        if launch.causal:
            last = length - (part.stop - part.start) + torch.arange(part.stop - part.start)
            scores.masked_fill_(torch.arange(length)[None, :] > last[:, None], float("-inf"))
        for piece in range(pieces):
            cut = slice(length * piece // pieces, length * (piece + 1) // pieces)
            lse = scores[:, :, cut].logsumexp(-1)
            # FlashAttention writes either, by the kind of launch.
            lses[piece, :, part] = lse.masked_fill(lse == float("-inf"), (-1) ** row * float("inf")).float()
            weights = scores[:, :, cut].softmax(-1)
            outputs[piece, :, part] = torch.einsum("hqk,khd->hqd", weights, v[cut]).float()
    return outputs, lses


def reference_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """``flash_attn_varlen_func`` over paged KV, for plain rows. What it writes for no keys is NaN."""
    rows = range(len(seqused_k))
    launch = ShardLaunch(
        len(q), cu_seqlens_q, seqused_k, block_table, 0, 0, causal, 4, pieces=torch.ones_like(seqused_k)
    )
    outputs, _ = reference_pieces(q, k, v, launch, softmax_scale, None)
    starts = cu_seqlens_q.tolist()
    for row in rows:
        part = slice(starts[row], starts[row + 1])
        out[part] = outputs[0, :, part].transpose(0, 1).to(out.dtype)
    return out


def reference_pack(
    rows: torch.Tensor, layout: RowLayout, outputs: torch.Tensor, lses: torch.Tensor, pieces: torch.Tensor, row: Any
) -> None:
    """Triton's interpreter is too slow for whole steps: ``test_flash.py`` holds the kernels against this formula."""
    used = torch.arange(len(outputs))[:, None] < pieces[torch.arange(len(rows)) if row is None else row]
    lse = lses.double().masked_fill(~used[:, None, :] | lses.isinf(), float("-inf"))
    weights = lse.softmax(0).nan_to_num(0).unsqueeze(-1)
    merged = torch.where(weights > 0, weights * outputs.double(), 0.0).sum(0)
    layout.outputs(rows).copy_(merged.transpose(0, 1))
    layout.lses(rows).copy_(lse.logsumexp(0).transpose(0, 1))


def reference_merge(
    rows: torch.Tensor, layout: RowLayout, pick: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor
) -> None:
    for chosen, token in zip(pick.tolist(), tokens.tolist(), strict=True):
        if token >= 0:
            picked = rows[[row for row in chosen if row >= 0]]
            weights = layout.lses(picked).double().softmax(0).unsqueeze(-1)
            output[token] = (weights * layout.outputs(picked).double()).sum(0).to(output.dtype)


def read_table(address: float, count: int) -> torch.Tensor:
    """Block ids at an address of this process."""
    return torch.tensor((ctypes.c_int32 * count).from_address(int(address)))


def lay_out(visits: Visits, lengths: Sequence[int]) -> int:
    """Cut rows of these lengths, those of the batch and the places, for tables that are on any device.

    Returns:
        How many pieces there are.
    """
    pieces, count, starts = map(torch.from_numpy, cut(lengths, len(visits.starts) - 1))
    visits.pieces[: len(pieces)] = pieces
    visits.count[:], visits.starts[:], visits.first[:] = count, starts, count.cumsum(0) - count
    return len(pieces)


def reference_attend(query: torch.Tensor, kv: KV, visits: Visits, _: torch.dtype) -> None:
    """Results of pieces that are not in use are NaN."""
    visits.outputs.fill_(float("nan"))
    visits.lses.fill_(float("nan"))
    group, queries = query.shape[1] // kv.keys.shape[2], visits.queries
    for piece, (row, begin, end) in enumerate(visits.pieces[: visits.starts[-1]].tolist()):
        place = row - visits.num_rows
        seen = int(visits.seen[place]) if visits.ends else 0
        end = min(end, seen) if seen else end
        blocks = read_table(visits.tables[place].item(), -(-end // kv.keys.shape[1]))
        keys, values = (x[blocks].flatten(0, 1)[begin:end].double() for x in (kv.keys, kv.values))
        k, v = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->qhk", query[place * queries :][:queries].double(), k) * kv.scale
        if seen:
            last = seen - queries + torch.arange(queries)
            scores.masked_fill_((torch.arange(begin, max(begin, end)) > last[:, None])[:, None], float("-inf"))
        visits.lses[piece] = scores.logsumexp(-1).float()
        visits.outputs[piece] = torch.einsum("qhk,khd->qhd", scores.softmax(-1).nan_to_num(0), v).float()


def reference_pack_visits(rows: torch.Tensor, layout: RowLayout, visits: Visits) -> None:
    """Likewise: ``test_decode_pieces.py`` has the kernel."""
    layout.outputs(rows).zero_()
    layout.lses(rows).fill_(float("-inf"))
    queries = visits.queries
    for place in range(len(rows) // queries):
        first, count = (int(x[visits.num_rows + place]) for x in (visits.first, visits.count))
        if count:
            lse, mine = visits.lses[first : first + count].double(), slice(place * queries, (place + 1) * queries)
            outputs = visits.outputs[first : first + count].double()
            layout.outputs(rows)[mine] = (lse.softmax(0).unsqueeze(-1) * outputs).sum(0).float()
            layout.lses(rows)[mine] = lse.logsumexp(0).float()


def use_references() -> None:
    """In this process, which has no GPU."""
    flash_attn.flash_attn_varlen_func = reference_flash  # type: ignore[attr-defined]
    flash_splits.make_schedule = reference_schedule  # type: ignore[assignment]
    flash_splits.attend_pieces = reference_pieces
    gpu_layer.attend_visits = reference_attend
    gpu_layer.pack = reference_pack_visits
    flash_backend.pack_pieces = reference_pack  # type: ignore[assignment]
    gpu_rows.merge_rows = reference_merge


def make_routes(shape: Shape, num_ranks: int, rank: int, capacity: int, shared: str | None, queries: int = 1) -> Routes:
    """Over memory that all ranks write to: of the GPUs, or files in a folder that all processes map."""
    layout = RowLayout(shape.num_heads, shape.head_size)
    query_bytes = layout.query_bytes(shape.dtype)
    size = Routes.size(capacity, num_ranks, layout, query_bytes, queries)
    if shared is None:
        import torch.distributed as dist

        from vllm_nanocp.exchange.symmetric import allocate

        assert dist.group.WORLD is not None
        buffer, pointers = allocate(size, dist.group.WORLD, gpu_of(rank))
    else:
        names = [f"{shared}/{shape.num_heads}x{shape.head_size}.{r}" for r in range(num_ranks)]
        buffers = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        _mapped.extend(buffers)
        buffer, pointers = buffers[rank], torch.tensor([b.data_ptr() for b in buffers])
    return Routes(capacity, num_ranks, rank, layout, query_bytes, buffer, pointers, queries)


_mapped: list[torch.Tensor] = []


def flash_kernel(
    device: str = "cpu",
    capacity: int = 0,
    pad: int = 16,
    routed: bool = False,
    shared: str | None = None,
    queries: int = 1,
) -> Kernel:
    """The backend on a device; on CPU with references in place of kernels.

    Args:
        device: ``cpu`` or ``cuda``.
        capacity: of fixed tables; 0: tables of a step's size.
        pad: rows that batches are padded to, if the tables are fixed.
        routed: with the routed exchange.
        shared: an empty folder for its memory, on CPU.
        queries: that requests are decoded with.
    """
    where = torch.device(device)
    flash_tables.queries_at_once = lambda *_: 7  # type: ignore[assignment]  # so that chunks take several launches
    if where.type == "cpu":
        use_references()
    # One builder for all scenarios of a shape: what one step leaves in its tables must not show in the next.
    builder = functools.cache(lambda shape: make_builder(shape, where))
    return Kernel(
        builder,
        make_impl,
        lambda _: make_layer(where),
        write,
        where,
        lambda impl, *args: impl.forward(*args),
        capacity,
        pad if capacity else 0,
        routes=functools.cache(lambda *args: make_routes(*args, capacity, shared, queries)) if routed else None,
        queries=queries,
    )
