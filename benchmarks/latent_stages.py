#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Where the time of one layer of latent attention goes in a sharded decode step, over both exchanges, in CUDA graphs.

    timeout 300 python benchmarks/latent_stages.py [--ranks 2] [--queries 4] [--heads 16,128] [--cases 1x16x131072,...]
        [--out FILE]

One process a GPU; with ``--ranks 1`` the rank visits itself, so nothing crosses a link. A case is ROWSxCAPACITYxSHARD:
every rank has ``--shorts`` short requests and ROWS sharded ones, with SHARD tokens of each on every rank, and tables of
that capacity. Microseconds a layer, the slowest rank's; prints JSON:

- ``stock``: vLLM's layer over the shorts alone; ``plain rows``: the same beside rows that visit;
- ``vendor``: the vendor's kernel over all places; ``places``: with the products of matrices before and behind it;
- ``collective``, ``routed``: the whole layer; ``send`` to ``collect``: kernels of the routed exchange, without waiting;
- ``beyond ...``: the whole layer without ``plain rows`` and ``places``.
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

from benchmarks.layer_stages import LAYERS, decode_batch, graph_us

BLOCK = 64


class Rank:
    """The backend without an engine, as the tests build it, and a batch for it."""

    def __init__(self, args: argparse.Namespace, rank: int, heads: int, rows: int, capacity: int, shard: int) -> None:
        from tests.unit import flash_latent_steps
        from tests.unit.latent_steps import latent_shape

        self.args, self.rank, self.device = args, rank, torch.device("cuda", rank)
        self.rows, self.capacity, self.steps = rows, capacity, flash_latent_steps
        self.shape = latent_shape(heads, 128, 128, dtype=torch.bfloat16, block_size=BLOCK)
        self.layer = flash_latent_steps.make_layer(self.shape, self.device)
        self.short, self.held = args.short // BLOCK, shard // BLOCK
        # A rank holds its own rows' shards, and those of the rows that visit it.
        self.blocks = args.shorts * self.short + rows * max(2, args.ranks) * self.held
        self.caches = [
            torch.randn(self.shape.cache_size(self.blocks), dtype=torch.bfloat16, device=self.device)
            for _ in range(LAYERS)
        ]

    def batch(self, long_rows: int) -> Any:
        """Metadata of the shorts and of long rows, padded to a power of two, as vLLM's runner makes it."""
        args, rows = self.args, self.args.shorts + long_rows
        padded = 1 << (rows - 1).bit_length()
        table = torch.zeros((padded, max(self.short, self.held) + 1), dtype=torch.int32)
        lengths = torch.zeros(padded, dtype=torch.int32)
        for row in range(rows):
            long = row >= args.shorts
            first = args.shorts * self.short + (row - args.shorts) * self.held if long else row * self.short
            count = self.held if long else self.short
            table[row, :count], lengths[row] = torch.arange(first, first + count), count * BLOCK
        return decode_batch(table, lengths, rows, self.device, args.queries)

    def builder(self) -> Any:
        made = self.steps.make_builder(self.shape, self.device, self.args.queries)
        # A row of block ids for each place, as an engine for long requests has it.
        made.model_config.max_model_len = max(1 << 20, 2 * self.held * BLOCK)
        return made

    def sharded_step(self) -> Any:
        """Each own row visits every other rank, or this one where there is no other."""
        from vllm_nanocp.attention.sharded_step import Guest, OwnRow, ShardedStep

        args, me, queries = self.args, self.rank, self.args.queries
        others = [r for r in range(args.ranks) if r != me] or [me]
        counts = [self.rows * queries if r in others else 0 for r in range(args.ranks)]
        step = ShardedStep(me, send_counts=counts, recv_counts=list(counts), capacity=self.capacity, serial=1)
        for i in range(self.rows):
            row = args.shorts + i
            held, visits = self.held * BLOCK - queries, [(r, i * queries) for r in others]
            step.own.append(OwnRow(lambda r=row: r, queries, 0, held, visits))  # type: ignore[misc]
        for j, home in enumerate(others, 1):
            for i in range(self.rows):
                # Each its own blocks: bytes read twice would stay in the GPU's cache.
                at = args.shorts * self.short + (j * self.rows + i) * self.held
                blocks = torch.arange(at, at + self.held, dtype=torch.int32, device=self.device)
                step.guests.append(Guest(home, i * queries, queries, f"{home}.{i}", blocks, self.held * BLOCK))
        return step

    def metadata(self, batch: Any, routes: Any = None) -> tuple[Any, Any]:
        """Of a sharded step; and that step, which is kept: tables have the addresses of its block ids."""
        from vllm_nanocp.attention.context import context

        context.step, context.routes = self.sharded_step(), {} if routes is None else {self.capacity: routes}
        try:
            return self.builder().build(0, batch), context.step
        finally:
            context.step, context.routes = None, {}


def measure(args: argparse.Namespace, rank: int, heads: int, case: str) -> dict[str, float]:
    from tests.unit.latent_steps import forward
    from vllm_nanocp.attention.context import context
    from vllm_nanocp.attention.mla.flash_latent import _absorb, absorbed_results
    from vllm_nanocp.attention.mla.latent_kernel import Latents
    from vllm_nanocp.attention.row_routes import MAX_LAYERS
    from vllm_nanocp.exchange import CollectiveExchange

    it = Rank(args, rank, heads, *map(int, case.split("x")))
    context.queries = args.queries
    context.exchange = CollectiveExchange(dist.group.WORLD)
    shape, layer, batch = it.shape, it.layer, it.batch(it.rows)
    stock = it.builder().build(0, it.batch(0))
    collective, _first = it.metadata(batch)
    routes = it.steps.make_routes(it.capacity * args.queries, None, shape, args.ranks, rank)
    routed, _second = it.metadata(batch, routes)
    tokens = batch.num_actual_tokens
    query = torch.randn((tokens, heads, 192), dtype=torch.bfloat16, device=it.device)
    keys = torch.randn((tokens, 1, 576), dtype=torch.bfloat16, device=it.device)
    output = torch.empty((tokens, heads, 128), dtype=torch.bfloat16, device=it.device)
    fixed, counts = routed.sharded.fixed, routes.route.counts

    def held(i: int) -> Latents:
        sizes = routed.sharded.sizes
        return Latents(it.caches[i], layer.W_UK_T, layer.W_UV, layer.scale, sizes, routed.sharded.kernel)

    def run(metadata: Any) -> Callable[[int], Any]:
        return lambda i: forward(None, layer, query, keys, keys, it.caches[i], metadata, output)

    def whole(i: int) -> None:
        if i == 0:  # a new step, so that flags of the last one do not count; costs a kernel in every four layers
            counts[0].add_(MAX_LAYERS)
        layer.nanocp_number = i
        run(routed)(i)

    visiting = torch.randn((routes.places, heads, 192), dtype=torch.bfloat16, device=it.device)

    def places(i: int) -> Any:
        return [absorbed_results(visiting[work.part], held(i), work.launch) for work in fixed]

    parts = [_absorb(visiting[work.part], held(0)) for work in fixed]
    results = places(0)

    def vendor(i: int) -> None:
        for work, part in zip(fixed, parts, strict=True):
            routed.sharded.kernel.attend(*part, held(i), work.launch)

    def answer(i: int) -> None:
        for work, (outputs, lses) in zip(fixed, results, strict=True):
            routes.answer(outputs, lses, work.empty, work.part.start, 0)

    found = {
        "stock": graph_us(run(stock)),
        "plain rows": graph_us(run(routed.sharded.plain)),
        "vendor": graph_us(vendor),
        "places": graph_us(places),
        "collective": graph_us(run(collective)),
        "routed": graph_us(whole),
    }
    # All flags are up by now, for an epoch that the layers' numbers do not exceed.
    torch.cuda.synchronize()
    dist.barrier()
    alone: dict[str, Callable[[int], Any]] = {
        "send": lambda i: routes.send(query, 0),
        "arrive": lambda i: routes.arrive(0),
        "answer": answer,
        "collect": lambda i: routes.collect(output, 0),
    }
    for name, stage in alone.items():
        found[name] = graph_us(stage)
    for name in ("collective", "routed"):
        found[f"beyond {name}"] = round(found[name] - found["plain rows"] - found["places"], 2)
    return found


def worker(rank: int, args: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=args.ranks, device_id=torch.device("cuda", rank))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for heads in map(int, args.heads.split(",")):
        found[str(heads)] = {case: measure(args, rank, heads, case) for case in args.cases.split(",")}
        torch.cuda.empty_cache()
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
    for name, value in dict(ranks=2, shorts=8, short=1024, queries=1, port=29542).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--heads", default="16,64,128")
    parser.add_argument("--cases", default="1x16x131072,4x16x32768,16x16x8192")
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
