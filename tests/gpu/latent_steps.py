# SPDX-License-Identifier: Apache-2.0
"""Latent attention's steps on GPUs: with the real kernels, several ranks on one GPU or one on each, from graphs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.unit import flash_latent_steps, fp8_latent_steps
from tests.unit.attention_steps import Kernel
from tests.unit.latent_steps import LatentShape, forward
from tests.unit.processes import gpu_of
from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.sharded_step import Guest, OwnRow, ShardedStep
from vllm_nanocp.exchange import CollectiveExchange

from .modes import Modes, each_mode


class StagedExchange(CollectiveExchange):
    """Over gloo, through the host's memory: for ranks that share a GPU, which NCCL does not serve."""

    def _all_to_all(self, rows: torch.Tensor, send: Any, recv: Any, out: Any, ahead: bool = False) -> Any:
        there = super()._all_to_all(rows.cpu(), send, recv, None)[0].to(rows.device)
        return (there if out is None else out.copy_(there)), None


def cuda_kernel(args: dict[str, Any], staged: bool) -> Kernel:
    """As ``kernel_of``.

    Args:
        args: of that; and ``fp8``, with which the cache has 8 bits.
        staged: ranks share a GPU.
    """
    args = dict(args)
    steps: Any = fp8_latent_steps if args.pop("fp8", False) else flash_latent_steps
    # What is past a length is finite in a real cache too, and FlashAttention reads whole blocks.
    kernel = dataclasses.replace(steps.kernel_of("cuda", stock=True, **args), fill=1000.0)
    if args.get("routed"):  # by which torch lets two ranks of one GPU share memory
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(gpu_of(dist.get_rank()))
    return dataclasses.replace(kernel, exchange=StagedExchange) if staged else kernel


def run_modes(rank: int, size: int, modes: Modes, staged: bool) -> dict[str, Any]:
    """``run_scenarios`` by mode: arguments of ``kernel_of``, and groups of scenarios."""
    return each_mode(rank, size, modes, lambda args: cuda_kernel(args, staged))


def fullest_step(rank: int, size: int, shape: LatentShape, tokens: int) -> tuple[int, int]:
    """Every rank's chunk of so many tokens visits all ranks, its own too: bytes that a layer takes, and has."""
    device = gpu_of(rank)
    steps: Any = fp8_latent_steps if shape.cache_type == torch.uint8 else flash_latent_steps
    builder, layer, family = steps.make_builder(shape, device, 1), steps.make_layer(shape, device), steps.bare_family
    blocks = tokens // shape.block_size
    cache = torch.zeros(shape.cache_size(blocks), dtype=shape.cache_type, device=device)
    query = torch.zeros((tokens, shape.num_heads, shape.head_size), dtype=shape.dtype, device=device)
    keys = torch.zeros((tokens, 1, shape.rank + shape.rotated), dtype=shape.dtype, device=device)
    output = torch.zeros((tokens, shape.num_heads, shape.value_size), dtype=shape.dtype, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=starts[1:].to(device),
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table_tensor=torch.arange(blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=starts[1:],
    )
    counts = [tokens] * size
    step = ShardedStep(rank, send_counts=counts, recv_counts=list(counts), most_rows=(2 * size + 1) * tokens)
    step.own = [OwnRow(lambda: 0, tokens, 0, 0, [(r, 0) for r in range(size)])]
    held = torch.arange(blocks, dtype=torch.int32, device=device)
    step.guests = [Guest(home, 0, tokens, str(home), held, tokens) for home in range(size)]
    context.exchange = CollectiveExchange(dist.group.WORLD)
    peak = 0
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        context.step = step
        metadata = builder.build(0, common)
        context.step = None
        forward(None, layer, query, keys, keys, cache, metadata, output)
        torch.cuda.synchronize()
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
        del metadata
    return peak, family(shape).most_memory(size, tokens)
