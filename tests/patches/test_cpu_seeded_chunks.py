# SPDX-License-Identifier: Apache-2.0
"""`cpu_seeded_chunks`: a dropped sample leaves a seeded request's generator as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_seeded_chunks

pytest.importorskip("vllm")


@pytest.fixture
def runner_class(on_cpu: None, stock: Any) -> Any:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    return stock(CPUModelRunner, "_sample", "_bookkeeping_sync")


def _runner(cls: Any, discarded: list[bool]) -> Any:
    """A runner with one seeded request a row, whose sampler draws one number of each generator."""
    generators = {row: torch.Generator().manual_seed(row) for row in range(len(discarded))}

    def sampler(logits: Any, sampling_metadata: Any) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in sampling_metadata.generators.values()]

    runner = object.__new__(cls)
    runner.discard_request_mask = SimpleNamespace(np=np.array(discarded))
    runner.input_batch = SimpleNamespace(
        generators=generators,
        sampling_metadata=SimpleNamespace(generators=generators),
        update_async_output_token_ids=lambda: None,
    )
    runner.sampler = sampler
    return runner


def test_upstream_does_not_rewind(runner_class: Any) -> None:
    """The defect: the generator is spent, and CPU generators cannot be rewound by offset."""
    runner = _runner(runner_class, [True])
    assert runner._sample(None, None) != runner._sample(None, None)
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


def test_dropped_samples_are_taken_back(runner_class: Any) -> None:
    assert cpu_seeded_chunks.apply() is Outcome.APPLIED
    assert cpu_seeded_chunks.apply() is Outcome.APPLIED
    runner = _runner(runner_class, [True, False])
    first, second = runner._sample(None, None), runner._sample(None, None)
    assert first[0] == second[0] and first[1] != second[1]


def test_refuses_an_unknown_upstream(runner_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def other(self: Any, *args: Any) -> None:
        """Another body."""

    monkeypatch.setattr(GPUModelRunner, "_bookkeeping_sync", other)
    with pytest.raises(PatchError, match="cpu_seeded_chunks"):
        cpu_seeded_chunks.apply()
