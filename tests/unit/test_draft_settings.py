# SPDX-License-Identifier: Apache-2.0
"""What of draft models is refused at start, beyond one case of each setting (``test_derived_settings.py``)."""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest

pytest.importorskip("vllm")

from vllm.config.speculative import MTPModelTypes
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.unit.test_derived_settings import (  # noqa: F401
    NANOCP,
    RANKS,
    _drafts,
    _drafts_with_flashinfer,
    _latent_drafts,
    _latent_on_a_gpu,
    _plugin,
    _set,
    create,
    refusal,
)
from vllm_nanocp.entry.drafters import GPU_WORKER
from vllm_nanocp.entry.refusals import check_flags, check_settings
from vllm_nanocp.errors import NanoCPConfigError


@pytest.mark.parametrize(
    "kind",
    [
        dict(parallel_drafting=True),
        dict(use_multi_module_mtp=lambda: True),
        dict(disable_padded_drafter_batch=True),
        dict(enable_adaptive_verification=True),
        dict(uses_dynamic_speculative_decoding=lambda: True),
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_draft_models_with_batches_of_their_own(tiny_model: str, kind: dict[str, Any]) -> None:
    config = create(tiny_model, *NANOCP)
    _drafts("mtp")(config)
    check_settings(config, RANKS)
    _drafts("mtp", **kind)(config)
    assert "a draft model with other batches" in refusal(lambda: check_settings(config, RANKS))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lora_config", SimpleNamespace(target_modules=["q_proj"])),
        ("model_config.multimodal_config", object()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_draft_models_beside_what_none_was_run_with(tiny_model: str, path: str, value: Any) -> None:
    config = create(tiny_model, *NANOCP)
    _drafts("ngram", path, value)(config)
    if path == "lora_config":
        check_settings(config, RANKS)
    _drafts("mtp")(config)
    assert "a draft model beside" in refusal(lambda: check_settings(config, RANKS))


@pytest.mark.parametrize(
    ("modules", "served"),
    [
        (None, False),
        (["experts"], False),
        (["q_proj", "model.layers.0.mlp.experts"], False),
        (["q_proj", "o_proj"], True),
    ],
)
def test_adapters_of_experts(tiny_model: str, modules: list[str] | None, served: bool) -> None:
    """On CPU vLLM ends at start where it would prepare experts for adapters."""
    config = create(tiny_model, *NANOCP)
    _set("lora_config", SimpleNamespace(target_modules=modules))(config)
    if served:
        check_settings(config, RANKS)
        return
    assert "--lora-target-modules" in refusal(lambda: check_settings(config, RANKS))
    _set("parallel_config.worker_cls", GPU_WORKER)(config)
    check_settings(config, RANKS)


def test_draft_models_that_attend_otherwise(tiny_model: str) -> None:
    """What says the same as the target's flags is no other attention."""
    config = create(tiny_model, "--kv-cache-dtype", "fp8", "--attention-backend", "CPU_ATTN", *NANOCP)
    same = dict(kv_cache_dtype="fp8", attention_backend=AttentionBackendEnum.CPU_ATTN)
    _drafts("eagle3", **same)(config)
    check_settings(config, RANKS)
    for other in (dict(kv_cache_dtype="auto"), dict(attention_backend=AttentionBackendEnum.TORCH_SDPA)):
        _drafts("eagle3", **(same | other))(config)
        assert "attention of its own" in refusal(lambda: check_settings(config, RANKS))


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_draft_models_on_gpus(tiny_model: str, method: str) -> None:
    """With V2's runner, vLLM's default there, eager and with graphs."""
    config = create(tiny_model, "--enforce-eager", *NANOCP)
    _drafts(method, "parallel_config.worker_cls", GPU_WORKER)(config)
    assert "on GPUs with the V1" in refusal(lambda: check_settings(config, RANKS))
    _set("scheduler_config.async_scheduling", True)(config)
    _set("attention_config.hisparse_config", object())(config)  # by which vLLM takes V2's
    check_settings(config, RANKS)
    _set("model_config.enforce_eager", False)(config)
    for degree in (1, RANKS):
        check_settings(config, degree)
    _drafts("ngram_gpu")(config)
    check_settings(config, RANKS)


def test_draft_models_with_flashinfer(tiny_model: str) -> None:
    """On one rank, too, where n-grams are as in vLLM."""
    config = create(tiny_model, "--enforce-eager", *NANOCP)
    for method in ("eagle", "eagle3", "mtp"):
        _drafts_with_flashinfer(config, method)
        for degree in (1, RANKS):
            assert "a draft model with FLASHINFER" in refusal(partial(check_settings, config, degree))
    _drafts_with_flashinfer(config)
    _set("scheduler_config.async_scheduling", True)(config)
    check_settings(config, 1)


def test_drafts_of_latent_attention(tiny_model: str) -> None:
    """MTP layers, if they attend as their target; on GPUs n-grams, too, with a cache of 16 bits."""
    config = create(tiny_model, *NANOCP)
    _latent_drafts("mtp")(config)
    check_settings(config, RANKS)
    heads = SimpleNamespace(use_mla=False, max_model_len=config.model_config.max_model_len)
    _set("speculative_config.draft_model_config", heads)(config)
    assert "other than MTP layers" in refusal(lambda: check_settings(config, RANKS))
    config = create(tiny_model, "--enforce-eager", *NANOCP)
    _set("scheduler_config.async_scheduling", True)(config)
    _latent_on_a_gpu("ngram_gpu", "auto")(config)
    check_settings(config, RANKS)
    _latent_on_a_gpu("ngram_gpu", "fp8")(config)
    check_settings(config, 1)
    assert "with an fp8 cache and max_degree above 1" in refusal(lambda: check_settings(config, RANKS))


METHODS = re.compile(r"\b(ngram_gpu|ngram|suffix|custom_class|eagle3|eagle|mtp)\b")


@pytest.mark.parametrize("on_gpus", [False, True], ids=["cpu", "gpus"])
def test_mtp_by_its_older_names(on_gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which vLLM turns into the one it has now, after the flags were looked at."""
    monkeypatch.setattr(current_platform, "is_cpu", lambda: not on_gpus)
    names = get_args(MTPModelTypes)
    assert {"mtp", "deepseek_mtp", "glm4_moe_mtp"} <= set(names)
    for name in names:
        check_flags(SimpleNamespace(speculative_config={"method": name, "num_speculative_tokens": 1}))
        check_flags(SimpleNamespace(spec_method=name))
    for other in ("medusa", "deepseek", "draft_model"):
        for given in ({"speculative_config": {"method": other}}, {"spec_method": other}):
            with pytest.raises(NanoCPConfigError, match="of the ways to draft with a model only"):
                check_flags(SimpleNamespace(**given))


def advised(line: str, on_gpus: bool, latent: bool) -> set[str]:
    """The methods that a refusal names as a way out: before the first platform, between two of them, for all."""
    advice = line.partition(" is not supported: ")[2].partition("; ")[2]
    general, _, grouped = advice.partition("beside grouped-query attention")
    *named, rest = re.split(r"( on CPU| on GPUs)", general)
    texts = [text for text, where in zip(named[::2], named[1::2], strict=True) if (where == " on GPUs") == on_gpus]
    return {method for text in (*texts, rest, "" if latent else grouped) for method in METHODS.findall(text)}


@pytest.mark.parametrize("latent", [False, True], ids=["grouped", "latent"])
@pytest.mark.parametrize("on_gpus", [False, True], ids=["cpu", "gpus"])
def test_what_is_advised_is_served(tiny_model: str, on_gpus: bool, latent: bool) -> None:
    """Whatever method is refused, those that the line names pass; on one rank as on many."""
    config = create(tiny_model, *NANOCP)
    model, named = config.model_config, 0

    def check(method: str, degree: int, eager: bool) -> None:
        _set("model_config", model)(config)
        _set("model_config.enforce_eager", eager)(config)
        (_latent_drafts if latent else _drafts)(method)(config)
        if on_gpus:
            _set("parallel_config.worker_cls", GPU_WORKER)(config)
            _set("scheduler_config.async_scheduling", True)(config)
            _set("attention_config.hisparse_config", object())(config)  # by which vLLM takes V2's runner
        check_settings(config, degree)

    tried = ["medusa", "ngram", "suffix", "custom_class", "ngram_gpu", "eagle", "eagle3", "mtp"]
    for method, degree, eager in product(tried, (1, RANKS), (False, True)):
        try:
            check(method, degree, eager)
        except NanoCPConfigError as error:
            ways = advised(str(error), on_gpus, latent)
            assert ways, error
            named += len(ways)
            for way in ways:
                check(way, degree, eager or "--enforce-eager" in str(error))
    assert named > 4
