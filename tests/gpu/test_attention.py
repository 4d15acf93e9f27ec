# SPDX-License-Identifier: Apache-2.0
"""The kernels and the exchange on two GPUs and on four: whole attention steps against float64, and against the error
that stock attention itself makes on the same input; with tables of a step's size, with fixed ones, and replayed from a
graph."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.unit.attention_steps import Kernel, Shape, run_scenarios
from tests.unit.flash_steps import flash_kernel, make_builder, make_impl, make_layer
from tests.unit.processes import gpu_of, run_ranks
from tests.unit.route_steps import stress

from . import FOUR_GPUS, TWO_GPUS

pytestmark = [
    pytest.mark.gpu,
    TWO_GPUS,
]

BF16 = torch.bfloat16
# Groups of 1 to 16 query heads a KV head; all head sizes that are served.
SHAPES = [
    Shape(4, 4, 64, BF16, 16),
    Shape(8, 4, 128, BF16, 16),
    Shape(32, 4, 128, BF16, 16),
    Shape(16, 1, 128, BF16, 16),
    Shape(8, 2, 256, BF16, 16),
    Shape(6, 2, 64, torch.float16, 32),
]
RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=FOUR_GPUS)])
RELATIVE = 1e-2
OF_STOCK = 1.2


def stock_flash(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float) -> Any:
    """vLLM's kernel on one GPU, nothing cut: queries are the last of the keys they see."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    q, k, v = (x.cuda() for x in (queries, keys, values))
    ends = [torch.tensor([0, len(x)], dtype=torch.int32, device="cuda") for x in (q, k)]
    out = flash_attn_varlen_func(
        q, k, v, len(q), ends[0], len(k), cu_seqlens_k=ends[1], softmax_scale=scale, causal=True, fa_version=3
    )
    return out.cpu()


class GraphForward:
    """Runs an implementation from a graph, captured when it is first called, with an empty step's tables."""

    def __init__(self) -> None:
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}

    def __call__(self, impl: Any, layer: Any, *args: Any) -> None:
        *inputs, metadata, output = args
        if getattr(metadata, "sharded", None) is None:
            impl.forward(layer, *args)
            return
        # One builder, so the same tables, for each shape.
        key = metadata.sharded.send.data_ptr(), tuple(inputs[0].shape), tuple(inputs[3].shape), id(impl)
        if key not in self.graphs:
            static = [torch.zeros_like(x) for x in (*inputs, output)]
            for name in ("query_start_loc", "seq_lens", "block_table"):
                static.append(torch.zeros_like(getattr(metadata, name)))
            self.graphs[key] = self._capture(impl, layer, static, metadata), static
        graph, static = self.graphs[key]
        batch = (metadata.query_start_loc, metadata.seq_lens, metadata.block_table)
        for buffer, value in zip(static, (*inputs, output, *batch), strict=True):
            buffer.copy_(value)
        graph.replay()
        output.copy_(static[4])

    def _capture(self, impl: Any, layer: Any, static: list[torch.Tensor], metadata: Any) -> torch.cuda.CUDAGraph:
        """Nothing of the step at hand may be baked in: its tables are put away while the graph is captured."""
        import dataclasses

        rows = metadata.sharded
        tables = [rows.visits.starts, rows.visits.count, rows.tokens]
        if rows.routed is not None:  # nor may the flags of the step at hand be set
            tables.append(rows.routed[1].counts)
        held = [x.clone() for x in tables]
        for x in tables:
            x.zero_()
        rows.tokens.fill_(-1)
        fixed = dict(zip(("query_start_loc", "seq_lens", "block_table"), static[5:], strict=True))
        # The engine's own batch buffers are persistent, the test's are not.
        captured = dataclasses.replace(metadata, **fixed, max_seq_len=40 * 32)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            impl.forward(layer, *static[:4], captured, static[4])
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            impl.forward(layer, *static[:4], captured, static[4])
        for x, was in zip(tables, held, strict=True):
            x.copy_(was)
        return graph


def cuda_kernel(capacity: int = 0, graph: bool = False, routed: bool = False) -> Kernel:
    import dataclasses

    kernel = flash_kernel("cuda", capacity, 0 if routed and not graph else 16, routed)
    # What is past a length is finite in a real cache too, and FlashAttention reads whole blocks.
    kernel = dataclasses.replace(kernel, fill=1000.0, stock=stock_flash)
    return dataclasses.replace(kernel, forward=GraphForward(), replays=True) if graph else kernel


MODES = {
    "exact": (0, False, False),
    "fixed": (8, False, False),
    "graph": (8, True, False),
    "routed": (8, False, True),
    "routed graph": (8, True, True),
}


@RANKS
@pytest.mark.parametrize("mode", MODES)
def test_error(mode: str, ranks: int) -> None:
    capacity, graph, routed = MODES[mode]
    groups = {
        f"{s.num_heads}x{s.num_kv_heads}x{s.head_size}": [(s, seed, seed % 9 != 8) for seed in range(500, 512)]
        for s in SHAPES
    }
    kernel = functools.partial(cuda_kernel, capacity, graph, routed)
    results = run_ranks(ranks, run_scenarios, groups, kernel, seconds=240, backend="nccl")
    for name in groups:
        totals = {key: sum(result[name][0].get(key, 0.0) for result in results) for key in ("norm", "ours", "stock")}
        ours, stock = (math.sqrt(totals[key] / totals["norm"]) for key in ("ours", "stock"))
        case = {"mode": mode, "ranks": ranks, "heads": name}
        print(json.dumps(case | {"relative_error": ours, "stock": stock, "ratio": ours / stock}))
        assert ours < RELATIVE, name
        assert ours <= OF_STOCK * stock, name
        sharded = sum(result[name][0].get("sharded decode", 0) for result in results)
        assert sharded >= 5, name


def test_merge_is_flashinfer_s() -> None:
    """The same result as the library's merge, to what that rounds: it takes and gives 16-bit outputs, base 2."""
    flashinfer = pytest.importorskip("flashinfer")
    from vllm_nanocp.attention.partial_rows import RowLayout, merge_rows

    layout = RowLayout(8, 128)
    torch.manual_seed(0)
    rows = layout.empty(40, torch.device("cuda"))
    layout.outputs(rows).copy_(torch.randn(40, 8, 128).half())
    layout.lses(rows).copy_(3 * torch.randn(40, 8))
    pick, tokens = torch.randint(0, 40, (30, 4), device="cuda"), torch.randperm(30, device="cuda")
    output = torch.empty(30, 8, 128, dtype=torch.float16, device="cuda")
    merge_rows(rows, layout, pick, tokens, output)
    lses = layout.lses(rows)[pick] * 1.4426950408889634
    theirs, _ = flashinfer.merge_states(layout.outputs(rows)[pick].half().contiguous(), lses.contiguous())
    torch.testing.assert_close(output[tokens], theirs, rtol=2e-3, atol=2e-3)


def fullest_step(rank: int, size: int, tokens: int) -> tuple[int, int]:
    """Every rank's chunk of so many tokens visits all ranks, its own too: bytes that a layer takes, and has."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_nanocp.attention.context import context
    from vllm_nanocp.attention.gqa.flash_tables import most_memory
    from vllm_nanocp.attention.partial_rows import RowLayout
    from vllm_nanocp.attention.sharded_step import Guest, OwnRow, ShardedStep
    from vllm_nanocp.exchange import CollectiveExchange

    shape, device = Shape(32, 4, 128, BF16, 16), gpu_of(rank)
    builder, impl, layer = make_builder(shape, device), make_impl(shape), make_layer(device)
    holders = range(size)
    cache = torch.zeros((tokens // 16, 4, 16, 256), dtype=BF16, device=device)
    query, output = (torch.zeros((tokens, 32, 128), dtype=BF16, device=device) for _ in "qo")
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=starts[1:].to(device),
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table_tensor=torch.arange(tokens // 16, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
    )
    counts = [tokens] * size
    step = ShardedStep(rank, send_counts=counts, recv_counts=list(counts))
    step.own = [OwnRow(lambda: 0, tokens, 0, 0, [(r, 0) for r in holders])]
    held = torch.arange(64, dtype=torch.int32, device=device)
    step.guests = [Guest(home, 0, tokens, str(home), held, 1024) for home in holders]
    context.exchange = CollectiveExchange(dist.group.WORLD)
    peak = 0
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        context.step = step
        metadata = builder.build(0, common)
        context.step = None
        impl.forward(layer, query, query, query, cache, metadata, output)
        torch.cuda.synchronize()
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
    return peak, most_memory(size, tokens, RowLayout(32, 128), 4, BF16)


@RANKS
def test_memory(ranks: int) -> None:
    """What the fullest step takes is what was reserved for it, and most of that."""
    for peak, reserved in run_ranks(ranks, fullest_step, 8192, seconds=100, backend="nccl"):
        print(f"{ranks} ranks: {peak / 2**20:.0f} MiB of {reserved / 2**20:.0f}")
        assert 0.6 * reserved < peak <= reserved


@RANKS
def test_random_routes(ranks: int) -> None:
    """The routed exchange, 10,000 steps over the same memory; a rank that is late in some of them."""
    # Under compute-sanitizer a few hundred take as long.
    steps = int(os.environ.get("NANOCP_ROUTE_STEPS", "10000"))
    compared = run_ranks(ranks, stress, steps, "cuda", None, 0.002, seconds=240, backend="nccl")
    assert sum(compared) > steps
