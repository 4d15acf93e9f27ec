# SPDX-License-Identifier: Apache-2.0
"""What the tests on GPUs share."""

from __future__ import annotations

import pytest

from tests.tiny_models import make_qwen3_moe


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-gpu"
    make_qwen3_moe(path, dtype="bfloat16", head_dim=64, hidden_size=256, num_heads=8, num_kv_heads=2)
    return str(path)
