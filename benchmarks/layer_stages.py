#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Where the time of one attention layer goes in a sharded decode step: each stage alone, and all of it, in CUDA graphs.

    timeout 120 python benchmarks/layer_stages.py [--ranks 2] [--cases 1x4x150000,4x4x40000,16x16x10000] [--out FILE]

One process a GPU. A case is ROWSxCAPACITYxSHARD: every rank has ``--shorts`` short requests and ROWS sharded ones, with
SHARD tokens of each on every rank, and graphs of that capacity; heads as Qwen3-30B-A3B has them.
``stock`` is vLLM's attention over the shorts alone, ``stock long``
with one more request of all the tokens of a sharded one. Microseconds a layer, the slowest rank's; prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LAYERS = 4  # with caches of their own, so that none finds its KV in the GPU's cache
REPEATS = 5


def graph_us(run: Callable[[int], Any]) -> float:
    """Microseconds of ``run(layer)``, from a graph of many, on the slowest rank."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for layer in range(LAYERS):
            run(layer)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAYERS * REPEATS):
            run(i % LAYERS)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    mean = torch.tensor(start.elapsed_time(end) * 1e3 / (10 * LAYERS * REPEATS), device="cuda")
    dist.all_reduce(mean, dist.ReduceOp.MAX)
    return round(mean.item(), 2)


def decode_batch(table: torch.Tensor, lengths: torch.Tensor, rows: int, device: torch.device, queries: int = 1) -> Any:
    """vLLM's metadata of a batch of decodes.

    Args:
        table: int32 [padded rows, most blocks], on the host.
        lengths: int32 [padded rows], on the host.
        rows: how many there are.
        device: where it goes.
        queries: of a row, one and drafts.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    padded = len(table)
    starts = torch.arange(padded + 1, dtype=torch.int32).clamp(max=rows) * queries
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        num_reqs=padded,
        num_actual_tokens=padded * queries,
        max_query_len=queries,
        max_seq_len=int(lengths.max()),
        block_table_tensor=table.to(device),
        slot_mapping=torch.zeros(padded * queries, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=lengths,
    )


class Layer:
    """The backend without an engine, as the tests build it, and a batch for it."""

    def __init__(self, args: argparse.Namespace, rank: int, rows: int, capacity: int, shard: int) -> None:
        from tests.unit import flash_steps
        from tests.unit.attention_steps import Shape

        self.args, self.rank, self.device = args, rank, torch.device("cuda", rank)
        self.rows, self.capacity = rows, capacity
        self.shape = Shape(32, 4, 128, torch.bfloat16, 16)
        self.steps = flash_steps
        self.impl = flash_steps.make_impl(self.shape)
        self.layer = flash_steps.make_layer(self.device)
        self.short, self.held = args.short // 16, shard // 16
        self.long = self.held * args.ranks  # blocks of one sharded request on all ranks
        blocks = args.shorts * self.short + rows * self.long + 64
        size = (LAYERS, blocks, 4, 16, 256)
        self.caches = 0.1 * torch.randn(size, dtype=torch.bfloat16, device=self.device)

    def batch(self, long_rows: int, long_blocks: int) -> Any:
        """Metadata of the shorts and of long rows, padded to a power of two, as vLLM's runner makes it."""
        args, rows = self.args, self.args.shorts + long_rows
        padded = 1 << (rows - 1).bit_length()
        table = torch.zeros((padded, max(self.short, self.long) + 1), dtype=torch.int32)
        lengths = torch.zeros(padded, dtype=torch.int32)
        for row in range(args.shorts):
            table[row, : self.short] = torch.arange(row * self.short, (row + 1) * self.short)
            lengths[row] = self.short * 16
        for row in range(args.shorts, rows):
            first = args.shorts * self.short + (row - args.shorts) * long_blocks
            table[row, :long_blocks] = torch.arange(first, first + long_blocks)
            lengths[row] = long_blocks * 16
        return decode_batch(table, lengths, rows, self.device)

    def builder(self) -> Any:
        made = self.steps.make_builder(self.shape, self.device, max_reqs=256)
        made.cache_config.num_gpu_blocks = self.caches.shape[1]
        return made

    def sharded_step(self) -> Any:
        """Each own row visits every other rank; each other rank's rows visit this one."""
        from vllm_nanocp.attention.sharded_step import Guest, OwnRow, ShardedStep

        args, me = self.args, self.rank
        others = [r for r in range(args.ranks) if r != me]
        counts = [0 if r == me else self.rows for r in range(args.ranks)]
        first = self.args.shorts * self.short
        step = ShardedStep(me, send_counts=counts, recv_counts=list(counts), capacity=self.capacity)
        for i in range(self.rows):
            row = args.shorts + i
            step.own.append(OwnRow(lambda r=row: r, 1, 0, self.held * 16 - 1, [(r, i) for r in others]))  # type: ignore[misc]
        for j, home in enumerate(others, 1):
            for i in range(self.rows):
                # Each its own blocks: bytes read twice would stay in the GPU's cache.
                at = first + (j * self.rows + i) * self.held
                held = torch.arange(at, at + self.held, dtype=torch.int32, device=self.device)
                step.guests.append(Guest(home, i, 1, f"{home}.{i}", held, self.held * 16))
        return step


def measure(args: argparse.Namespace, rank: int, case: str) -> dict[str, float]:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from vllm_nanocp.attention.context import context
    from vllm_nanocp.attention.gqa.split_kv import attend, pack
    from vllm_nanocp.attention.partial_rows import RowLayout, merge_rows
    from vllm_nanocp.exchange import CollectiveExchange

    it = Layer(args, rank, *map(int, case.split("x")))
    impl, layer = it.impl, it.layer
    context.exchange = exchange = CollectiveExchange(dist.group.WORLD)
    stock, stock_long = it.builder().build(0, it.batch(0, 0)), it.builder().build(0, it.batch(1, it.long))
    step = context.step = it.sharded_step()  # kept: tables have the addresses of its block ids
    batch = it.batch(it.rows, it.held)
    sharded = it.builder().build(0, batch)
    context.step = None
    query = torch.randn((batch.num_reqs, 32, 128), dtype=torch.bfloat16, device=it.device)
    key = torch.randn((batch.num_reqs, 4, 128), dtype=torch.bfloat16, device=it.device)
    output = torch.empty_like(query)

    def forward(metadata: Any, cls: type = FlashAttentionImpl) -> Callable[[int], Any]:
        return lambda i: cls.forward(impl, layer, query, key, key, it.caches[i], metadata, output)

    rows, layout = sharded.sharded, RowLayout(32, 128)
    come = exchange.dispatch(query.index_select(0, rows.send[: rows.exchanged]), None, None)()
    visiting = torch.cat([come, query.index_select(0, rows.send[rows.exchanged :])])
    answers = layout.empty(len(visiting), it.device)

    def attend_all(i: int) -> None:
        attend(visiting, impl.kv(layer, query, it.caches[i]), rows.visits, query.dtype)

    stages: dict[str, Callable[[int], Any]] = {
        "stock": forward(stock),
        "stock long": forward(stock_long),
        "sharded": forward(sharded, type(impl)),
        "plain rows": forward(sharded),
        "gather": lambda i: query.index_select(0, rows.send),
        "dispatch": lambda i: exchange.dispatch(come, None, None)(),
        "attend": attend_all,
        "pack": lambda i: pack(answers, layout, rows.visits),
        "combine": lambda i: exchange.combine(answers[: rows.exchanged], None, None, rows.partials[: rows.exchanged]),
        "merge": lambda i: merge_rows(rows.partials, layout, rows.pick, rows.tokens, output),
    }
    found = {name: graph_us(run) for name, run in stages.items()}
    found["pieces"] = int(rows.visits.count.max())
    if args.routed:
        found |= measure_routed(it, batch, forward)
    del step
    return found


def measure_routed(it: Layer, batch: Any, forward: Callable[..., Any]) -> dict[str, float]:
    """The same step over the routed exchange. Only ``routed`` as a whole waits for what is on its way."""
    from vllm_nanocp.attention.context import context
    from vllm_nanocp.attention.gqa.routed_layer import MAX_LAYERS

    routes = it.steps.make_routes(it.shape, it.args.ranks, it.rank, it.capacity, None)
    step = it.sharded_step()
    context.step, context.routes = step, {it.capacity: routes}
    sharded = it.builder().build(0, batch)
    context.step, context.routes = None, {}
    _, route = sharded.sharded.routed
    whole = forward(sharded, type(it.impl))

    def routed(i: int) -> None:
        if i == 0:  # a new step, so that flags of the last one do not count; costs a kernel in every four layers
            route.counts[0].add_(MAX_LAYERS)
        it.impl.__dict__["_number"] = i
        whole(i)

    found = {"routed": graph_us(routed)}
    del step
    return found


def worker(rank: int, args: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=args.ranks, device_id=torch.device("cuda", rank))
    found = {case: measure(args, rank, case) for case in args.cases.split(",")}
    if rank == 0:
        import vllm

        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "vllm": vllm.__version__}
        result = json.dumps({"command": sys.argv, **about, "settings": vars(args), "us_per_layer": found}, indent=1)
        print(result, flush=True)
        if args.out:
            Path(args.out).write_text(result + "\n")
    os._exit(0)  # groups that are alive can keep a process from ending


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = dict(ranks=2, shorts=8, short=1024, port=29541)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cases", default="1x4x150000,4x4x40000,16x16x10000")
    parser.add_argument("--routed", action="store_true", help="also the routed exchange")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    context = mp.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, args)) for rank in range(args.ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
