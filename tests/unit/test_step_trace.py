# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/step_trace.py`` counts what a trace holds, step by step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five steps of 1,000 us: a wait of 100, a copy, a kernel of 300 and one of NCCL's that overlaps it by 100."""

    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur)

    events: list[dict[str, Any]] = [dict(ph="M", name="process_name")]
    for start in range(0, 5000, 1000):
        events += [
            event("user_annotation", "execute_context_0(0)_generation_8(8)", start, 900),
            event("cuda_runtime", "cudaGraphLaunch", start + 10, 20),
            event("kernel", "attention", start + 100, 300),
            event("kernel", "ncclDevKernel_AllGather", start + 300, 200),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", start + 600, 2),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", start + 610, 2),
            event("cuda_runtime", "cudaEventSynchronize", start + 700, 100),
        ]
    with gzip.open(tmp_path / "A_dp0_rank0.1.pt.trace.json.gz", "wt") as sink:
        json.dump({"traceEvents": events[::-1]}, sink)
    return tmp_path


def test_figures_of_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import step_trace

    events = step_trace.load(folder, "A")
    found = step_trace.summarise(events)
    assert found["steps"] == 2  # the first and the last may be cut
    assert found["per_step"] == dict(
        waits=1, copies_to_cpu=1, graph_launches=1, kernels=2, nccl_kernels=1, nccl_ms=0.2, busy_ms=0.4
    )
    assert found["kernels"] == [("attention", 1.0, 300.0), ("ncclDevKernel_AllGather", 1.0, 200.0)]
    assert found["waits_per_step"] == {"cudaEventSynchronize": 1.0}
    with pytest.raises(FileNotFoundError, match="no trace B"):
        step_trace.load(folder, "B")
    step_trace.write_step(events, folder / "step.json.gz")
    with gzip.open(folder / "step.json.gz", "rt") as source:
        assert len(json.load(source)["traceEvents"]) == 7
