# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: several engines share two cores; nothing asks a model hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # tests send functions to workers
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3-MoE whose greedy output depends on every part of its prompt."""
    from tests.tiny_models import make_qwen3_moe

    path: Path = tmp_path_factory.mktemp("models") / "tiny-qwen3-moe"
    make_qwen3_moe(path)
    return str(path)
