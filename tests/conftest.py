# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: several engines share two cores; nothing asks a model hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.deepseek_reference import DeepseekReference

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    OMP_NUM_THREADS="1",
    NUMBA_NUM_THREADS="1",  # its threads spin between the searches of n-grams
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


@pytest.fixture(scope="session")
def tiny_eagle3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random EAGLE3 head for `tiny_model`."""
    from tests.tiny_drafts import make_eagle3

    return str(make_eagle3(tmp_path_factory.mktemp("models") / "tiny-eagle3"))


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random DeepSeek-V2 (multi-head latent attention, queries of a low rank), of the same kind."""
    from tests.tiny_models import make_deepseek_v2

    return str(make_deepseek_v2(tmp_path_factory.mktemp("models") / "tiny-deepseek-v2", q_lora_rank=96))


@pytest.fixture(scope="session")
def deepseek_reference(tiny_deepseek: str) -> DeepseekReference:
    """`tiny_deepseek` in float64."""
    from tests.deepseek_reference import DeepseekReference

    return DeepseekReference(tiny_deepseek)
