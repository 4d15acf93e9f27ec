# SPDX-License-Identifier: Apache-2.0
"""Command lines as they are found in deployments: what of them changes nothing passes, and a refusal says what to do
with the rest."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.unit.test_derived_settings import (  # noqa: F401
    NANOCP,
    RANKS,
    _plugin,
    create,
    differences,
    refusal,
)
from vllm_nanocp.config import NanoCPConfig
from vllm_nanocp.entry.drafters import check_drafter
from vllm_nanocp.entry.engine_config import check_model
from vllm_nanocp.entry.machines import all_here, check_gpus
from vllm_nanocp.entry.refusals import EXECUTORS, check_flags
from vllm_nanocp.errors import NanoCPConfigError

# -- ranks on machines ---------------------------------------------------------------------------------------------

NEW_IN_EACH = {
    "instance_id",
    "parallel_config.data_parallel_master_port",
    "parallel_config._data_parallel_master_port_list",
}


@pytest.mark.parametrize(
    "flags",
    [
        ["--data-parallel-size-local", "3"],
        ["--data-parallel-size-local", "3", "--data-parallel-start-rank", "0"],
        ["--data-parallel-size-local", "3", "--data-parallel-hybrid-lb", "--data-parallel-rpc-port", "5555"],
    ],
    ids=" ".join,
)
def test_all_ranks_on_this_machine(tiny_model: str, flags: list[str]) -> None:
    """So says a template for many machines when there is one; in vLLM, too, it is the internal balancer then."""
    assert RANKS == 3
    # What each configuration draws anew, and the port that is given.
    assert differences(create(tiny_model, *NANOCP), create(tiny_model, *NANOCP, *flags)) <= (
        NEW_IN_EACH | {"parallel_config.data_parallel_rpc_port"}
    )
    stock = create(tiny_model, *flags).parallel_config
    assert not stock.data_parallel_hybrid_lb and stock.data_parallel_size_local == RANKS


@pytest.mark.parametrize(
    "given",
    [
        dict(data_parallel_size_local=2),
        dict(data_parallel_size_local=0),
        dict(data_parallel_size_local=3, data_parallel_start_rank=3),
        dict(data_parallel_size_local=3, data_parallel_rank=0),
        dict(data_parallel_size_local=3, data_parallel_external_lb=True),
        dict(data_parallel_start_rank=0),
        dict(data_parallel_hybrid_lb=True),
        dict(headless=True),
    ],
    ids=str,
)
def test_ranks_on_several_machines(given: dict[str, Any]) -> None:
    args = argparse.Namespace(**given)
    all_here(args, RANKS)
    line = refusal(lambda: check_flags(args))
    field, value = list(given.items())[-1]
    assert "--" + field.replace("_", "-") + ("" if value is True else f" {value}") in line
    assert line.endswith("ranks on several machines need --distributed-executor-backend ray")


@pytest.mark.parametrize(
    ("backend", "ranks", "workers", "count", "others", "refused"),
    [
        ("mp", 16, 1, 8, {}, True),
        ("mp", 4, 4, 8, {}, True),
        ("mp", 4, 2, 8, {}, False),
        ("ray", 16, 1, 8, {}, False),  # the other nodes' are not known here
        ("mp", 3, 1, 8, {"assigned_physical_gpu_ids": [4, 5]}, True),
        ("mp", 2, 1, 1, {"assigned_physical_gpu_ids": [0, 0]}, False),
        ("mp", 2, 1, 0, {}, False),  # not a machine that serves
    ],
)
def test_more_workers_than_gpus(
    backend: str,
    ranks: int,
    workers: int,
    count: int,
    others: dict[str, Any],
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with a command for two machines of which the flags for several are left out."""
    parallel = SimpleNamespace(
        tensor_parallel_size=workers,
        distributed_executor_backend=EXECUTORS[backend],
        **({"assigned_physical_gpu_ids": None} | others),
    )
    check_gpus(parallel, ranks)  # on CPU
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "device_count", lambda: count)
    if not refused:
        check_gpus(parallel, ranks)
        return
    line = refusal(lambda: check_gpus(parallel, ranks))
    assert f"{ranks} ranks of {workers} workers each on " in line and "--distributed-executor-backend ray" in line
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    check_gpus(parallel, ranks)


# -- drafters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [dict(speculative_config={"method": "medusa"}), dict(spec_method="medusa")], ids=str)
def test_the_method_is_named_by_flags(given: dict[str, Any]) -> None:
    assert "medusa is not supported: " in refusal(lambda: check_flags(SimpleNamespace(**given)))


def test_the_method_is_named_that_vllm_finds(tiny_model: str) -> None:
    flags = ["--speculative-config", json.dumps({"model": tiny_model, "num_speculative_tokens": 3})]
    assert "by the method draft_model is not supported: " in refusal(lambda: create(tiny_model, *NANOCP, *flags))


@pytest.mark.parametrize(
    ("drafts", "named", "said"),
    [
        (
            '{"method": "eagle", "model": "TINY", "num_speculative_tokens": 3}',
            "the method eagle and the model ",
            "Model architectures ['EagleQwen3MoeForCausalLM'] are not supported for now; name",
        ),
        (
            '{"method": "ngram", "num_speculative_tokens": 0}',
            "the method ngram is",
            "num_speculative_tokens: Input should be greater than 0; give it",
        ),
        ('{"method": "ngram", "num_tokens": 2}', "the method ngram is", "num_tokens: Unexpected keyword argument;"),
        ('{"method": "mtp", "num_speculative_tokens": 1}', "the method mtp is", "speculative method: 'mtp'"),
        (
            '{"method": "eagle3", "model": "/no/such/head", "num_speculative_tokens": 1}',
            "the model /no/such/head is",
            "local directory specified: '/no/such/head'",
        ),
    ],
    ids=["no head", "no count", "no such key", "no layers", "no such folder"],
)
def test_drafters_that_vllm_does_not_take(tiny_model: str, drafts: str, named: str, said: str) -> None:
    """In vLLM's words, but in one line."""
    flags = ["--speculative-config", drafts.replace("TINY", tiny_model)]
    line = refusal(lambda: create(tiny_model, *NANOCP, *flags))
    assert named in line and said in line and len(line) < 700


def test_a_drafter_without_its_package(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: False)
    line = refusal(lambda: create(tiny_model, *NANOCP, "--spec-method", "suffix", "--spec-tokens", "3"))
    assert "the method suffix is" in line and "is required for suffix decoding" in line and "; give it what" in line


def test_drafters_of_other_flags(tiny_model: str) -> None:
    flags = ["--spec-method", "eagle", "--spec-model", tiny_model, "--spec-tokens", "3"]
    assert f"the method eagle and the model {tiny_model} is" in refusal(lambda: create(tiny_model, *NANOCP, *flags))


def test_other_errors_stay_vllms(tiny_model: str) -> None:
    with pytest.raises(ValueError, match="max_model_len") as caught:
        create(tiny_model, *NANOCP, "--max-model-len", "1000000")
    assert not isinstance(caught.value, NanoCPConfigError)
    check_drafter(SimpleNamespace(speculative_config=None, spec_method=None, spec_model=None), caught.value)


# -- models --------------------------------------------------------------------------------------------------------


def model_config(window: int | None, **text: Any) -> Any:
    """What is read before a model is loaded, of one with grouped-query attention and experts."""
    fields = dict.fromkeys(("is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free"), False)
    model = SimpleNamespace(
        model="some-model",
        is_moe=True,
        get_sliding_window=lambda: window,
        hf_text_config=SimpleNamespace(**text),
        **fields,
    )
    attention = SimpleNamespace(backend=None, flash_attn_version=None)
    cache = SimpleNamespace(cache_dtype="auto")
    return SimpleNamespace(model_config=model, cache_config=cache, attention_config=attention)


FULL, WINDOWED = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("window", "kinds"), [(None, [FULL]), (None, None), (512, [FULL, FULL])], ids=["none", "unnamed", "unused"]
)
def test_windows_that_no_layer_has(window: int | None, kinds: list[str] | None) -> None:
    """As the configuration of Laguna M.1: all layers attend to everything, and still there is a width. The layers are
    asked once they are loaded (``test_supported.py``)."""
    check_model(model_config(window, layer_types=kinds), NanoCPConfig(ranks=2))


@pytest.mark.parametrize(
    ("window", "text", "what", "instead"),
    [
        (4096, {}, "sliding-window attention", "--disable-sliding-window, with which no request is longer than 4096"),
        (4096, {"layer_types": None}, "sliding-window attention", "add --disable-sliding-window"),
        (128, {"layer_types": [WINDOWED, FULL]}, "sliding-window attention", ""),
        (None, {"layer_types": [WINDOWED]}, "sliding-window attention", ""),
        (None, {"attention_chunk_size": 8192}, "chunked attention", ""),
    ],
)
def test_windows_that_layers_have(window: int | None, text: dict[str, Any], what: str, instead: str) -> None:
    line = refusal(lambda: check_model(model_config(window, **text), NanoCPConfig(ranks=2)))
    assert line.startswith(f"nanocp: {what} with max_degree above 1") and '"max_degree": 1' in line
    assert instead in line and ("--disable-sliding-window" in line) == bool(instead)


ON_HOPPER = "leave --attention-backend out on a Hopper GPU, use --attention-backend FLASHINFER, or "


@pytest.mark.parametrize(
    ("major", "backend", "version", "parts"),
    [
        (9, None, None, ()),
        (9, "FLASH_ATTN", 3, ()),
        (None, None, None, ()),
        (8, "FLASHINFER", None, ()),
        (10, None, None, ()),  # where vLLM takes FlashInfer
        (9, "TRITON_ATTN", None, ("attention by TRITON_ATTN with", ON_HOPPER)),
        (9, "FLEX_ATTENTION", None, ("attention by FLEX_ATTENTION with", ON_HOPPER)),
        (9, None, 2, ("attention with flash_attn_version 2 with", "; leave it out of --attention-config, use ")),
        (8, None, None, ("FLASH_ATTN on GPUs of compute capability 8.0", "; use --attention-backend FLASHINFER, or ")),
        (10, "FLASH_ATTN", None, ("compute capability 10.0", "; use --attention-backend FLASHINFER, or ")),
        (12, None, None, ("compute capability 12.0", "; use --attention-backend FLASHINFER, or ")),
    ],
)
def test_backends_without_partial_results(
    major: int | None, backend: str | None, version: int | None, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs, before a model is loaded for minutes."""
    capability = None if major is None else DeviceCapability(major, 0)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: capability)
    config = model_config(None)
    config.attention_config.backend = backend and AttentionBackendEnum[backend]
    config.attention_config.flash_attn_version = version
    check_model(config, NanoCPConfig(ranks=2, max_degree=1))
    if not parts:
        check_model(config, NanoCPConfig(ranks=2))
        return
    line = refusal(lambda: check_model(config, NanoCPConfig(ranks=2)))
    assert all(part in line for part in parts) and line.endswith("no sharding")
