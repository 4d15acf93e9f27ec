# SPDX-License-Identifier: Apache-2.0
"""`draft_top_k`: a step without drafts does not end the worker of requests with `top_k`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, draft_top_k

pytest.importorskip("vllm")


@pytest.fixture
def sampler(stock: Any) -> Any:
    from vllm.v1.sample.ops import topk_topp_sampler

    return stock(topk_topp_sampler, "apply_top_k_only")


def top_k(sampler: Any, rows: int) -> torch.Tensor:
    logits = torch.arange(8.0).repeat(rows, 1)
    found: torch.Tensor = sampler.apply_top_k_top_p(logits, torch.full((rows,), 3), None)
    return found


def test_upstream_ends_the_worker(sampler: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected reduction dim"):
        top_k(sampler, 0)


def test_no_rows_stay_none(sampler: Any) -> None:
    right = top_k(sampler, 2)
    assert draft_top_k.apply() is Outcome.APPLIED
    assert draft_top_k.apply() is Outcome.APPLIED
    assert top_k(sampler, 0).shape == (0, 8)
    assert torch.equal(top_k(sampler, 2), right) and right.isfinite().sum() == 6


def test_another_upstream_is_refused(sampler: Any) -> None:
    def apply_top_k_only(logits: Any, k: Any) -> Any:
        return logits

    sampler.apply_top_k_only = apply_top_k_only
    with pytest.raises(PatchError, match="draft_top_k"):
        draft_top_k.apply()
