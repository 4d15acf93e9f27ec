# SPDX-License-Identifier: Apache-2.0
"""`cpu_draft_expand`: drafts are verified with their request's temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_draft_expand

pytest.importorskip("vllm")


@pytest.fixture
def sampler(stock: Any) -> Any:
    from vllm.v1.sample import rejection_sampler

    return stock(rejection_sampler, "expand_batch_to_tokens")


@pytest.mark.usefixtures("on_cpu")
def test_upstream_s_kernel_leaves_its_output_as_it_was() -> None:
    from vllm.utils import cpu_triton_utils

    output, ends = torch.full((4,), 123.0), torch.tensor([3, 4], dtype=torch.int32)
    cpu_triton_utils._expand_kernel_impl(output, torch.tensor([0.7, 0.2]), ends, 0, 1)
    assert (output == 123).all()


def test_each_draft_has_its_request_s(sampler: Any) -> None:
    assert cpu_draft_expand.apply() is Outcome.APPLIED
    assert cpu_draft_expand.apply() is Outcome.APPLIED
    expand, ends = sampler.expand_batch_to_tokens, torch.tensor([2, 2, 5], dtype=torch.int32)
    found = expand(torch.tensor([0.7, 0.2, 0.0]), ends, 5, replace_from=0, replace_to=1)
    assert torch.equal(found, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))
    assert expand(torch.tensor([5, 6, 7], dtype=torch.int32), ends, 5).tolist() == [5, 5, 7, 7, 7]
    assert expand(torch.tensor([0.7]), torch.tensor([0]), 0).shape == (0,)


def test_another_upstream_is_refused(sampler: Any) -> None:
    def expand_batch_to_tokens(x: Any) -> Any:
        return x

    sampler.expand_batch_to_tokens = expand_batch_to_tokens
    with pytest.raises(PatchError, match="cpu_draft_expand"):
        cpu_draft_expand.apply()
