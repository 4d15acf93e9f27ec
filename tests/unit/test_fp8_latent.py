# SPDX-License-Identifier: Apache-2.0
"""Latent attention on Hopper with an fp8 cache, with references for FlashMLA and FlashAttention: whole steps over
several ranks against float64 and stock's error with the same cache, and what the kernel is never asked. On GPUs:
``tests/gpu/test_fp8_latent.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import flashmla as flashmla_backend
from vllm.v1.attention.ops import flashmla

from tests.unit.flash_latent_steps import LatentOnHopper
from tests.unit.fp8_latent_steps import (
    FlashMLAImpl,
    LatentOfFloat8OnHopper,
    bare_family,
    fp8_shape,
    make_layer,
    run_modes,
)
from tests.unit.latent_steps import CPU
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.flash_launches import lengths_without
from vllm_nanocp.attention.mla import fp8_latents, latent_tables
from vllm_nanocp.attention.mla.flash_mla import FLASH_ATTENTION
from vllm_nanocp.attention.mla.fp8_latents import FLASH_MLA
from vllm_nanocp.attention.mla.latent_fixed import FixedLatentTables, empty_block_table
from vllm_nanocp.attention.mla.latent_sizes import LatentSizes
from vllm_nanocp.attention.mla.latent_tables import most_memory
from vllm_nanocp.attention.sharded_step import ShardedStep
from vllm_nanocp.attention.supported import check_layers
from vllm_nanocp.errors import NanoCPConfigError

SHAPES = [fp8_shape(4, 32, 32), fp8_shape(16, 128, 128)]
SIZES = LatentSizes(4, 128, 64, 512, 128)
OF_STOCK = 1.2


def specs(*seeds: int) -> list[Any]:
    """Each shape in turn, and now and then a step in which nobody visits."""
    return [(SHAPES[seed % 2], seed, seed % 9 != 8) for seed in seeds]


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_steps(tmp_path: Path, ranks: int) -> None:
    """Rows of one query are of float8 in stock too; prompts are not, and their own latents are not rounded."""
    modes: dict[str, Any] = {
        "projected": (dict(stock=True), specs(300, 303, 304)),
        "absorbed": (dict(stock=True, few=1000), specs(311, 320)),
        "short prompts": (dict(stock=True, threshold=128), specs(300, 303, 304, 306)),
        "beside short prompts": (dict(capacity=12, pad=0, stock=True, threshold=128), specs(310, 312, 313)),
        "fixed": (dict(capacity=12, stock=True), specs(310, 311, 314)),
        "graph": (dict(capacity=12, graph=True, stock=True), specs(315, 316, 317)),
        "routed": (dict(capacity=12, graph=True, stock=True, routed=True, shared=str(tmp_path)), specs(315, 316, 317)),
        "groups": (dict(groups=2, stock=True), specs(309, 318)),
    }
    results = run_ranks(ranks, run_modes, modes, seconds=200)
    for mode in modes:
        counts: dict[str, float] = {}
        for result in results:
            assert all(error < 0.5 for _, error in result[mode][1]), result[mode]
            for kind, n in result[mode][0].items():
                counts[kind] = counts.get(kind, 0) + n
        for kind, bound in (("decode", 0.05), ("prefill", 0.01)):
            if kind == "prefill" and mode in ("fixed", "beside short prompts", "graph", "routed"):
                continue
            ours, stock = (math.sqrt(counts[f"{name} {kind}"] / counts[f"norm {kind}"]) for name in ("ours", "stock"))
            print(f"{ranks} ranks, {mode}, {kind}: error {ours:.2e}, {ours / stock:.3f} of stock's")
            assert 0 < ours <= OF_STOCK * stock and ours < bound


def test_every_row_of_a_launch_sees_a_key() -> None:
    """An unused place, in tables of fixed size; a row that visits, and padding, in vLLM's own launch."""
    table = empty_block_table(3, 2, 640, 64, CPU)
    tables = FixedLatentTables(3, 2, 8, table, SIZES, 64, torch.bfloat16, FLASH_MLA)
    starts, lengths = torch.arange(3, dtype=torch.int32), torch.tensor([70, 0], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=80,
        block_table_tensor=torch.zeros(2, 10, dtype=torch.int32),
        slot_mapping=torch.zeros(2, dtype=torch.int64),
    )
    made, left = tables.fill(ShardedStep(0, send_counts=[0, 0], recv_counts=[0, 0], capacity=3), common)
    assert made.fixed is not None and made.kernel is FLASH_MLA
    for work in made.fixed:
        assert work.launch.lengths.tolist() == [1] * 9 and work.empty.all()
    assert left.tolist() == [70, 1]
    visiting, room = torch.tensor([0]), torch.zeros(3, dtype=torch.int32)
    assert lengths_without(visiting, common, room, FLASH_MLA.fewest).tolist() == [1, 1]
    assert lengths_without(visiting, common, room).tolist() == [0, 0]


def test_only_single_queries_are_the_kernels() -> None:
    """It masks the last two blocks of keys only, and takes as many queries of every row."""
    assert FLASH_MLA.takes(1, SIZES) and not FLASH_MLA.takes(2, SIZES) and SIZES.absorbs(2)


def test_no_launch_has_more_rows_than_the_kernel_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few heads FlashAttention takes more: 4,096 queries with 16 heads."""
    assert latent_tables.queries_at_once(16, 512) > fp8_latents.MOST_ROWS
    monkeypatch.setattr(fp8_latents, "MOST_ROWS", 5)
    monkeypatch.setattr(latent_tables, "make_launch", lambda rows, *_: SimpleNamespace(num_queries=len(rows)))
    for kernel in (FLASH_MLA, FLASH_ATTENTION):
        monkeypatch.setattr(type(kernel), "schedule", lambda *_: None)
    blocks = torch.zeros(1, dtype=torch.int32)
    rows = [latent_tables._Seen(1, 64, blocks.data_ptr(), blocks) for _ in range(12)]
    for kernel, parts in ((FLASH_MLA, [(0, 5), (5, 10), (10, 12)]), (FLASH_ATTENTION, [(0, 12)])):
        works = latent_tables._Tables(SIZES, 64, torch.bfloat16, CPU, kernel).works(rows, causal=False)
        assert [(work.part.start, work.part.stop) for work in works] == parts


@pytest.mark.parametrize("heads", [16, 128])
def test_memory_is_about_that_of_a_cache_of_16_bits(heads: int) -> None:
    sizes = LatentSizes(heads, 128, 64, 512, 128)
    usual = most_memory(2, 8192, sizes, torch.bfloat16)
    assert 0.95 * usual <= most_memory(2, 8192, sizes, torch.bfloat16, FLASH_MLA) <= 1.2 * usual


Results = tuple[torch.Tensor, torch.Tensor]


def other_base(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out, lse * 1.4426950408889634


def other_type(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out.half(), lse


def other_outputs(out: torch.Tensor, lse: torch.Tensor) -> Results:
    return out * 1.1, lse


def refuses(out: torch.Tensor, lse: torch.Tensor) -> Results:
    raise RuntimeError("fwd_kvcache_mla_fp8() expected at most 12 arguments\nDeclaration: fwd(Tensor q, Tensor k")


def test_a_flash_mla_that_keeps_its_promises() -> None:
    FLASH_MLA.self_check(SIZES, torch.bfloat16, CPU)


@pytest.mark.parametrize("change", [other_base, other_type, other_outputs, refuses])
def test_another_flash_mla_is_refused_in_one_line(
    change: Callable[[torch.Tensor, torch.Tensor], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = flashmla.flash_mla_with_kvcache_fp8
    monkeypatch.setattr(flashmla, "flash_mla_with_kvcache_fp8", lambda **args: change(*attend(**args)))
    with pytest.raises(NanoCPConfigError) as caught:
        FLASH_MLA.self_check(SIZES, torch.bfloat16, CPU)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("nanocp: this FlashMLA does not return")
    assert "--kv-cache-dtype" in line and len(line) < 500


def test_layers_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an implementation as vLLM's own ``__init__`` builds it on a Hopper GPU."""
    monkeypatch.setattr(flashmla_backend, "is_flashmla_dense_supported", lambda: (True, None))
    shape, layer, family = SHAPES[1], make_layer(SHAPES[1], CPU), bare_family(SHAPES[1])
    sizes = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, qk_head_dim=192, v_head_dim=128)
    with set_current_vllm_config(VllmConfig()):
        impl = FlashMLAImpl(
            16, 576, 0.1, 1, None, None, "fp8", None, "decoder", None, q_lora_rank=None, kv_b_proj=None, indexer=None,
            **sizes,
        )  # fmt: skip
    monkeypatch.setattr(layer, "impl", impl)
    check_layers({"l": layer}, family)
    changes: list[tuple[Any, str, Any, str]] = [
        (layer, "_k_scale", torch.ones(16), "KV scales of each head"),
        (layer, "kv_cache_dtype", "auto", "a KV cache of auto"),
        (layer, "kv_cache_dtype", "fp8_e5m2", "a KV cache of fp8_e5m2"),
        (layer, "attn_backend", flashmla_backend.FlashMLABackend, "the attention backend"),
        (layer, "prefill_backend", None, "prompts attend by NoneType"),
        (family, "dtype", torch.float16, "with a model of torch.float16"),
        (family, "sizes", replace(family.sizes, rank=256), "differ in size"),
    ]
    for where, name, value, said in changes:
        with monkeypatch.context() as patch, pytest.raises(NanoCPConfigError, match=said):
            patch.setattr(where, name, value)
            check_layers({"l": layer}, family)
    assert shape.cache_dtype in family.cache_dtypes


@pytest.mark.parametrize("drafts", [False, True])
def test_what_takes_the_routed_exchange_unasked(drafts: bool) -> None:
    """A cache of 16 bits, with drafts or without: what an engine has run with on GPUs."""
    sizes = dict(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    text = SimpleNamespace(**sizes)
    model = SimpleNamespace(dtype=torch.bfloat16, hf_text_config=text, get_num_attention_heads=lambda _: 16)
    config = SimpleNamespace(model_config=model, parallel_config=None, speculative_config=object() if drafts else None)
    assert not LatentOnHopper(config).unrouted
    assert LatentOfFloat8OnHopper(config).unrouted
