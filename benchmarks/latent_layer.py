#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A layer of latent attention over shards on a Hopper GPU: its error next to stock vLLM's, and the time of its stages.

    python benchmarks/latent_layer.py --out latent_layer.json
    python benchmarks/latent_layer.py --out dry.json --reference   # on any machine, small, without FlashAttention

Stock decodes by absorbing queries (``W_UK``), attending in the latents' space with FlashAttention 3 (FLASH_ATTN_MLA)
and projecting by ``W_UV``, in 16 bits between all three. Here each shard does the same for the queries that visit it,
but its projection keeps float32, and the rows are merged in float32. A prompt's chunk attends to projected latents, as
in stock, and what comes from each shard is 16 bits wide.

``error``: root mean square of what differs from float64, over stock's, for the same input. ``stages``: microseconds of
each in CUDA graphs, one after another, with what a holder reads. Exchange is not in it: rows stay on this GPU.
``fixed_places_us``: of the attention of a captured launch over all places, few of which are used, by most pieces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

RANK, ROTATED, NOPE, VALUES, BLOCK = 512, 64, 128, 128, 64
SCALE = (NOPE + ROTATED) ** -0.5
Partial = tuple[torch.Tensor, torch.Tensor]


def load_flash(path: str | None) -> None:
    """FlashAttention 3 as vLLM ships it: from a file, or from vLLM."""
    if path:
        torch.ops.load_library(path)
    else:
        import vllm.vllm_flash_attn  # noqa: F401


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_v: torch.Tensor | None, starts: torch.Tensor, max_q: int,
    max_k: int, causal: bool, lengths: torch.Tensor | None = None, table: torch.Tensor | None = None,
    starts_k: torch.Tensor | None = None, schedule: torch.Tensor | None = None, splits: int = 0,
) -> Partial:  # fmt: skip
    """Output as the queries and natural log-sum-exp [rows, num_heads]."""
    out, lse, *_ = torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, q_v, None, starts, starts_k, None, None, lengths, max_q, max_k, table,
        None, None, None, None, None, None, None, None, SCALE, causal, -1, -1, 0.0, True, schedule, splits, None, 0,
        None, 1, 0, None,
    )  # fmt: skip
    return out, lse.transpose(0, 1)


def reference_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_v: torch.Tensor | None, starts: torch.Tensor, max_q: int,
    max_k: int, causal: bool, lengths: torch.Tensor | None = None, table: torch.Tensor | None = None,
    starts_k: torch.Tensor | None = None, schedule: Any = None, splits: int = 0,
) -> Partial:  # fmt: skip
    """The same in float32."""
    outs, lses = [], []
    heads = q.shape[1]
    for row in range(len(starts) - 1):
        queries = slice(int(starts[row]), int(starts[row + 1]))
        if table is not None and lengths is not None:
            keys = k[table[row].long()].flatten(0, 1)[: int(lengths[row])]
            values = v[table[row].long()].flatten(0, 1)[: int(lengths[row])]
        else:
            assert starts_k is not None
            keys, values = (x[int(starts_k[row]) : int(starts_k[row + 1])] for x in (k, v))
        if keys.shape[1] == 1:
            keys, values = keys.expand(-1, heads, -1), values.expand(-1, heads, -1)
        scores = torch.einsum("qhd,khd->qhk", q[queries].float(), keys.float())
        if q_v is not None:
            scores += torch.einsum("qhd,khd->qhk", q_v[queries].float(), values.float())
        scores *= SCALE
        if causal:
            n = scores.shape[0]
            hidden = torch.ones(n, scores.shape[2], dtype=torch.bool).triu(scores.shape[2] - n + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), values.float()).to(q.dtype))
    return torch.cat(outs), torch.cat(lses)


class Layer:
    """Weights and a cache of one layer.

    Args:
        heads: query heads.
        rows: requests, each with so many tokens in blocks of its own.
        tokens: of each.
        device: of all tensors.
    """

    def __init__(self, heads: int, rows: int, tokens: int, device: str) -> None:
        self.heads, self.rows, self.tokens, self.device = heads, rows, tokens, device
        generator = torch.Generator(device).manual_seed(heads)

        def normal(*size: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=generator, device=device) * std).to(torch.bfloat16)

        self.w_uk = normal(heads, NOPE, RANK, std=RANK**-0.5)
        self.w_uv = normal(heads, RANK, VALUES, std=RANK**-0.5)
        blocks = -(-tokens // BLOCK)
        self.cache = normal(rows * blocks, BLOCK, RANK + ROTATED)
        order = torch.randperm(rows * blocks, generator=generator, device=device)
        self.table = order.to(torch.int32).view(rows, blocks)
        # Scores with a standard deviation of about 2: some keys count much more than others.
        self.query = normal(rows, heads, NOPE + ROTATED, std=2.0)

    def latents(self, row: int) -> torch.Tensor:
        """[tokens, rank + rotated], of a request."""
        return self.cache[self.table[row].long()].flatten(0, 1)[: self.tokens]

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((len(query), self.heads, RANK))
        torch.bmm(query[..., :NOPE].transpose(0, 1), self.w_uk, out=out.transpose(0, 1))
        return out

    def project(self, latent: torch.Tensor) -> torch.Tensor:
        """To float32: [rows, num_heads, value_size]."""
        if not latent.is_cuda:
            return torch.bmm(latent.transpose(0, 1).float(), self.w_uv.float()).transpose(0, 1)
        return torch.bmm(latent.transpose(0, 1), self.w_uv, out_dtype=torch.float32).transpose(0, 1)

    def project_stock(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.bmm(latent.transpose(0, 1), self.w_uv).transpose(0, 1)

    def keys(self) -> Partial:
        return self.cache[..., RANK:].unsqueeze(2), self.cache[..., :RANK].unsqueeze(2)

    def projected(self, latents: torch.Tensor, dtype: torch.dtype) -> Partial:
        """Keys and values of latents: [tokens, num_heads, ...]."""
        inner = latents[:, :RANK].to(dtype)
        keys = torch.einsum("tl,npl->tnp", inner, self.w_uk.to(dtype))
        rotated = latents[:, None, RANK:].to(dtype).expand(-1, self.heads, -1)
        return torch.cat([keys, rotated], -1), torch.einsum("tl,nlv->tnv", inner, self.w_uv.to(dtype))


def merged(parts: list[Partial]) -> torch.Tensor:
    """In float32, rounded at the end."""
    outs, lses = torch.stack([o.float() for o, _ in parts]), torch.stack([x for _, x in parts])
    weights = (lses - lses.amax(0)).exp()
    return ((outs * weights[..., None]).sum(0) / weights.sum(0)[..., None]).to(torch.bfloat16)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def exact(layer: Layer, row: int, query: torch.Tensor, first: int) -> torch.Tensor:
    """Float64: query i of a request sees tokens 0 to ``first`` + i."""
    outs = []
    keys, values = layer.projected(layer.latents(row), torch.float64)
    for head in range(layer.heads):
        scores = query[:, head].double() @ keys[:, head].T * SCALE
        hidden = (
            torch.arange(len(keys), device=keys.device) > first + torch.arange(len(query), device=keys.device)[:, None]
        )
        outs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[:, head])
    return torch.stack(outs, 1)


def decode_error(layer: Layer, attend: Callable[..., Partial]) -> dict[str, float]:
    """Of decodes, by degree, over stock's."""
    starts = torch.arange(layer.rows + 1, dtype=torch.int32, device=layer.device)
    expected = torch.cat([exact(layer, r, layer.query[r : r + 1], layer.tokens - 1) for r in range(layer.rows)])
    k, v = layer.keys()

    def over(table: torch.Tensor, length: int) -> Partial:
        lengths = torch.full((layer.rows,), length, dtype=torch.int32, device=layer.device)
        rotated = layer.query[..., NOPE:].contiguous()
        return attend(
            rotated, k, v, layer.absorb(layer.query), starts, 1, max(length, 1), False, lengths, table.contiguous()
        )

    stock = layer.project_stock(over(layer.table, layer.tokens)[0])
    base = rms(stock - expected)
    found = {"stock_relative": base / rms(expected)}
    blocks = layer.table.shape[1]
    for degree in (2, 3, 4):
        cuts = [blocks * i // degree for i in range(degree + 1)]
        parts = []
        for a, b in itertools.pairwise(cuts):
            latent, lse = over(layer.table[:, a:b], min(b * BLOCK, layer.tokens) - a * BLOCK)
            parts.append((layer.project(latent), lse))
        found[f"degree_{degree}"] = rms(merged(parts) - expected) / base
        rounded = [(o.to(torch.bfloat16), lse) for o, lse in parts]
        found[f"degree_{degree}_rows_of_16_bits"] = rms(merged(rounded) - expected) / base
    return found


def prefill_error(layer: Layer, queries: int, attend: Callable[..., Partial]) -> dict[str, float]:
    """Of a request's last tokens as a prompt's chunk, by degree, over stock's."""
    generator = torch.Generator(layer.device).manual_seed(1)
    query = (2 * torch.randn((queries, layer.heads, NOPE + ROTATED), generator=generator, device=layer.device)).to(
        torch.bfloat16
    )
    latents = layer.latents(0)
    past = layer.tokens - queries
    expected = exact(layer, 0, query, past)

    def over(part: torch.Tensor, causal: bool) -> Partial:
        keys, values = layer.projected(part, torch.bfloat16)
        ends = torch.tensor([0, queries], dtype=torch.int32, device=layer.device)
        ends_k = torch.tensor([0, len(part)], dtype=torch.int32, device=layer.device)
        return attend(query, keys, values.contiguous(), None, ends, queries, len(part), causal, starts_k=ends_k)

    stock = merged([over(latents[:past], False), over(latents[past:], True)])
    base = rms(stock - expected)
    found = {"stock_relative": base / rms(expected)}
    for degree in (2, 3, 4):
        cuts = [past * i // degree for i in range(degree + 1)]
        parts = [over(latents[a:b], False) for a, b in itertools.pairwise(cuts)]
        found[f"degree_{degree}"] = rms(merged([*parts, over(latents[past:], True)]) - expected) / base
    return found


def in_graph(run: Callable[[], Any], times: int = 20) -> float:
    """Microseconds of a call, replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = math.inf
    for _ in range(5):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / times)
    return best


def stages(layer: Layer) -> dict[str, float]:
    """Of a holder that serves all rows of the layer, and of a home that merges them with as many of its own."""
    from vllm_nanocp.attention.partial_rows import RowLayout, merge_rows

    rows, heads, device = layer.rows, layer.heads, layer.device
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    lengths = torch.full((rows,), layer.tokens, dtype=torch.int32, device=device)
    k, v = layer.keys()
    schedule = torch.ops._vllm_fa3_C.get_scheduler_metadata(
        rows, 1, layer.tokens, heads, 1, ROTATED, RANK, torch.bfloat16, lengths, starts, None, None, None, None,
        BLOCK, 0, True, -1, -1, False, 32, None, 0,
    )  # fmt: skip
    layout = RowLayout(heads, VALUES)
    packed = layout.empty(2 * rows, torch.device(device))
    packed.normal_()
    pick = torch.stack([torch.arange(rows, device=device), torch.arange(rows, 2 * rows, device=device)], 1)
    tokens = torch.arange(rows, device=device)
    output = torch.empty((rows, heads, VALUES), dtype=torch.bfloat16, device=device)
    absorbed, rotated = layer.absorb(layer.query), layer.query[..., NOPE:].contiguous()

    def attend() -> Partial:
        return flash(rotated, k, v, absorbed, starts, 1, layer.tokens, True, lengths, layer.table, None, schedule, 32)

    latent, lse = attend()
    values = layer.project(latent)

    def pack() -> None:
        layout.outputs(packed[:rows]).copy_(values)
        layout.lses(packed[:rows]).copy_(lse)

    def whole() -> None:
        q = layer.absorb(layer.query)
        out, lse = flash(
            layer.query[..., NOPE:].contiguous(), k, v, q, starts, 1, layer.tokens, True, lengths, layer.table, None,
            schedule, 32,
        )  # fmt: skip
        layout.outputs(packed[:rows]).copy_(layer.project(out))
        layout.lses(packed[:rows]).copy_(lse)
        merge_rows(packed, layout, pick, tokens, output)

    def stock() -> None:
        q = layer.absorb(layer.query)
        out, _ = flash(
            layer.query[..., NOPE:].contiguous(), k, v, q, starts, 1, layer.tokens, True, lengths, layer.table, None,
            schedule, 32,
        )  # fmt: skip
        torch.bmm(out.transpose(0, 1), layer.w_uv, out=output.transpose(0, 1))

    times = {
        "absorb": in_graph(lambda: layer.absorb(layer.query)),
        "attend": in_graph(attend),
        "project_float32": in_graph(lambda: layer.project(latent)),
        "project_stock": in_graph(lambda: layer.project_stock(latent)),
        "pack": in_graph(pack),
        "merge": in_graph(lambda: merge_rows(packed, layout, pick, tokens, output)),
        "whole": in_graph(whole),
        "stock": in_graph(stock),
    }
    times["attend_TB_s"] = rows * layer.tokens * (RANK + ROTATED) * 2 / times["attend"] / 1e6
    times["beyond_stock"] = times["whole"] - times["stock"]
    return {name: round(value, 3) for name, value in times.items()}


def fixed_places(heads: int, capacity: int, ranks: int, used: int, tokens: int, pieces: int) -> dict[str, float]:
    """A captured launch over all places, of which so many are used, one or more from each rank."""
    from vllm_nanocp.attention.flash_launches import ShardLaunch, places_of
    from vllm_nanocp.attention.mla import flash_mla
    from vllm_nanocp.attention.mla.latent_sizes import LatentSizes

    places, sizes, device = places_of(capacity, ranks), LatentSizes(heads, NOPE, ROTATED, RANK, VALUES), "cuda"
    blocks = -(-tokens // BLOCK)
    cache = torch.randn((used * blocks, BLOCK, RANK + ROTATED), dtype=torch.bfloat16, device=device)
    launch = ShardLaunch(
        num_queries=places,
        query_starts=torch.arange(places + 1, dtype=torch.int32, device=device),
        lengths=torch.zeros(places, dtype=torch.int32, device=device),
        block_table=torch.zeros((places, 0x100000 // BLOCK), dtype=torch.int32, device=device),
        max_queries=1,
        max_length=0x100000,
        causal=False,
        max_pieces=pieces,
    )
    for i in range(used):
        place = i % (ranks + 1) * capacity + i // (ranks + 1)
        launch.lengths[place] = tokens
        launch.block_table[place, :blocks] = torch.arange(i * blocks, (i + 1) * blocks)
    absorbed = torch.randn((places, heads, RANK), dtype=torch.bfloat16, device=device)
    rotated = torch.randn((places, heads, ROTATED), dtype=torch.bfloat16, device=device)
    flash_mla.make_schedule(launch, sizes, BLOCK, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time_us = in_graph(lambda: flash_mla.attend_latents(absorbed, rotated, cache, launch, SCALE))
    room = torch.cuda.max_memory_allocated() - before
    read = used * tokens * (RANK + ROTATED) * 2
    return {"attend": round(time_us, 2), "TB_s": round(read / time_us / 1e6, 3), "peak_MiB": room >> 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--fa3", help="vLLM's _vllm_fa3_C library, where vLLM itself is not installed")
    parser.add_argument("--reference", action="store_true", help="small, without FlashAttention")
    args = parser.parse_args()
    small, device = args.reference, "cpu" if args.reference else "cuda"
    if not small:
        load_flash(args.fa3)
    attend = reference_flash if small else flash
    found: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "machine": "CPU" if small else torch.cuda.get_device_name(),
        "shape": dict(rank=RANK, rotated=ROTATED, nope=NOPE, values=VALUES, block=BLOCK, dtype="bfloat16"),
        "error": {},
        "stages_us": {},
        "fixed_places_us": {},
    }

    def note(kind: str, name: str, run: Callable[[], Any]) -> None:
        begin = time.time()
        try:
            found[kind][name] = run()
        except Exception as error:
            found[kind][name] = repr(error)[:500]
        print(f"{kind} {name} {time.time() - begin:.1f} s: {found[kind][name]}", flush=True)
        with open(args.out, "w") as file:
            json.dump(found, file, indent=1)

    for heads in (4,) if small else (16, 64, 128):
        tokens = 300 if small else 8192 + 40
        note("error", f"decode, {heads} heads", lambda h=heads, t=tokens: decode_error(Layer(h, 4, t, device), attend))
        note(
            "error", f"chunk of a prompt, {heads} heads",
            lambda h=heads, t=tokens: prefill_error(Layer(h, 1, t, device), 64 if small else 256, attend),
        )  # fmt: skip
    for heads in () if small else (16, 64, 128):
        for rows, tokens in ((1, 262144), (4, 65536), (16, 1024), (64, 1024), (1, 0x100000)):
            note(
                "stages_us",
                f"{heads} heads, {rows} x {tokens}",
                lambda h=heads, r=rows, t=tokens: stages(Layer(h, r, t, device)),
            )
    for heads, capacity in () if small else itertools.product((16, 128), (16, 64, 256)):
        for used, tokens in ((1, 262144), (4, 65536), (16, 16384)):
            for pieces in (4, 12, 32, 64, 128):
                if 4 * (capacity * 5) * heads * RANK * pieces > 5 << 30:
                    continue
                name = f"{heads} heads, capacity {capacity}, 4 ranks, {used} x {tokens}, {pieces} pieces"
                note(
                    "fixed_places_us", name,
                    lambda h=heads, c=capacity, u=used, t=tokens, p=pieces: fixed_places(h, c, 4, u, t, p),
                )  # fmt: skip


if __name__ == "__main__":
    main()
