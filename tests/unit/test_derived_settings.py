# SPDX-License-Identifier: Apache-2.0
"""The engine's configuration is stock vLLM's for as many data-parallel ranks, and refusals look at what came out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_nanocp.plugin
from vllm_nanocp.entry import engine_config, refusals
from vllm_nanocp.entry.drafters import GPU_WORKER
from vllm_nanocp.entry.refusals import FLAGS, PACED_SETTINGS, SETTINGS, SHARDED_SETTINGS, check_settings
from vllm_nanocp.errors import NanoCPConfigError

RANKS = 3
NANOCP = ["--nanocp", "--nanocp-config", '{"segment_size": 512}']
# What makes one engine of N, or is new in every configuration.
OURS = {
    "additional_config",
    "instance_id",
    "scheduler_config.scheduler_cls",
    "parallel_config.worker_cls",
    "parallel_config.distributed_executor_backend",
    "parallel_config.data_parallel_size",
    "parallel_config.data_parallel_size_local",
    "parallel_config.data_parallel_rank_local",
    "parallel_config.data_parallel_master_port",
    "parallel_config._data_parallel_master_port_list",
}


@pytest.fixture(autouse=True)
def _plugin() -> None:
    vllm_nanocp.plugin.register()


def create(model: str, *flags: str) -> Any:
    """As ``vllm serve`` and its API servers do."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    common = ["--model", model, "--dtype", "float32", "--max-model-len", "4096", "--data-parallel-size", str(RANKS)]
    args = parser.parse_args([*common, "--enable-expert-parallel", *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """All fields of a configuration and of what is in it, by path."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {path: value}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        found |= leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    return found


def differences(one: Any, two: Any) -> set[str]:
    ones, twos = leaves(one), leaves(two)
    assert ones.keys() == twos.keys()
    # Objects without an equality of their own (a model's configuration, compiled inductor passes) as they print.
    return {path for path in ones if ones[path] != twos[path] and repr(ones[path]) != repr(twos[path])}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--enforce-eager"],
        ["--tensor-parallel-size", "2"],
        ["--all2all-backend", "deepep_low_latency"],
        ["--all2all-backend", "deepep_high_throughput", "--no-async-scheduling"],
        ["--performance-mode", "throughput", "--prefill-schedule-interval", "4"],
        ["--data-parallel-address", "127.0.0.2", "--no-enable-prefix-caching"],
        ["--spec-method", "ngram", "--spec-tokens", "3"],
    ],
    ids=" ".join,
)
def test_all_else_is_as_stock_derives_it(tiny_model: str, flags: list[str]) -> None:
    stock, here = create(tiny_model, *flags), create(tiny_model, *flags, *NANOCP)
    assert stock.parallel_config.data_parallel_size == RANKS and here.parallel_config.data_parallel_size == 1
    # Speculative decoding has it once more, and names an own for drafts.
    assert {re.sub(r"^speculative_config\.(target|draft)_", "", path) for path in differences(stock, here)} <= OURS


def test_ranks_by_key(tiny_model: str) -> None:
    """``LLM`` has no data-parallel size."""
    args: dict[str, Any] = dict(model=tiny_model, dtype="float32", max_model_len=4096, enable_expert_parallel=True)
    args["all2all_backend"] = "deepep_low_latency"
    stock = EngineArgs(**args, data_parallel_size=RANKS).create_engine_config()
    here = EngineArgs(**args, additional_config={"nanocp": {"ranks": RANKS}}).create_engine_config()
    assert differences(stock, here) <= OURS
    one = EngineArgs(**args).create_engine_config()
    assert one.scheduler_config.max_num_batched_tokens != here.scheduler_config.max_num_batched_tokens


def test_engines_that_take_no_data_parallel_size(tiny_model: str) -> None:
    """``vllm bench`` makes an ``LLM`` of its arguments, which refuses one."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", tiny_model, "--data-parallel-size", str(RANKS), "--enable-expert-parallel", *NANOCP]
    engine_args = EngineArgs.from_cli_args(parser.parse_args(flags))
    for _ in range(2):  # before and after a configuration is made of them
        assert engine_args.data_parallel_size == 1 and engine_args.additional_config["nanocp"]["ranks"] == RANKS
        engine_args.create_engine_config()


@pytest.mark.parametrize("command", ["preload", "snapshot"])
def test_commands_that_prepare_for_ranks(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--data-parallel-size", "2", "--nanocp"])
    args.subparser = command
    with pytest.raises(SystemExit):
        EngineArgs.from_cli_args(args)
    assert f"nanocp: vllm {command} with --nanocp is not supported" in capsys.readouterr().err


def test_graphs_that_a_backend_forbids(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM turns CUDA graphs off for some all-to-all backends, by the data-parallel size."""
    from vllm.config import CompilationConfig

    seen = []
    derive = CompilationConfig.set_splitting_ops_for_v1

    def spy(self: Any, all2all_backend: str, data_parallel_size: int = 1) -> None:
        seen.append((all2all_backend, data_parallel_size))
        derive(self, all2all_backend, data_parallel_size)

    monkeypatch.setattr(CompilationConfig, "set_splitting_ops_for_v1", spy)
    create(tiny_model, "--all2all-backend", "deepep_high_throughput", *NANOCP)
    assert seen == [("deepep_high_throughput", RANKS)]


def test_the_front_end_finds_one_engine(tiny_model: str) -> None:
    """What vLLM asks when it starts and reaches engines."""
    here = create(tiny_model, *NANOCP)
    one = EngineArgs(model=tiny_model, dtype="float32", max_model_len=4096).create_engine_config()
    fields = [name for name in leaves(one.parallel_config) if name.startswith("data_parallel_")]
    for name in sorted({*fields} - {"data_parallel_master_port"}):
        assert getattr(here.parallel_config, name) == getattr(one.parallel_config, name), name
    assert not here.needs_dp_coordinator


# -- refusals ------------------------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(NanoCPConfigError) as caught:
        call()
    line = str(caught.value)
    assert line.startswith("nanocp: ") and "\n" not in line and " is not supported: " in line and "; " in line
    return line


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are not looked at, as if a setting came in another way."""
    monkeypatch.setattr(engine_config, "check_flags", lambda args: None)
    monkeypatch.setattr("vllm_nanocp.entry.refusals.check_flags", lambda args: None)


def speculator(folder: Path, target: str) -> str:
    """A checkpoint that names the model it drafts for."""
    layer = json.loads((Path(target) / "config.json").read_text()) | {"model_type": "llama", "num_hidden_layers": 1}
    config = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": layer["vocab_size"],
        "transformer_layer_config": layer,
        "speculators_config": {
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": target, "architectures": ["Qwen3MoeForCausalLM"]},
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--speculative-config", '{"model": "TINY", "num_speculative_tokens": 3}'], "another draft model"),
        (["--kv-offloading-size", "1"], "a KV connector"),
        (["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'], "a KV connector"),
        (["--dp-sync-interval", "4"], "--dp-sync-interval"),
        (["--runner", "pooling", "--convert", "embed", "--hf-overrides", '{"is_causal": false}'], "keeps no KV"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("degree", [1, RANKS])
@pytest.mark.usefixtures("unchecked")
def test_what_vllm_has_derived_is_refused(tiny_model: str, flags: list[str], part: str, degree: int) -> None:
    settings = ["--nanocp", "--nanocp-config", json.dumps({"max_degree": degree})]
    flags = [flag.replace("TINY", tiny_model) for flag in flags]
    assert part in refusal(lambda: create(tiny_model, *settings, *flags))


def test_a_speculators_checkpoint(tiny_model: str, tmp_path: Path) -> None:
    """No flag says so: its configuration names the model to serve, and the method."""
    model = speculator(tmp_path / "drafter", tiny_model)
    if not vllm.__version__.startswith("0.32."):
        with pytest.raises(ValueError, match="Speculators verifier must name a remote model"):
            create(model)
        pytest.skip("vLLM looks for the model to serve in its hub only")
    stock, ours = create(model), create(model, *NANOCP)
    # Placement counts on whole cached prefixes.
    assert not stock.speculative_config.disable_eagle_block_drop and ours.speculative_config.disable_eagle_block_drop
    for config in (stock, ours):
        assert config.speculative_config.method == "eagle3" and config.model_config.model == tiny_model


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            config = getattr(config, part)
        object.__setattr__(config, last, value)

    return change


def _drafts(method: str, path: str = "instance_id", value: Any = "", **others: Any) -> Callable[[Any], None]:
    """Speculative decoding by a method, and something else that is set."""

    def change(config: Any) -> None:
        of_model = dict(
            draft_sample_method="greedy",
            disable_padded_drafter_batch=False,
            parallel_drafting=False,
            use_multi_module_mtp=lambda: False,
            uses_dynamic_speculative_decoding=lambda: False,
            enable_adaptive_verification=False,
            attention_backend=None,
            kv_cache_dtype=None,
            rejection_sample_method="standard",
            draft_model_config=SimpleNamespace(max_model_len=config.model_config.max_model_len),
        )
        _set("speculative_config", SimpleNamespace(method=method, **(of_model | others)))(config)
        _set(path, value)(config)

    return change


def _latent_drafts(method: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        model = config.model_config
        latent = type("Latent", (), {"use_mla": True, "__getattr__": lambda _, name: getattr(model, name)})()
        _drafts(method, "model_config", latent, draft_model_config=latent)(config)

    return change


def _on_a_gpu(method: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        _drafts(method, "parallel_config.worker_cls", GPU_WORKER)(config)
        _set("attention_config.hisparse_config", object())(config)  # by which vLLM takes V2's

    return change


def _latent_on_a_gpu(method: str, cache_dtype: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        _latent_drafts(method)(config)
        _set("parallel_config.worker_cls", GPU_WORKER)(config)
        _set("attention_config.hisparse_config", object())(config)
        _set("cache_config.cache_dtype", cache_dtype)(config)

    return change


def _drafts_with_flashinfer(config: Any, method: str = "ngram_gpu") -> None:
    _on_a_gpu(method)(config)
    _set("attention_config.backend", AttentionBackendEnum.FLASHINFER)(config)


def _given_blocks(size: int) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        _set("cache_config.block_size", size)(config)
        _set("cache_config.user_specified_block_size", True)(config)

    return change


# For each setting, what makes it of an accepted configuration.
CHANGES: dict[str, Callable[[Any], None]] = {
    "pipeline parallelism": _set("parallel_config.pipeline_parallel_size", 2),
    "decode context parallelism": _set("parallel_config.decode_context_parallel_size", 2),
    "prefill context parallelism": _set("parallel_config.prefill_context_parallel_size", 2),
    "speculative decoding with another draft model": _drafts("draft_model"),
    "drafts that a model samples": _drafts("eagle3", draft_sample_method="probabilistic"),
    "a draft model with other batches": _drafts("eagle", disable_padded_drafter_batch=True),
    "a draft model for shorter requests": _drafts("eagle3", draft_model_config=SimpleNamespace(max_model_len=8)),
    "a draft model with attention of its own": _drafts("eagle3", kv_cache_dtype="fp8"),
    "a draft model beside recurrent states": _drafts("mtp", "lora_config", SimpleNamespace(target_modules=["q_proj"])),
    "--block-size that is no multiple of 32 on CPU": _given_blocks(48),
    "--enable-lora on CPU for experts": _set("lora_config", SimpleNamespace(target_modules=None)),
    "a draft model other than MTP layers": _latent_drafts("eagle3"),
    "a draft model with FLASHINFER": partial(_drafts_with_flashinfer, method="mtp"),
    "a draft model with --enable-prompt-embeds": _drafts("eagle", "model_config.enable_prompt_embeds", True),
    "another way to verify drafts on CPU": _drafts("ngram", rejection_sample_method="synthetic"),
    "speculative decoding on GPUs (": _drafts("ngram", "parallel_config.worker_cls", GPU_WORKER),
    "speculative decoding on GPUs with the V1": _drafts("ngram_gpu", "parallel_config.worker_cls", GPU_WORKER),
    "speculative decoding with async scheduling": _drafts("ngram", "scheduler_config.async_scheduling", True),
    "speculative decoding with the V2 model runner": _drafts("ngram", "attention_config.hisparse_config", object()),
    "the method ngram_gpu on CPU": _drafts("ngram_gpu"),
    "speculative decoding of latent attention": _latent_on_a_gpu("ngram_gpu", "fp8"),
    "speculative decoding with FLASHINFER": _drafts_with_flashinfer,
    "a KV connector": _set("kv_transfer_config", object()),
    "--ec-transfer-config": _set("ec_transfer_config", object()),
    "returning routed experts": _set("aux_output_config.enable_return_routed_experts", True),
    "a diffusion model": _set("diffusion_config", object()),
    "a model that keeps no KV": _set("model_config.multimodal_config", type("M", (), {"mm_encoder_only": True})),
    "--mm-processor-cache-type shm": _set(
        "model_config.multimodal_config", type("M", (), {"mm_processor_cache_type": "shm"})
    ),
    "an external or hybrid load balancer": _set("parallel_config.data_parallel_hybrid_lb", True),
    "--data-parallel-backend": _set("parallel_config.data_parallel_backend", "ray"),
    "--nnodes": _set("parallel_config.nnodes", 2),
    "--enable-elastic-ep": _set("parallel_config.enable_elastic_ep", True),
    "--enable-fault-tolerance": _set("parallel_config.enable_fault_tolerance", True),
    "--enable-eplb": _set("parallel_config.enable_eplb", True),
    "--enable-dbo or --ubatch-size": _set("parallel_config.ubatch_size", 2),
    "--dp-sync-interval": _set("parallel_config.dp_sync_interval", 3),
    "--numa-bind": _set("parallel_config.numa_bind", True),
    "another executor": _set("parallel_config.distributed_executor_backend", "uni"),
    "another worker class": _set("parallel_config.worker_cls", "some.Worker"),
    "another scheduler class": _set("scheduler_config.scheduler_cls", "some.Scheduler"),
    "--kv-sharing-fast-prefill": _set("cache_config.kv_sharing_fast_prefill", True),
    "--prefill-schedule-interval with prefill_gap": _set("scheduler_config.prefill_schedule_interval", 2),
    "--no-enable-chunked-prefill with prefill_gap": _set("scheduler_config.enable_chunked_prefill", False),
}


@pytest.mark.parametrize("setting", [*SETTINGS, *SHARDED_SETTINGS, *PACED_SETTINGS], ids=lambda found: found.what[:40])
def test_each_setting(tiny_model: str, setting: refusals.Setting) -> None:
    config = create(tiny_model, *NANOCP)
    check_settings(config, RANKS, paced=True)
    [change] = [change for what, change in CHANGES.items() if setting.what.startswith(what)]
    change(config)
    assert setting.what in refusal(lambda: check_settings(config, RANKS, paced=True))
    if setting in PACED_SETTINGS:
        check_settings(config, RANKS)
    elif setting in SHARDED_SETTINGS:
        check_settings(config, 1)
    else:
        refusal(lambda: check_settings(config, 1))


def test_blocks_that_vllm_has_yet_to_choose(tiny_model: str) -> None:
    """On CPU 0.33 does so after this; until then there is a size that its kernels do not take, and nobody gave it."""
    config = create(tiny_model, *NANOCP)
    for size in (16, 32, 128):
        _set("cache_config.block_size", size)(config)
        check_settings(config, RANKS)
    for size in (32, 128):
        _given_blocks(size)(config)
        check_settings(config, RANKS)


def test_drafts_on_gpus(tiny_model: str) -> None:
    """V2's runner with async scheduling, which is vLLM's default with the method ngram_gpu."""
    config = create(tiny_model, *NANOCP)
    _on_a_gpu("ngram_gpu")(config)
    _set("scheduler_config.async_scheduling", True)(config)
    check_settings(config, RANKS)


@pytest.mark.parametrize("eager", [True, False])
def test_mtp_of_latent_attention_on_gpus(tiny_model: str, eager: bool) -> None:
    """With a cache of 16 bits."""
    config = create(tiny_model, *NANOCP)
    _latent_on_a_gpu("mtp", "auto")(config)
    _set("scheduler_config.async_scheduling", True)(config)
    model = config.model_config
    made = type("Eager", (), {"enforce_eager": eager, "__getattr__": lambda _, name: getattr(model, name)})()
    _set("model_config", made)(config)
    check_settings(config, RANKS)


def test_drafts_of_latent_attention_on_cpu(tiny_model: str) -> None:
    config = create(tiny_model, *NANOCP)
    _latent_drafts("ngram")(config)
    check_settings(config, RANKS)


@pytest.mark.parametrize(
    ("major", "backend", "refused"), [(9, None, False), (10, None, True), (10, "FLASH_ATTN", False)]
)
def test_drafts_by_vllms_own_choice_of_flashinfer(
    tiny_model: str, major: int, backend: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it takes on Blackwell, if it is told nothing."""
    config = create(tiny_model, *NANOCP)
    _drafts_with_flashinfer(config)
    _set("attention_config.backend", backend and AttentionBackendEnum[backend])(config)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(major, 0))
    if refused:
        assert "--attention-backend FLASH_ATTN" in refusal(lambda: check_settings(config, RANKS))
    else:
        check_settings(config, RANKS)
    check_settings(config, 1)


def test_flags_are_vllms(tiny_model: str) -> None:
    """And their defaults are not refused."""
    from vllm.entrypoints.cli.serve import make_arg_parser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for flag in FLAGS:
        assert hasattr(args, flag.field), flag.field
    refusals.check_flags(args)
    refusals.check_flags(EngineArgs(model=tiny_model))


@pytest.mark.parametrize(
    ("name", "value"),
    [("VLLM_DP_SIZE", "2"), ("VLLM_DP_RANK", "1"), ("VLLM_DP_MASTER_IP", "10.0.0.1"), ("VLLM_DP_MASTER_PORT", "5000")],
)
def test_variables_of_processes_that_are_one_rank(
    tiny_model: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value}" in refusal(
        lambda: EngineArgs(model=tiny_model, additional_config={"nanocp": {"ranks": 2}}).create_engine_config()
    )
