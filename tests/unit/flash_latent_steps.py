# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper under ``attention_steps``: on GPUs with the real kernels; on CPU with a reference in
FlashAttention's place, under vLLM's own code as well, so that all around the kernels runs on any machine."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import vllm
from vllm.v1.attention.backends import fa_utils

from tests.unit import flash_steps  # sets up Triton's interpreter where there is no GPU
from tests.unit.attention_steps import LAYERS, Kernel, run_scenarios
from tests.unit.latent_steps import (
    LatentShape,
    bare_layer,
    builder_values,
    forward,
    one_request,
    write,
)
from tests.unit.processes import gpu_of

CUDA = torch.cuda.is_available()


def _signatures() -> list[inspect.Signature]:
    """Of the real functions, which all calls must fit; from their file, since their package wants the kernels."""
    path = os.path.join(os.path.dirname(vllm.__file__), "vllm_flash_attn", "flash_attn_interface.py")
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [inspect.signature(f) for f in (module.flash_attn_varlen_func, module.get_scheduler_metadata)]


_ATTEND, _SCHEDULE = _signatures()


def reference_schedule(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Holds what the launch must be called with."""
    call = _SCHEDULE.bind(*args, **kwargs).arguments
    assert call["cache_seqlens"].dtype == call["cu_seqlens_q"].dtype == torch.int32
    assert len(call["cache_seqlens"]) == call["batch_size"] == len(call["cu_seqlens_q"]) - 1
    return torch.tensor([call["batch_size"], call["max_seqlen_q"], call["num_splits"], call["causal"]])


def reference_flash(*args: Any, **kwargs: Any) -> Any:
    """FlashAttention 3: 16-bit outputs, natural log-sum-exps [num_heads, queries]. What it says of a query without keys
    is never to be used: NaN, and infinity of either sign or any number."""
    bound = _ATTEND.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    assert call["fa_version"] == 3 and call["window_size"] is None and call["alibi_slopes"] is None
    q, k, v, q_v, table = (call[name] for name in ("q", "k", "v", "q_v", "block_table"))
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dtype == k.dtype == v.dtype
    assert q_v is None or (q_v.is_contiguous() and q.shape[2] <= 64 and v.shape[-1] <= 512)
    starts, causal = call["cu_seqlens_q"].tolist(), call["causal"]
    counts = [end - start for start, end in itertools.pairwise(starts)]
    assert call["max_seqlen_q"] >= max(counts) and starts[-1] <= len(q)
    if (schedule := call["scheduler_metadata"]) is not None:
        made_for = [len(counts), call["max_seqlen_q"], call["num_splits"], int(causal)]
        assert schedule.tolist() == made_for, "scheduled for another launch"
    if table is None:
        ends = call["cu_seqlens_k"].tolist()
        seen = [(k[a:b], v[a:b]) for a, b in itertools.pairwise(ends)]
    else:
        seen = [_paged(k, v, *row) for row in zip(table, call["seqused_k"].tolist(), strict=True)]
    assert call["max_seqlen_k"] >= max(len(keys) for keys, _ in seen)
    heads = q.shape[1]
    out = torch.full((len(q), heads, v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = torch.full((heads, len(q)), float("nan"))
    for row, (keys, values) in enumerate(seen):
        part = slice(starts[row], starts[row + 1])
        if not len(keys) or not counts[row]:
            lse[:, part] = (float("-inf"), float("inf"), 7.0)[row % 3]
            continue
        keys, values = (x.expand(-1, heads, -1).float() for x in (keys, values))
        scores = torch.einsum("qhd,khd->qhk", q[part].float(), keys)
        if q_v is not None:
            scores += torch.einsum("qhd,khd->qhk", q_v[part].float(), values)
        scores *= call["softmax_scale"]
        if causal:
            assert len(keys) >= counts[row]
            hidden = torch.ones(counts[row], len(keys), dtype=torch.bool).triu(len(keys) - counts[row] + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        lse[:, part] = scores.logsumexp(-1).T
        out[part] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return (out, lse) if call["return_softmax_lse"] else out


def _paged(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    used = blocks[: -(-length // k.shape[1])].long()
    return k[used].flatten(0, 1)[:length], v[used].flatten(0, 1)[:length]


if not CUDA:  # before vLLM's modules take them by name
    fa_utils.flash_attn_varlen_func = reference_flash
    fa_utils.get_scheduler_metadata = reference_schedule
    fa_utils.compile_flash_attn_varlen_func_from_specs = None

from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLAImpl, FlashAttnMLAMetadata  # noqa: E402
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend  # noqa: E402

from vllm_nanocp.attention import gpu_rows  # noqa: E402
from vllm_nanocp.attention.mla import flash_mla, fp8_latents, latent_tables  # noqa: E402
from vllm_nanocp.attention.mla.flash_backend import (  # noqa: E402
    LatentOnHopper,
    NanoCPFlashAttnMLABackend,
    NanoCPFlashAttnMLAMetadataBuilder,
)
from vllm_nanocp.attention.mla.latent_sizes import LatentSizes  # noqa: E402
from vllm_nanocp.attention.partial_rows import RowLayout  # noqa: E402
from vllm_nanocp.attention.row_routes import RowRoutes  # noqa: E402
from vllm_nanocp.exchange.symmetric import allocate  # noqa: E402

MAX_REQS = 64


def sizes_of(shape: LatentShape) -> LatentSizes:
    unrotated = shape.head_size - shape.rotated
    return LatentSizes(shape.num_heads, unrotated, shape.rotated, shape.rank, shape.value_size)


def bare_family(shape: LatentShape) -> LatentOnHopper:
    """Without the engine's configuration."""
    family = object.__new__(LatentOnHopper)
    family.sizes, family.dtype = sizes_of(shape), shape.dtype
    return family


def make_prefill(shape: LatentShape) -> FlashAttnPrefillBackend:
    prefill = object.__new__(FlashAttnPrefillBackend)
    prefill.__dict__.update(
        scale=shape.scale,
        num_heads=shape.num_heads,
        flash_attn_varlen_func=functools.partial(fa_utils.flash_attn_varlen_func, fa_version=3),
        vllm_flash_attn_version=3,
        requires_v_padding=False,
        _is_vllm_fa=True,
    )
    return prefill


def make_builder(shape: LatentShape, device: torch.device, threshold: int) -> NanoCPFlashAttnMLAMetadataBuilder:
    """A metadata builder without the engine's configuration.

    Args:
        shape: of the layer.
        device: of all tensors.
        threshold: rows of so many queries are decodes to vLLM.
    """
    builder = object.__new__(NanoCPFlashAttnMLAMetadataBuilder)
    builder.__dict__.update(
        builder_values(shape, make_prefill(shape), device),
        metadata_cls=FlashAttnMLAMetadata,
        kv_cache_spec=SimpleNamespace(dtype=shape.dtype),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS)),
        reorder_batch_threshold=threshold,
        fa_aot_schedule=True,
        use_full_cuda_graph=True,
        max_cudagraph_size=MAX_REQS,
        scheduler_metadata=torch.zeros(1 + 16 * MAX_REQS, dtype=torch.int32, device=device),
        max_num_splits=32,
    )
    return builder


@functools.cache
def make_layer(shape: LatentShape, device: torch.device) -> Any:
    """vLLM's layer, taken over as a worker does it."""
    layer = bare_layer(shape, NanoCPFlashAttnMLABackend, FlashAttnMLAImpl, device)
    layer.prefill_backend = make_prefill(shape)
    bare_family(shape).attach({"l": layer})
    return layer


def stock_attention(
    shapes: set[LatentShape],
    make: tuple[Callable[..., Any], Callable[..., Any]],
    device: torch.device,
    decoded: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    scale: float,
) -> torch.Tensor:
    """vLLM's own: ``forward_mqa`` for a decode, ``forward_mha`` for a chunk of a prompt.

    Args:
        shapes: among which are the queries'.
        make: a builder and a layer, see ``make_builder`` and ``make_layer``.
        device: where they are.
        decoded: queries of a decode.
        Others: see ``Kernel.stock``.
    """
    sizes, (builder, layer) = (queries.shape[1], queries.shape[2] - 64), make
    shape = next(s for s in shapes if (s.num_heads, s.head_size - 64) == sizes and s.scale == scale)
    return one_request(shape, builder(shape, device, decoded), layer(shape, device), queries, keys, first)


BLOCKS = 40  # of a row's table in the scenarios


class GraphForward:
    """Runs a layer from a graph, captured when it is first called, with an empty step's tables. On CPU the same calls
    are made again instead, with what was there at capture."""

    def __init__(self) -> None:
        self.graphs: dict[Any, tuple[Callable[[], None], list[torch.Tensor]]] = {}

    def __call__(self, impl: Any, layer: Any, *args: Any) -> None:
        *inputs, metadata, output = args
        rows = getattr(metadata, "sharded", None)
        if rows is None:
            forward(impl, layer, *args)
            return
        # One builder, so the same tables, for each shape.
        key = rows.send.data_ptr(), tuple(inputs[0].shape), id(layer), layer.nanocp_number
        decode = rows.plain.decode
        batch = [getattr(decode, name) for name in ("block_table", "query_start_loc") if hasattr(decode, name)]
        if key not in self.graphs:
            static = [torch.zeros_like(x) for x in (*inputs, output, *batch)]
            self.graphs[key] = self._capture(layer, static, metadata), static
        replay, static = self.graphs[key]
        for buffer, value in zip(static, (*inputs, output, *batch), strict=True):
            buffer.copy_(value)
        replay()
        output.copy_(static[4])

    def _capture(self, layer: Any, static: list[torch.Tensor], metadata: Any) -> Callable[[], None]:
        """Nothing of the step at hand may be baked in: its tables are put away while the graph is captured. The
        engine's own batch buffers are persistent, the test's are not."""
        rows = metadata.sharded
        tables = [rows.tokens, rows.pick, rows.send]
        values: list[int] = [-1, -1, 0]
        for work in rows.fixed:
            tables += [work.launch.lengths, work.empty]
            values += [max(rows.kernel.fewest, work.launch.max_queries * work.launch.causal), True]
        held = [x.clone() for x in tables]
        if rows.routed is not None:  # nor may it wait for the step at hand
            tables.append(rows.routed.route.counts)
            held.append(tables[-1].clone())
            values.append(0)
        for x, value in zip(tables, values, strict=True):
            x.fill_(value)
        batch: dict[str, Any] = {"block_table": static[5]}
        if len(static) > 6:
            batch |= {"query_start_loc": static[6], "max_seq_len": BLOCKS * static[3].shape[1]}
        decode = dataclasses.replace(rows.plain.decode, **batch)
        fixed = dataclasses.replace(rows, plain=dataclasses.replace(rows.plain, decode=decode))
        captured = dataclasses.replace(metadata, sharded=fixed)
        run = functools.partial(forward, None, layer, *static[:4], captured, static[4])
        replay = _graph_of(run) if static[0].is_cuda else run
        for x, was in zip(tables, held, strict=True):
            x.copy_(was)
        return replay


def _graph_of(run: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernel_of(
    device: str = "cpu",
    capacity: int = 0,
    pad: int = 16,
    threshold: int = 1,
    few: int = 8,
    stock: bool = False,
    graph: bool = False,
    groups: int = 1,
    shared: str | None = None,
    routed: bool = False,
    queries: int = 1,
    make: tuple[Callable[..., Any], Callable[..., Any]] = (make_builder, make_layer),
) -> Kernel:
    """The backend on a device.

    Args:
        device: ``cpu`` or ``cuda``.
        capacity: of fixed tables; 0: tables of a step's size.
        pad: rows that batches are padded to, if the tables are fixed.
        threshold: rows of so many queries are decodes to vLLM.
        few: rows of so many queries are absorbed: the lengths of these tests are small.
        stock: next to vLLM's own attention.
        graph: replayed.
        groups: of heads that go together.
        shared: an empty folder for the routed exchange's memory, on CPU.
        routed: over the routed exchange.
        queries: that requests are decoded with.
        make: a builder and a layer, see ``make_builder`` and ``make_layer``.
    """
    where = torch.device(device)
    LatentSizes.absorbs = lambda _, rows: rows <= few  # type: ignore[method-assign, misc]
    latent_tables.queries_at_once = lambda *_: 7  # type: ignore[assignment]
    latent_tables.PROJECTED = 1  # a block at a time
    flash_mla.MOST_ROWS = fp8_latents.MOST_ROWS = 20  # two launches or three of places
    latent_tables.heads_together = lambda _, sizes, __: dataclasses.replace(  # type: ignore[assignment]
        sizes, num_heads=sizes.num_heads // groups
    )
    if where.type != "cuda":
        gpu_rows.merge_rows = flash_steps.reference_merge

    shapes: set[LatentShape] = set()

    # One builder for all scenarios of a shape: what one step leaves in its tables must not show in the next.
    @functools.cache
    def builder(shape: LatentShape) -> Any:
        shapes.add(shape)
        return make[0](shape, where, max(threshold, queries))

    return Kernel(
        builder,  # type: ignore[arg-type]
        lambda _: None,
        lambda shape: make[1](shape, where),  # type: ignore[arg-type]
        write,
        where,
        numbered(GraphForward() if graph else forward) if routed else GraphForward() if graph else forward,
        capacity,
        pad if capacity else 0,
        stock=functools.partial(stock_attention, shapes, make, where, queries) if stock else None,
        replays=graph and where.type == "cuda",
        groups=groups,
        routes=functools.cache(functools.partial(make_routes, capacity * queries, shared)) if routed else None,  # type: ignore[arg-type]
        queries=queries,
    )


_mapped: list[torch.Tensor] = []


def make_routes(capacity: int, shared: str | None, shape: LatentShape, num_ranks: int, rank: int) -> RowRoutes:
    """Over memory that all ranks write to: of the GPUs, or files in a folder that all processes map. It begins as it
    may have been left: only flags are zero."""
    layout, query_bytes = (
        RowLayout(shape.num_heads, shape.value_size),
        shape.num_heads * shape.head_size * shape.dtype.itemsize,
    )
    size = RowRoutes.size(capacity, num_ranks, layout, query_bytes)
    if shared is None:
        assert dist.group.WORLD is not None
        buffer, pointers = allocate(size, dist.group.WORLD, gpu_of(rank))
    else:
        kind = f"{shape.num_heads}x{shape.head_size}x{shape.value_size}.{capacity}"
        names = [f"{shared}/{kind}.{r}" for r in range(num_ranks)]
        buffers = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        _mapped.extend(buffers)
        buffer, pointers = buffers[rank], torch.tensor([b.data_ptr() for b in buffers])
    made = RowRoutes(capacity, num_ranks, rank, layout, query_bytes, buffer, pointers)
    dist.barrier()
    made.rows.fill_(float("nan"))
    made.visiting(torch.empty((1, shape.num_heads, shape.head_size), dtype=shape.dtype)).fill_(float("nan"))
    if buffer.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return made


def numbered(run: Callable[..., None]) -> Callable[..., None]:
    """``forward`` of layers that have numbers, as those of a model; the scenarios have one layer for all."""
    numbers = itertools.cycle(range(LAYERS))

    def forward_numbered(impl: Any, layer: Any, *args: Any) -> None:
        layer.nanocp_number = next(numbers)
        run(impl, layer, *args)

    return forward_numbered


def run_modes(
    rank: int, size: int, modes: dict[str, tuple[dict[str, Any], list[tuple[LatentShape, int, bool]]]]
) -> dict[str, tuple[dict[str, int], list[tuple[int, float]]]]:
    """``run_scenarios`` with several kernels: by name the arguments of ``kernel_of``, and (shape, seed, sharded)."""
    results = {}
    for name, (args, specs) in modes.items():
        kernel = functools.partial(kernel_of, **args)
        results |= run_scenarios(rank, size, {name: specs}, kernel)  # type: ignore[arg-type]
    return results
