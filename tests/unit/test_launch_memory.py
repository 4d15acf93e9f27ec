# SPDX-License-Identifier: Apache-2.0
"""Memory is set aside for the results of one launch: those of one are gone when the next one makes its own."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.flash_latent_steps import NanoCPFlashAttnMLABackend  # noqa: F401  # puts a reference for FlashAttention
from vllm_nanocp.attention.gqa import flash_backend, gpu_layer
from vllm_nanocp.attention.mla import flash_latent


class Results:
    """Makes results, and counts how many of them are alive at once."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __call__(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        results = torch.zeros(3, 2), torch.zeros(3)
        self.made += map(weakref.ref, results)
        self.most = max(self.most, sum(made() is not None for made in self.made))
        return results


def test_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    results, scale = Results(), torch.ones(1)
    impl = object.__new__(flash_backend.NanoCPFlashAttentionImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size, impl.scale = 2, 2, 2, 1.0
    impl.supports_quant_query_input = False
    monkeypatch.setattr(impl, "keys_and_values", lambda _: (None, None), raising=False)
    monkeypatch.setattr(flash_backend.flash_splits, "attend_pieces", results)
    monkeypatch.setattr(flash_backend, "pack_pieces", lambda *_: None)
    layer = object.__new__(gpu_layer.ShardLayer)
    layer.impl, layer.layer, layer.kv_cache = impl, SimpleNamespace(_k_scale=scale, _v_scale=scale), None  # type: ignore[assignment]
    launches: Any = [
        SimpleNamespace(num_queries=3, lengths=[7], pieces=torch.ones(1), launch_row=None) for _ in range(3)
    ]
    layer.over_shards(torch.zeros(9, 2), launches, torch.zeros(9, 4))
    assert len(results.made) == 6 and results.most == 2


def test_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results()
    monkeypatch.setattr(flash_latent, "_over_piece", results)
    monkeypatch.setattr(flash_latent, "_take_in", lambda *_, **__: None)
    work = flash_latent.Projected(slice(0, 3), torch.zeros(2), [None] * 3)  # type: ignore[list-item]
    flash_latent.attend(torch.zeros(3, 2), None, work, torch.zeros(3, 2), torch.zeros(3))  # type: ignore[arg-type]
    assert len(results.made) == 6 and results.most == 2
