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

    stock(punica_cpu, "bgmv_shrink")
    stock(punica_cpu, "bgmv_expand")
    stock(lora_ops, "bgmv_expand")
    return stock(lora_ops, "bgmv_shrink")


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


def expanded(operations: Any) -> torch.Tensor:
    """What is added for the same requests where nothing is shrunk, as in an embedding layer."""
    output = torch.ones(6, 8)
    lengths, starts, slots = torch.full((3,), 2), torch.tensor([0, 2, 4]), torch.tensor([0, -1, 1])
    weights = torch.arange(2 * 8 * 4.0).view(2, 1, 8, 4) + 1
    operations.sgmv_expand(torch.ones(6, 4), weights, output, starts, lengths, slots, 3, 2, 6, True)
    return output - 1


def test_upstream_adds_the_last_slots_embeddings(operations: Any) -> None:
    """The defect. If not, that part can go."""
    found = expanded(operations)
    assert torch.equal(found[2:4], found[4:]) and found[2:4].all()


def test_embeddings_have_none(operations: Any) -> None:
    before = expanded(operations)
    cpu_lora_none.apply()
    found = expanded(operations)
    assert not found[2:4].any()
    assert torch.equal(found[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


def test_the_wrapper_has_it_too(operations: Any) -> None:
    from vllm.lora.punica_wrapper import punica_cpu

    cpu_lora_none.apply()
    assert is_ours(punica_cpu.bgmv_shrink) and is_ours(operations.bgmv_shrink)
    assert is_ours(punica_cpu.bgmv_expand) and is_ours(operations.bgmv_expand)


def test_another_upstream_is_refused(operations: Any) -> None:
    def bgmv_shrink(*arguments: Any) -> None: ...

    operations.bgmv_shrink = bgmv_shrink
    with pytest.raises(PatchError, match="cpu_lora_none"):
        cpu_lora_none.apply()
