# SPDX-License-Identifier: Apache-2.0
"""`cpu_cache_dtype`: a float32 model's KV in 16 bits stays within its cache and is attended to rightly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_cache_dtype
from vllm_nanocp.patches._guard import is_ours, source_digest

pytest.importorskip("vllm")

TOKENS, HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 70, 4, 2, 64, 32, 8


@pytest.fixture
def cpu_attn(on_cpu: None, stock: Any) -> Any:
    from vllm.v1.attention.backends import cpu_attn

    stock(cpu_attn.CPUAttentionMetadataBuilder, "__init__")
    stock(cpu_attn.CPUAttentionBackendImpl, "forward", "do_kv_cache_update")
    return cpu_attn


def _qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def _attend(cpu_attn: Any, dtype: torch.dtype, name: str, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt's attention through vLLM's implementation, and the memory: the cache, and as much behind it."""
    from vllm import _custom_ops as ops

    block_elements = KV_HEADS * BLOCK * 2 * SIZE
    memory = torch.zeros(2 * BLOCKS * block_elements, dtype=dtype)
    cache = memory[: BLOCKS * block_elements].view(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE)
    query, key, value = _qkv()
    positions = torch.arange(TOKENS)
    mapping = torch.tensor(blocks)[positions // BLOCK] * BLOCK + positions % BLOCK
    layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    impl = object.__new__(cpu_attn.CPUAttentionBackendImpl)
    impl.__dict__.update(
        kv_cache_dtype=name, attn_type="decoder", sinks=None, scale=SIZE**-0.5, alibi_slopes=None, sliding_window=-1,
        logits_soft_cap=0, use_zentorch_sdpa=False,
    )  # fmt: skip
    patched = is_ours(cpu_attn.CPUAttentionBackendImpl.forward)
    starts, lengths = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        1,
        HEADS,
        KV_HEADS,
        SIZE,
        lengths,
        dtype if patched else torch.float32,
        starts,
        True,
        -1,
        "vec",
        True,
        None,
        name,
    )
    metadata = cpu_attn.CPUAttentionMetadata(
        TOKENS, TOKENS, starts, TOKENS, lengths, torch.tensor([blocks], dtype=torch.int32), mapping, schedule
    )
    impl.do_kv_cache_update(layer, key, value, cache, mapping)
    output = torch.empty_like(query)
    impl.forward(layer, query, key, value, cache, metadata, output=output, output_scale=None, output_block_scale=None)
    return output, memory


def _error(output: torch.Tensor) -> float:
    query, key, value = (x.double() for x in _qkv())
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SIZE**-0.5
    scores.masked_fill_(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), float("-inf"))
    return float((output - torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)).abs().nan_to_num(99.0).max())


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_upstream_writes_behind_the_cache(cpu_attn: Any, dtype: torch.dtype, name: str) -> None:
    """The defect; if this fails, the patch may go."""
    output, memory = _attend(cpu_attn, dtype, name, [5, 2, 7])
    assert memory[len(memory) // 2 :].any() and _error(output) > 0.5


@pytest.mark.parametrize(
    ("dtype", "name", "most"), [(torch.bfloat16, "bfloat16", 2e-2), (torch.float16, "float16", 3e-3)]
)
def test_a_cache_of_16_bits(cpu_attn: Any, dtype: torch.dtype, name: str, most: float) -> None:
    assert cpu_cache_dtype.apply() is Outcome.APPLIED
    assert cpu_cache_dtype.apply() is Outcome.APPLIED
    output, memory = _attend(cpu_attn, dtype, name, [5, 2, 7])
    assert not memory[len(memory) // 2 :].any()
    assert output.dtype == torch.float32 and _error(output) < most


def test_the_models_own_type_stays_stock(cpu_attn: Any) -> None:
    stock, _ = _attend(cpu_attn, torch.float32, "auto", [5, 2, 7])
    cpu_cache_dtype.apply()
    ours, _ = _attend(cpu_attn, torch.float32, "auto", [5, 2, 7])
    assert torch.equal(stock, ours) and _error(ours) < 1e-5


def test_the_scratch_is_laid_out_for_what_is_computed(cpu_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, encoder = torch.bfloat16, False

    def init(self: Any) -> None:
        self.kv_cache_spec, self.dtype = SimpleNamespace(dtype=kept), torch.float32
        self.is_encoder_only_attention = encoder

    monkeypatch.setattr(cpu_attn.CPUAttentionMetadataBuilder, "__init__", init)
    monkeypatch.setattr(cpu_cache_dtype, "_KNOWN_INIT", {source_digest(init)})
    cpu_cache_dtype.apply()

    def computed_in() -> torch.dtype:
        builder = object.__new__(cpu_attn.CPUAttentionMetadataBuilder)
        builder.__init__()
        dtype: torch.dtype = builder.dtype
        return dtype

    assert computed_in() == torch.bfloat16
    encoder = True
    assert computed_in() == torch.float32
    encoder = False
    for kept in (torch.float32, torch.uint8):  # noqa: B007, ``init`` reads it
        assert computed_in() == torch.float32


def test_refuses_an_unknown_upstream(cpu_attn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, *args: Any) -> None:
        """Another body."""

    monkeypatch.setattr(cpu_attn.CPUAttentionBackendImpl, "do_kv_cache_update", other)
    with pytest.raises(PatchError, match="cpu_cache_dtype"):
        cpu_cache_dtype.apply()
