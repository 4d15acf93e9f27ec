# SPDX-License-Identifier: Apache-2.0
"""`cpu_mla_chunks`: which settings a configuration of a model with latent attention ends up with on CPU."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_nanocp.patches import Outcome, PatchError, cpu_mla_chunks

pytest.importorskip("vllm")

CHUNKED = dict(enable_chunked_prefill=True, enable_prefix_caching=True, max_num_batched_tokens=128)
WHOLE = dict(enable_chunked_prefill=False, enable_prefix_caching=False, max_num_batched_tokens=8192)


@pytest.fixture
def platform(on_cpu: None, stock: Any) -> Any:
    from vllm.platforms.cpu import CpuPlatform

    return stock(CpuPlatform, "check_and_update_config")


class _Hashed:
    """``additional_config`` of somebody else, which vLLM allows to be any object with this method."""

    def compute_hash(self) -> str:
        return "other"


def _made(model: str, **given: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    backend = {"backend": "CPU_MLA"}
    args = EngineArgs(model=model, dtype="float32", max_model_len=8192, attention_config=backend, **given)
    return args.create_engine_config()


def _settings(made: Any) -> dict[str, Any]:
    scheduler = made.scheduler_config
    return dict(
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        enable_prefix_caching=made.cache_config.enable_prefix_caching,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )


def test_upstream_turns_them_off(platform: Any, tiny_deepseek: str) -> None:
    """The defect; if this fails, the patch may go."""
    assert _settings(_made(tiny_deepseek, **CHUNKED)) == WHOLE


@pytest.mark.parametrize("given", [CHUNKED, WHOLE, {**CHUNKED, "enable_prefix_caching": False}])
def test_settings_stay(
    platform: Any, tiny_deepseek: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_mla_chunks, "_KEY", "kept")
    assert cpu_mla_chunks.apply() is Outcome.APPLIED
    assert cpu_mla_chunks.apply() is Outcome.APPLIED
    made = _made(tiny_deepseek, **given, additional_config={"kept": {}})
    assert _settings(made) == given and made.cache_config.block_size == 16
    made.__post_init__()  # as the engine does once it runs
    assert _settings(made) == given


def test_others_are_as_upstream_makes_them(platform: Any, tiny_deepseek: str, tiny_model: str) -> None:
    plain = _settings(_made(tiny_model, **CHUNKED))
    cpu_mla_chunks.apply()
    assert _settings(_made(tiny_deepseek, **CHUNKED)) == WHOLE
    assert _settings(_made(tiny_deepseek, **CHUNKED, additional_config={"other": 1})) == WHOLE
    assert _settings(_made(tiny_deepseek, **CHUNKED, additional_config=_Hashed())) == WHOLE
    assert _settings(_made(tiny_model, **CHUNKED)) == plain == CHUNKED


def test_sparse_attention_is_as_upstream_makes_it(
    platform: Any, tiny_deepseek: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backends are not the one that was found to serve both."""
    monkeypatch.setattr(cpu_mla_chunks, "_KEY", "kept")
    cpu_mla_chunks.apply()
    sparse = {"index_topk": 64}
    assert _settings(_made(tiny_deepseek, **CHUNKED, hf_overrides=sparse, additional_config={"kept": {}})) == WHOLE


def test_this_package_applies_it(platform: Any, tiny_deepseek: str) -> None:
    import vllm_nanocp.plugin

    vllm_nanocp.plugin.register()
    nanocp = {"nanocp": {"ranks": 2, "max_degree": 1}}
    made = _made(tiny_deepseek, **CHUNKED, enable_expert_parallel=True, additional_config=nanocp)
    assert _settings(made) == CHUNKED
    made.__post_init__()
    assert _settings(made) == CHUNKED


def test_refuses_an_unknown_upstream(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(cls: Any, vllm_config: Any) -> None:
        """Another body."""

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(other))
    with pytest.raises(PatchError, match="cpu_mla_chunks"):
        cpu_mla_chunks.apply()
