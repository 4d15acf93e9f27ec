# SPDX-License-Identifier: Apache-2.0
"""`cpu_lora_none`: tokens without an adapter have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_lora_none
from vllm_nanocp.patches._guard import is_ours

pytest.importorskip("vllm")


@pytest.fixture
def operations(stock: Any) -> Any:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    stock(punica_cpu, "bgmv_shrink", "bgmv_expand")
    return stock(lora_ops, "bgmv_shrink", "bgmv_expand")


def shrunk(operations: Any) -> torch.Tensor:
    """Three requests of two tokens: with the adapter in the first slot, with none, with that in the last slot."""
    output = torch.full((6, 4), torch.nan)
    weights = torch.arange(2 * 4 * 8.0).view(2, 1, 4, 8) + 1
    lengths, starts = torch.full((3,), 2), torch.tensor([0, 2, 4])
    slots = torch.tensor([0, -1, 1])
    operations.sgmv_shrink(torch.ones(6, 8), weights, output, starts, lengths, slots, 3, 2, 6, 1.0)
    return output


def test_upstream_gives_them_the_last_slots(operations: Any) -> None:
    """The defect. If not, the patch can go."""
    found = shrunk(operations)
    assert torch.equal(found[2:4], found[4:]) and found[2:4].all()


def test_they_have_none(operations: Any) -> None:
    before = shrunk(operations)
    assert cpu_lora_none.apply() is Outcome.APPLIED
    assert cpu_lora_none.apply() is Outcome.APPLIED
    found = shrunk(operations)
    assert not found[2:4].any()
    assert torch.equal(found[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


def embedded(prefill: bool) -> torch.Tensor:
    """Of the same requests, what adapters make of embeddings, as vLLM's wrapper does it: they are not shrunk before."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(8, 4, "cpu")
    slots = torch.tensor([0, 0, -1, -1, 1, 1])
    wrapper._token_lora_indices[:6], wrapper.indices_len[0] = slots, 6
    wrapper._update_prefill_metadata(slots)
    wrapper.is_prefill = prefill
    output, weights = torch.ones(6, 8), torch.arange(2 * 8 * 4.0).view(2, 1, 8, 4) + 1
    wrapper.add_lora_embedding(output, torch.ones(6, 4), weights, add_input=True)
    return output - 1


@pytest.mark.parametrize("prefill", [False, True])
def test_nor_of_embeddings(operations: Any, prefill: bool) -> None:
    before = embedded(prefill)
    assert torch.equal(before[2:4], before[4:]) and before.all()
    cpu_lora_none.apply()
    found = embedded(prefill)
    assert not found[2:4].any()
    assert torch.equal(found[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


@pytest.mark.parametrize(("slot", "some"), [(-1, False), (1, True)])
def test_one_slot_for_all_tokens(operations: Any, slot: int, some: bool) -> None:
    """Which vLLM's sums take, too."""
    cpu_lora_none.apply()
    output, expanded = torch.full((3, 4), torch.nan), torch.zeros(3, 8)
    operations.bgmv_shrink(torch.ones(3, 8), torch.ones(2, 1, 4, 8), output, torch.tensor([slot]))
    assert output.bool().all() if some else not output.any()
    operations.bgmv_expand(torch.ones(3, 4), torch.ones(2, 1, 8, 4), expanded, torch.tensor([slot]))
    assert expanded.all() if some else not expanded.any()


def test_the_wrapper_has_it_too(operations: Any) -> None:
    from vllm.lora.punica_wrapper import punica_cpu

    cpu_lora_none.apply()
    for module in (punica_cpu, operations):
        assert is_ours(module.bgmv_shrink) and is_ours(module.bgmv_expand)


def test_another_upstream_is_refused(operations: Any) -> None:
    def bgmv_shrink(*arguments: Any) -> None: ...

    operations.bgmv_shrink = bgmv_shrink
    with pytest.raises(PatchError, match="cpu_lora_none"):
        cpu_lora_none.apply()
