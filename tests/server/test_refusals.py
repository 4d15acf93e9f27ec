# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused at start: one line that says what, why and what to do, and an exit code.

And the other way round: without the flag the installed plugin changes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny_models import make_mixtral
from vllm_nanocp.config import NanoCPConfig
from vllm_nanocp.entry.engine_config import CPU_WORKER, EXECUTORS, SCHEDULER, check_flags, check_graphs, check_model
from vllm_nanocp.errors import NanoCPConfigError

from .serving import VLLM

pytestmark = pytest.mark.engine

EXIT_LIMIT_S = 200
NANOCP = ["--data-parallel-size", "2", "--enable-expert-parallel", "--nanocp"]


def assert_one_line(text: str, *parts: str) -> None:
    lines = [line for line in text.splitlines() if "nanocp:" in line]
    assert len(lines) == 1, text
    for part in parts:
        assert part in lines[0]


def parse_serve(flags: list[str], first: str = "some-model") -> Any:
    """Parse as ``vllm serve`` does; with ``serve`` as the first word it looks for a file of arguments."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args([first, *flags])


def validate_serve(flags: list[str], first: str = "some-model") -> Any:
    """Parse and validate as ``vllm serve`` does before it starts anything; the arguments it goes on with."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    args = parse_serve(flags, first)
    hook = sys.excepthook
    try:
        ServeSubcommand().validate(args)
    finally:
        sys.excepthook = hook
    return args


# -- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2"),
        (["--decode-context-parallel-size", "2"], "--decode-context-parallel-size 2"),
        (["--prefill-context-parallel-size", "2"], "--prefill-context-parallel-size 2"),
        (["--speculative-config", '{"method": "draft_model", "num_speculative_tokens": 2}'], "--speculative-config"),
        (["--spec-method", "draft_model"], "--spec-method draft_model"),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            "--kv-transfer-config",
        ),
        (["--data-parallel-external-lb"], "--data-parallel-external-lb"),
        (["--data-parallel-hybrid-lb"], "--data-parallel-hybrid-lb"),
        (["--data-parallel-rank", "1"], "--data-parallel-rank"),
        (["--data-parallel-start-rank", "1"], "--data-parallel-start-rank"),
        (["--data-parallel-size-local", "1"], "--data-parallel-size-local"),
        (["--data-parallel-backend", "ray"], "--data-parallel-backend ray"),
        (["--distributed-executor-backend", "uni"], "--distributed-executor-backend uni"),
        (["--headless"], "--headless"),
        (["--nnodes", "2"], "--nnodes 2"),
        (["--enable-dbo"], "--enable-dbo"),
        (["--enable-elastic-ep"], "--enable-elastic-ep"),
        (["--worker-cls", "some.Worker"], "--worker-cls some.Worker"),
        (["--scheduler-cls", "some.Scheduler"], "--scheduler-cls some.Scheduler"),
        (["--nanocp-config", '{"segmentsize": 5}'], "'segmentsize'"),
        (["--nanocp-config", '{"segment_size": 0}'], "segment_size"),
        (["--nanocp-config", '{"segment_size": -512}'], "-512"),
        (["--nanocp-config", '{"segment_size": 0.5}'], "0.5"),
        (["--nanocp-config", '{"max_degree": 3}'], "max_degree is 3"),
        (["--nanocp-config", "[]"], "JSON object"),
        (["--nanocp-config", '{"ranks": 3}'], "only one"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        validate_serve([*NANOCP, *flags])
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr().err, part, "; ")


@pytest.mark.parametrize("flags", [["--nanocp"], ["--nanocp", "--data-parallel-size", "1"]])
def test_one_rank(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        validate_serve(flags)
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr().err, "--data-parallel-size 2")


def test_settings_without_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        validate_serve(["--data-parallel-size", "2", "--nanocp-config", "{}"])
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr().err, "--nanocp-config", "add --nanocp")


def test_settings_that_are_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        validate_serve([*NANOCP, "--nanocp-config", "{segment_size: 5}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--nanocp-config" in error and "not JSON" in error and "Traceback" not in error


def test_what_is_accepted() -> None:
    """So that the refusals above are for their flag, not for all."""
    args = validate_serve([*NANOCP, "--nanocp-config", '{"segment_size": 512}', "--tensor-parallel-size", "2"])
    assert args.data_parallel_size == 2 and args.api_server_count is None, "vLLM starts as many API servers as ranks"
    assert args.additional_config["nanocp"]["ranks"] == 2
    assert args.additional_config["nanocp"]["segment_size"] == 512


def test_a_file_of_arguments(tmp_path: Path) -> None:
    """As vLLM's own flags: settings nested in the file, one of them given by its name, the flag taken back."""
    file = tmp_path / "serve.yaml"
    file.write_text("model: some-model\ndata-parallel-size: 2\nnanocp: true\n")
    of_file = ["--config", str(file)]
    assert validate_serve(of_file, "serve").additional_config["nanocp"]["ranks"] == 2
    assert not validate_serve([*of_file, "--no-nanocp"], "serve").additional_config
    one = validate_serve([*of_file, "--nanocp-config.segment_size", "512"], "serve")
    assert one.additional_config["nanocp"]["segment_size"] == 512
    file.write_text(file.read_text() + "nanocp-config:\n  segment_size: 256\n  moves:\n    max_moves: 3\n")
    nested = validate_serve(of_file, "serve").additional_config["nanocp"]
    assert nested["segment_size"] == 256 and nested["moves"] == {"max_moves": 3}


def test_other_additional_configuration_stays() -> None:
    args = validate_serve([*NANOCP, "--additional-config", '{"other": [1]}'])
    assert args.additional_config["other"] == [1] and args.additional_config["nanocp"]["ranks"] == 2


def test_without_the_flag_arguments_stay() -> None:
    args = validate_serve(["--data-parallel-size", "2", "--pipeline-parallel-size", "2"])
    assert args.data_parallel_size == 2 and args.pipeline_parallel_size == 2
    assert not args.additional_config


@pytest.mark.parametrize(
    ("field", "value"),
    [("pipeline_parallel_size", 2), ("speculative_config", {"method": "draft_model"}), ("data_parallel_rank", 0)],
)
def test_the_same_for_engine_arguments(field: str, value: Any, windowed_model: str) -> None:
    """``LLM(...)`` has no command line."""
    from vllm.engine.arg_utils import EngineArgs

    check_flags(EngineArgs(model=windowed_model))
    with pytest.raises(NanoCPConfigError, match="nanocp: ") as caught:
        check_flags(EngineArgs(model=windowed_model, **{field: value}))
    assert "\n" not in str(caught.value)


# -- models --------------------------------------------------------------------------------------------------------


def change_config(model: Path, **values: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return model


@pytest.fixture(scope="module")
def windowed_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mixtral whose attention sees 512 tokens. Refused before its weights are read: there are none."""
    model = make_mixtral(tmp_path_factory.mktemp("models") / "windowed")
    (model / "model.safetensors").unlink()
    return str(change_config(model, sliding_window=512))


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = make_mixtral(tmp_path_factory.mktemp("models") / "dense")
    (model / "model.safetensors").unlink()
    path = model / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"):
        del config[key]
    path.write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return str(model)


def create(model: str, max_degree: int | None = None) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_nanocp.plugin

    vllm_nanocp.plugin.register()
    settings: dict[str, Any] = {"ranks": 2, "max_degree": max_degree}
    return EngineArgs(
        model=model, dtype="float32", enforce_eager=True, max_model_len=4096, additional_config={"nanocp": settings}
    ).create_engine_config()


def test_a_model_with_a_window(windowed_model: str) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        create(windowed_model)
    assert_one_line(str(caught.value), "sliding-window", '"max_degree": 1')


def test_a_model_with_a_window_is_served_unsharded(windowed_model: str) -> None:
    """What the refusal proposes."""
    config = create(windowed_model, max_degree=1)
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == CPU_WORKER
    assert config.parallel_config.distributed_executor_backend == EXECUTORS["mp"]


@pytest.mark.parametrize("max_degree", [None, 1])
def test_a_dense_model(dense_model: str, max_degree: int | None) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        create(dense_model, max_degree)
    assert_one_line(str(caught.value), "no experts", "without --nanocp")


def fake_config(text: dict[str, Any] | None = None, cache_dtype: str = "auto", **model: Any) -> Any:
    """What ``check_model`` reads of a ``VllmConfig``, of a model that it accepts unless told otherwise."""
    fields: dict[str, Any] = dict(
        model="some-model",
        is_moe=True,
        is_encoder_decoder=False,
        use_mla=False,
        is_hybrid=False,
        is_attention_free=False,
        get_sliding_window=lambda: None,
        hf_text_config=SimpleNamespace(**(text or {})),
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **model}),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        attention_config=SimpleNamespace(backend=None, mla_prefill_backend=None, flash_attn_version=None),
    )


# What of latent attention vLLM's kernel on CPU takes.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (fake_config(is_encoder_decoder=True), "encoder-decoder"),
        (fake_config({"index_topk": 64, **LATENT}, use_mla=True), "sparse latent"),
        (fake_config({**LATENT, "kv_lora_rank": 256}, use_mla=True), "latents of 256 and rotated keys of 64"),
        (fake_config({"compress_ratios": [0, 4]}, use_mla=True), "latents of None"),
        (fake_config(LATENT, "bfloat16", use_mla=True), "--kv-cache-dtype bfloat16"),
        (fake_config(is_hybrid=True), "hybrid"),
        (fake_config(is_attention_free=True), "attention-free"),
        (fake_config({"layer_types": ["full_attention", "sliding_attention"]}), "sliding-window"),
        (fake_config({"attention_chunk_size": 8192}), "chunked attention"),
        (fake_config({"attn_logit_softcapping": 30.0}), "softcapped"),
        (fake_config({"alibi": True}), "ALiBi"),
        (fake_config(cache_dtype="int8_per_token_head"), "--kv-cache-dtype int8_per_token_head"),
    ],
)
def test_models_that_cannot_be_sharded(config: Any, part: str) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(config, NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), part)
    check_model(config, NanoCPConfig(ranks=2, max_degree=1))


def test_latent_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served on CPU, but not by AMX."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = fake_config(LATENT, use_mla=True)
    config.attention_config = SimpleNamespace(backend=None)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    check_model(config, NanoCPConfig(ranks=2))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(config, NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), "by AMX", "--attention-backend CPU_MLA")
    config.attention_config.backend = AttentionBackendEnum.CPU_MLA
    check_model(config, NanoCPConfig(ranks=2))


def test_latent_attention_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served, but not with narrower outputs than a merge can be made of, nor with other caches."""
    from vllm.platforms import current_platform

    config = fake_config(LATENT, use_mla=True)
    passes = SimpleNamespace(fuse_attn_quant=True)
    config.compilation_config = SimpleNamespace(pass_config=passes)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(config, NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), "fuse_attn_quant", "-cc.pass_config.fuse_attn_quant=false")
    passes.fuse_attn_quant = False
    check_model(config, NanoCPConfig(ranks=2))


def latent_on_a_gpu(monkeypatch: pytest.MonkeyPatch, cache_dtype: str = "auto", **attention: Any) -> Any:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    config = fake_config(LATENT, cache_dtype, use_mla=True)
    config.compilation_config = SimpleNamespace(pass_config=SimpleNamespace(fuse_attn_quant=False))
    config.model_config.dtype = torch.bfloat16
    config.cache_config.__dict__.update(user_specified_block_size=False, block_size=16)
    config.attention_config.__dict__.update(attention)
    config.speculative_config = None
    return config


def test_latent_attention_by_what_has_no_partial_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded, which the layers are asked after."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    served: list[dict[str, Any]] = [
        {"backend": AttentionBackendEnum.FLASH_ATTN_MLA, "mla_prefill_backend": MLAPrefillBackendEnum.FLASH_ATTN},
        {"flash_attn_version": 3},
    ]
    for attention in served:
        check_model(latent_on_a_gpu(monkeypatch, **attention), NanoCPConfig(ranks=2))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"backend": AttentionBackendEnum.FLASHMLA}, "--attention-backend"),
        ({"backend": AttentionBackendEnum.TRITON_MLA}, "TRITON_MLA"),
        ({"mla_prefill_backend": MLAPrefillBackendEnum.FLASHINFER}, "mla_prefill_backend"),
        ({"flash_attn_version": 2}, "flash_attn_version 2"),
    ]
    for attention, part in refused:
        config = latent_on_a_gpu(monkeypatch, **attention)
        with pytest.raises(NanoCPConfigError) as caught:
            check_model(config, NanoCPConfig(ranks=2))
        assert_one_line(str(caught.value), part, '"max_degree": 1')
        check_model(config, NanoCPConfig(ranks=2, max_degree=1))
    for drafts in (None, SimpleNamespace(method="ngram_gpu")):
        config = latent_on_a_gpu(monkeypatch)
        config.speculative_config = drafts
        for exchange in ("auto", "collective", "routed"):
            check_model(config, NanoCPConfig(ranks=2, exchange=exchange))
    for major in (8, 9, 10):
        monkeypatch.setattr(current_platform, "get_device_capability", lambda major=major: DeviceCapability(major, 0))
        if major == 9:
            check_model(latent_on_a_gpu(monkeypatch), NanoCPConfig(ranks=2))
            continue
        with pytest.raises(NanoCPConfigError) as caught:
            check_model(latent_on_a_gpu(monkeypatch), NanoCPConfig(ranks=2))
        assert_one_line(str(caught.value), f"compute capability {major}.0", '"max_degree": 1')


def test_a_checkpoint_that_asks_for_a_cache_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gave a flag that could be left out: vLLM reads the type in the model's configuration."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    quantized = SimpleNamespace(quantization_config={"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"})
    model: Any = SimpleNamespace(hf_config=quantized)
    found = resolve_kv_cache_dtype_string("auto", model)
    assert found.startswith("fp8")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(fake_config(LATENT, found, use_mla=True), NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), f"--kv-cache-dtype {found}", "checkpoint", '"max_degree": 1')
    check_model(latent_on_a_gpu(monkeypatch, found), NanoCPConfig(ranks=2))


def test_an_fp8_cache_of_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served by FLASHMLA, which vLLM takes then; what that does not take is refused before the model is loaded."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for cache_dtype in ("fp8", "fp8_e4m3"):
        for backend in (None, AttentionBackendEnum.FLASHMLA):
            config = latent_on_a_gpu(monkeypatch, cache_dtype, backend=backend)
            check_model(config, NanoCPConfig(ranks=2))
    config.cache_config.user_specified_block_size, config.cache_config.block_size = True, 64
    check_model(config, NanoCPConfig(ranks=2))
    refused: list[tuple[str, Callable[[Any], Any], str]] = [
        (
            "fp8",
            lambda c: setattr(c.attention_config, "backend", AttentionBackendEnum.FLASH_ATTN_MLA),
            "FLASH_ATTN_MLA",
        ),
        ("fp8", lambda c: setattr(c.model_config, "dtype", torch.float16), "--dtype float16"),
        ("fp8", lambda c: setattr(c.model_config.hf_text_config, "kv_lora_rank", 256), "latents of 256"),
        ("fp8", lambda c: setattr(c.cache_config, "user_specified_block_size", True), "--block-size 16"),
        ("fp8", lambda c: setattr(c.attention_config, "flash_attn_version", 4), "flash_attn_version 4"),
        ("fp8_e5m2", lambda c: None, "--kv-cache-dtype fp8_e5m2"),
        ("fp8_ds_mla", lambda c: None, "--kv-cache-dtype fp8_ds_mla"),
    ]
    for cache_dtype, change, part in refused:
        config = latent_on_a_gpu(monkeypatch, cache_dtype)
        change(config)
        with pytest.raises(NanoCPConfigError) as caught:
            check_model(config, NanoCPConfig(ranks=2))
        assert_one_line(str(caught.value), part)
        check_model(config, NanoCPConfig(ranks=2, max_degree=1))


def test_the_family_of_an_fp8_cache_of_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from vllm_nanocp.attention import families

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    for module, name in (("flashmla_backend", "LatentOfFloat8OnHopper"), ("flash_backend", "LatentOnHopper")):
        fake = SimpleNamespace(**{name: lambda _, name=name: name})
        monkeypatch.setitem(sys.modules, f"vllm_nanocp.attention.mla.{module}", fake)
    for cache_dtype, name in (("fp8", "LatentOfFloat8OnHopper"), ("auto", "LatentOnHopper")):
        config = latent_on_a_gpu(monkeypatch, cache_dtype)
        assert families.family_of(config) == name


def test_flashinfer_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served, whether it was named or vLLM would choose it: the check of its results at start decides."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    for backend, major in ((AttentionBackendEnum.FLASHINFER, 8), (AttentionBackendEnum.FLASHINFER, 9), (None, 10)):
        monkeypatch.setattr(current_platform, "get_device_capability", lambda major=major: DeviceCapability(major, 0))
        config = fake_config()
        config.attention_config.backend = backend
        check_model(config, NanoCPConfig(ranks=2))


def test_caches_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    for name in ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"):
        check_model(fake_config(cache_dtype=name), NanoCPConfig(ranks=2))
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(fake_config(cache_dtype="nvfp4"), NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), "--kv-cache-dtype nvfp4", "or use fp8")
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    for name in ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"):
        check_model(fake_config(cache_dtype=name), NanoCPConfig(ranks=2))
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(fake_config(cache_dtype="fp8_e5m2"), NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), "--kv-cache-dtype fp8_e5m2", "or use fp8")


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(NanoCPConfigError) as caught:
        check_model(fake_config(), NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), "VLLM_BATCH_INVARIANT", "unset it", '"max_degree": 1')
    check_model(fake_config(), NanoCPConfig(ranks=2, max_degree=1))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    check_model(fake_config(), NanoCPConfig(ranks=2))


def graph_config(mode: str | None, v2: bool) -> Any:
    """What ``check_graphs`` reads of a ``VllmConfig``."""
    from vllm.config import CUDAGraphMode

    mode_of = None if mode is None else CUDAGraphMode[mode]
    return SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode_of), use_v2_model_runner=v2)


@pytest.mark.parametrize(
    ("mode", "v2", "parts"),
    [
        ("PIECEWISE", False, ("V1 model runner", "--enforce-eager")),
        ("FULL_AND_PIECEWISE", False, ("V1 model runner", "--enforce-eager")),
        ("FULL", True, ("graph mode FULL", "FULL_AND_PIECEWISE")),
    ],
)
def test_graphs_that_know_no_shards(mode: str, v2: bool, parts: tuple[str, ...]) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        check_graphs(graph_config(mode, v2), NanoCPConfig(ranks=2))
    assert_one_line(str(caught.value), *parts)
    check_graphs(graph_config(mode, v2), NanoCPConfig(ranks=2, max_degree=1))


@pytest.mark.parametrize(
    ("mode", "v2"),
    [
        (None, False),
        ("NONE", False),
        ("NONE", True),
        ("PIECEWISE", True),
        ("FULL_DECODE_ONLY", True),
        ("FULL_AND_PIECEWISE", True),
    ],
)
def test_graphs_that_sharded_steps_can_leave(mode: str | None, v2: bool) -> None:
    check_graphs(graph_config(mode, v2), NanoCPConfig(ranks=2))


def test_a_model_that_can_be_sharded() -> None:
    check_model(fake_config({"layer_types": ["full_attention"]}), NanoCPConfig(ranks=2))


# -- real processes ------------------------------------------------------------------------------------------------


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=EXIT_LIMIT_S,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
        start_new_session=True,
    )


def test_serve_ends_with_one_line_for_a_flag(tmp_path: Path) -> None:
    """Before it looks at the model, which is not there."""
    done = run([*VLLM, "serve", str(tmp_path / "no-model"), *NANOCP, "--pipeline-parallel-size", "2"])
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert_one_line(output, "--pipeline-parallel-size 2")
    assert "Traceback" not in output


def test_serve_ends_with_one_line_for_a_model(windowed_model: str) -> None:
    done = run([*VLLM, "serve", windowed_model, *NANOCP, "--dtype", "float32", "--max-model-len", "4096"])
    output = done.stdout + done.stderr
    assert done.returncode not in (0, None), output
    assert done.returncode > 0, "by itself, not by a signal"
    assert_one_line(output, "sliding-window")
    assert "Traceback" not in output, output


_AS_VERSION = """
import sys
import vllm, vllm.version
vllm.__version__ = vllm.version.__version__ = sys.argv[1]
sys.argv = ["vllm", *sys.argv[2:]]
from vllm.entrypoints.cli.main import main
main()
"""


@pytest.mark.parametrize("version", ["0.34.0", "0.25.1"])
def test_another_vllm(version: str, windowed_model: str) -> None:
    done = run([sys.executable, "-c", _AS_VERSION, version, "serve", windowed_model, *NANOCP])
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert_one_line(output, f"vLLM {version} is not supported", "supported: 0.32.0, 0.33.0", "without --nanocp")
    assert "Traceback" not in output


# Everything that the package replaces, and the configuration that comes out, as a process that serves would see it.
_WHAT_IS_CHANGED = """
import json, sys
import vllm, vllm.version
if sys.argv[2]:
    vllm.__version__ = vllm.version.__version__ = sys.argv[2]
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
flags = ["--dtype", "float32", "--max-model-len", "4096", "--data-parallel-size", "2", "--enable-expert-parallel"]
args = parser.parse_args([*flags, "--model", sys.argv[1]])
config = AsyncEngineArgs.from_cli_args(args).create_engine_config()

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.v1.attention.backends.registry import AttentionBackendEnum
try:
    from vllm.v1.core import kv_cache_planning
except ImportError:  # 0.32
    from vllm.v1.core import kv_cache_utils as kv_cache_planning
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor import Executor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
parallel = config.parallel_config
print("RESULT", json.dumps({
    "flag": "--nanocp" in parser.format_help(),
    "scheduler": str(config.scheduler_config.scheduler_cls),
    "scheduler class": str(config.scheduler_config.get_scheduler_cls()),
    "worker": parallel.worker_cls,
    "executor": str(parallel.distributed_executor_backend),
    "executor class": str(Executor.get_class(config)),
    "sizes": [parallel.data_parallel_size, parallel.world_size, parallel.enable_expert_parallel],
    "additional": dict(config.additional_config),
    "attention": {name.name: name.get_path() for name in AttentionBackendEnum if name.name.startswith("CPU")},
    "functions": [
        [function.__module__, function.__qualname__, function.__code__.co_filename.rsplit("site-packages")[-1]]
        for function in (
            InputProcessor.process_inputs, EngineCore.__init__, Scheduler.schedule, GPUModelRunner.execute_model,
            kv_cache_planning._check_enough_kv_cache_memory, kv_cache_planning._auto_fit_max_model_len,
        )
    ],
    "methods": [sorted(vars(some)) for some in (InputProcessor, EngineCore, Scheduler, CpuCommunicator)],
    "modules": sorted(name for name in sys.modules if name.startswith("vllm_nanocp.")),
}, sort_keys=True))
"""


def what_is_changed(model: str, version: str, plugins: str) -> dict[str, Any]:
    done = run([sys.executable, "-c", _WHAT_IS_CHANGED, model, version], VLLM_PLUGINS=plugins)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.fixture(scope="module")
def stock_without_plugin(windowed_model: str) -> dict[str, Any]:
    return what_is_changed(windowed_model, "", "nanocp_metadata_alias")


@pytest.mark.parametrize("version", ["", "0.34.0"])
def test_without_the_flag_nothing_is_changed(
    version: str, windowed_model: str, stock_without_plugin: dict[str, Any]
) -> None:
    """The same configuration, and the same functions of vLLM, as where the plugin is not loaded."""
    stock = dict(stock_without_plugin)
    plugged = what_is_changed(windowed_model, version, "nanocp_metadata_alias,nanocp")
    # The probe tells one from the other: the flag is there with the plugin only.
    assert not stock.pop("flag") and plugged.pop("flag")
    stock.pop("modules")
    loaded = set(plugged.pop("modules"))
    assert not loaded & {
        "vllm_nanocp.entry.http_limits",
        "vllm_nanocp.executor.longest_request",
        "vllm_nanocp.entry.engine_config",
    }
    assert plugged == stock
