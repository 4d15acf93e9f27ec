# SPDX-License-Identifier: Apache-2.0
"""What the tests on GPUs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_models import make_deepseek_v2, make_qwen3_moe

from . import GPUS, SHARED

MOST_RANKS = 8


@pytest.fixture(scope="session", autouse=True)
def shared_gpus() -> Iterator[None]:
    """Where ranks share GPUs: engines are told which, since ``--device-ids`` takes no number twice."""
    with pytest.MonkeyPatch.context() as patch:
        if SHARED:
            from vllm.engine.arg_utils import EngineArgs

            patch.setattr(EngineArgs, "_resolve_device_ids", lambda args: [i % GPUS for i in range(MOST_RANKS)])
            patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-gpu"
    make_qwen3_moe(path, dtype="bfloat16", head_dim=64, hidden_size=256, num_heads=8, num_kv_heads=2)
    return str(path)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-deepseek"
    sizes = dict(hidden_size=256, num_heads=16, qk_nope_head_dim=128, v_head_dim=128)
    return str(make_deepseek_v2(path, dtype="bfloat16", **sizes))
