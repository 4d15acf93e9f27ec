# SPDX-License-Identifier: Apache-2.0
"""What of a model's attention can be cut into shards, asked of vLLM's own layers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from tests.tiny_models import make_granite_moe, make_qwen3_moe
from tests.unit import flash_steps
from tests.unit.attention_steps import Shape
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.families import family_of
from vllm_nanocp.attention.gqa.flash_backend import (
    GroupedQueryOnHopper,
    NanoCPFlashAttentionBackend,
    NanoCPFlashAttentionImpl,
)
from vllm_nanocp.attention.supported import FEATURES, KNOWN, LAYER_FEATURES, check_layers
from vllm_nanocp.config import NanoCPConfig
from vllm_nanocp.entry.engine_config import check_model
from vllm_nanocp.errors import NanoCPConfigError

# -- vLLM's layers on CPU, built by vLLM ------------------------------------------------------------------------


def _engine_config(model: str, **args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = dict(dtype="float32", enforce_eager=True, max_model_len=1024)
    return EngineArgs(model=model, **{**defaults, **args}).create_engine_config()


def _refusal(config: Any, build: Any) -> str:
    """What is said of the layers that ``build`` makes; "" when they are accepted."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
        build()
    try:
        check_layers(config.compilation_config.static_forward_context, family_of(config))
    except NanoCPConfigError as error:
        return str(error)
    return ""


def _layers(config: Any) -> dict[str, Any]:
    """Builders of attention that vLLM has, by name."""
    from vllm.config import CacheConfig
    from vllm.model_executor.layers import attention as kinds
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    def plain(name: str = "l.0", size: int = 64, heads: int = 4, **args: Any) -> Any:
        return kinds.Attention(heads, size, 0.1, num_kv_heads=2, prefix=name, **args)

    def of_kind(kind: str, **args: Any) -> Any:
        return lambda: getattr(kinds, kind)(
            num_heads=4, head_size=64, scale=0.1, cache_config=config.cache_config, prefix="l.0", **args
        )

    def scaled() -> None:
        plain()._k_scale = torch.ones(2)

    def with_unknown() -> None:
        plain().impl.some_new_feature = 3.0

    def with_empty_unknown() -> None:
        plain().impl.some_new_feature = None

    def with_other_impl() -> None:
        layer = plain()
        layer.impl.__class__ = type("Sub", (type(layer.impl),), {})

    def skipping(*layers: str) -> Any:
        return CacheConfig(cache_dtype="fp8", kv_cache_dtype_skip_layers=list(layers))

    return {
        "plain": plain,
        "several": lambda: (plain(), plain("l.1"), plain("l.2")),
        "fp8": lambda: plain(cache_config=skipping()),
        "sinks": lambda: (plain(), plain("l.1", sinks=torch.nn.Parameter(torch.zeros(4)))),
        "window": lambda: (plain(), plain("l.1", per_layer_sliding_window=128), plain("l.2")),
        "soft cap": lambda: plain(logits_soft_cap=30.0),
        "alibi": lambda: plain(alibi_slopes=[0.5, 0.25, 0.125, 0.1]),
        "encoder": lambda: plain(attn_type=AttentionType.ENCODER_ONLY),
        "shared KV": lambda: (plain(), plain("l.1", kv_sharing_target_layer_name="l.0")),
        "values": lambda: plain(head_size_v=32),
        "backend": lambda: plain(attn_backend=CPUAttentionBackend),
        "head sizes": lambda: (plain(), plain("l.1", size=128)),
        "heads": lambda: (plain(), plain("l.1", heads=8)),
        "chunks": of_kind("ChunkedLocalAttention", attention_chunk_size=128),
        "encoder layer": of_kind("EncoderOnlyAttention"),
        "prefix LM": of_kind("PrefillPrefixLMAttention"),
        "reference window": of_kind("RSWAAttention", rswa_window=128),
        "two dtypes": lambda: (plain(cache_config=skipping("1")), plain("l.1", cache_config=skipping("1"))),
        "cache dtype": lambda: setattr(plain(), "kv_cache_dtype", "int8_per_token_head"),
        "scales of heads": scaled,
        "other class": lambda: setattr(plain(), "__class__", type("Sub", (Attention,), {})),
        "other impl": with_other_impl,
        "unknown feature": with_unknown,
        "unknown but empty": with_empty_unknown,
        "nothing": lambda: None,
    }


# What is said of each; "": accepted.
LAYERS = {
    "plain": "",
    "several": "",
    "fp8": "",
    "unknown but empty": "",
    "sinks": "attention sinks (l.1) with max_degree above 1",
    "window": "sliding-window attention (l.1)",
    "soft cap": "softcapped attention (l.0)",
    "alibi": "ALiBi attention (l.0)",
    "encoder": "no decoder's (l.0)",
    "shared KV": "KV that layers share (l.1)",
    "values": "values are not as long as its keys",
    "backend": "the attention backend CPUAttentionBackend",
    "head sizes": "(4, 2, 64), (4, 2, 128)",
    "heads": "(4, 2, 64), (8, 2, 64)",
    "chunks": "of the kind ChunkedLocalAttention",
    "encoder layer": "of the kind EncoderOnlyAttention",
    "prefix LM": "of the kind PrefillPrefixLMAttention",
    "reference window": "of the kind RSWAAttention",
    "two dtypes": "KV caches of several types (auto, fp8)",
    "cache dtype": "a KV cache of int8_per_token_head",
    "scales of heads": "KV scales of each head",
    "other class": "of the kind Sub",
    "other impl": "the attention backend",
    "unknown feature": "attention with 'some_new_feature'",
    "nothing": "without attention layers",
}
# Models, and what is said of them. None of their names for it is looked at before they are loaded.
MODELS = {
    "granite": "",
    "sinks": "attention sinks (model.layers.0.self_attn.attn and 1 more)",
    "window": "sliding-window attention (model.layers.0.self_attn.attn and 1 more)",
    "some windows": "sliding-window attention (model.layers.0.self_attn.attn)",
    "some windows in one cache": "sliding-window attention (model.layers.0.self_attn.attn)",
}


def _judge(rank: int, size: int, models: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """In a process of its own: what is said of each kind of attention and of each model."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    path = "vllm_nanocp.attention.gqa.cpu_backend.NanoCPCPUAttentionBackend"
    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    found: dict[str, str] = {}
    for name, (model, args) in models.items():
        config = _engine_config(model, **args)
        check_model(config, NanoCPConfig(ranks=2))  # the names in its configuration say nothing
        if not found:
            with set_current_vllm_config(config):
                init_distributed_environment(1, 0, "env://", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            found = {kind: _refusal(config, build) for kind, build in _layers(config).items()}
        found[f"model: {name}"] = _refusal(config, lambda config=config: initialize_model(config))
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    layers = dict(num_layers=2)
    granite = str(make_granite_moe(folder / "granite", **layers))
    sinks = str(make_granite_moe(folder / "sinks", sinks=True, **layers))
    pangu: dict[str, str] = {}
    for name, window in (("all", 64), ("some", [64, None])):
        path: Path = make_qwen3_moe(folder / f"pangu-{name}", **layers)
        config = json.loads((path / "config.json").read_text())
        extra = {"architectures": ["PanguProMoEV2ForCausalLM"], "interleaved_sliding_window": window}
        (path / "config.json").write_text(json.dumps(config | PANGU | extra))
        pangu[name] = str(path)
    models = {
        "granite": (granite, {}),
        "sinks": (sinks, {}),
        "window": (pangu["all"], {}),
        "some windows": (pangu["some"], {}),
        "some windows in one cache": (pangu["some"], {"disable_hybrid_kv_cache_manager": True}),
    }
    (found,) = run_ranks(1, _judge, models)
    assert set(found) == set(LAYERS) | {f"model: {name}" for name in MODELS}
    return found


PANGU = {"n_routed_experts": 8, "n_shared_experts": None, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_attention(kind: str, said: dict[str, str]) -> None:
    _check(said[kind], LAYERS[kind])


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, said: dict[str, str]) -> None:
    _check(said[f"model: {name}"], MODELS[name])


def _check(found: str, expected: str) -> None:
    if not expected:
        assert not found
    else:
        assert expected in found and found.startswith("nanocp: ") and "\n" not in found
        assert '"max_degree": 1' in found


# -- FlashAttention's layers, whose attributes are read as they are -------------------------------------------------


def flash_layer(impl: dict[str, Any] | None = None, **layer: Any) -> Attention:
    made = object.__new__(Attention)
    one = torch.ones(())
    values: dict[str, Any] = dict(
        attn_backend=NanoCPFlashAttentionBackend,
        impl=flash_steps.make_impl(Shape(8, 2, 64, torch.bfloat16, 16)),
        head_size=64,
        head_size_v=64,
        kv_cache_dtype="auto",
        sliding_window=None,
        has_sink=False,
        use_alibi_sqrt=False,
        use_mm_prefix=False,
        mm_prefix_clamp_sliding_window=False,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        _q_scale=one,
        _k_scale=one,
        _v_scale=one,
    )
    made.__dict__.update({**values, **layer})
    made.impl.__dict__.update(impl or {})
    return made


def test_flashinfer_as_vllm_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attributes that its own ``__init__`` sets, on a Hopper GPU that may download."""
    from tests.unit import flashinfer_steps
    from vllm_nanocp.attention.gqa.flashinfer_backend import (
        GroupedQueryWithFlashInfer,
        NanoCPFlashInferBackend,
        NanoCPFlashInferImpl,
    )

    stock = flashinfer_steps.stock
    monkeypatch.setattr(stock, "can_use_trtllm_attention", lambda *_, **__: True)
    # With the engine's configuration it sets more. This is what it takes of it; memory is not that of a GPU.
    engine = SimpleNamespace(
        attention_config=SimpleNamespace(disable_flashinfer_q_quantization=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    monkeypatch.setattr(stock, "get_current_vllm_config_or_none", lambda: engine)
    for name in ("get_device_sm_count", "get_trtllm_gen_multi_ctas_kv_counter_bytes"):  # of 0.33, as the next
        monkeypatch.setattr(stock, name, lambda *_: 8, raising=False)
    monkeypatch.setattr(stock, "_get_multi_ctas_kv_counter_buffer", lambda size, _: torch.zeros(size), raising=False)

    def judge(scale: float = 0.1, **args: Any) -> None:
        made: dict[str, Any] = dict(num_heads=8, head_size=64, scale=0.1, num_kv_heads=2, alibi_slopes=None)
        made |= {"sliding_window": None, "kv_cache_dtype": "auto", **args}
        layers = {name: flash_layer(attn_backend=NanoCPFlashInferBackend) for name in "lm"}
        layers["l"].impl = NanoCPFlashInferImpl(**made)
        layers["m"].impl = NanoCPFlashInferImpl(**made | {"scale": scale})
        sizes = dict(get_num_attention_heads=lambda _: 8, get_num_kv_heads=lambda _: 2, get_head_size=lambda: 64)
        model = SimpleNamespace(dtype=torch.bfloat16, **sizes)
        config = SimpleNamespace(model_config=model, parallel_config=None, cache_config=None, num_speculative_tokens=0)
        family = GroupedQueryWithFlashInfer(config)
        family.attach(check_layers(layers, family))

    judge()
    judge(kv_cache_dtype="fp8")
    for args in (dict(sliding_window=128), dict(logits_soft_cap=30.0), dict(alibi_slopes=[0.5] * 8), dict(scale=0.2)):
        with pytest.raises(NanoCPConfigError):
            judge(**args)


def test_a_cache_without_attention_beside_latent_attention() -> None:
    """An indexer's keys come before the layer that uses them. They have no implementation to ask."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache

    from vllm_nanocp.attention.mla.cpu_backend import LatentOnCPU

    cache = object.__new__(DeepseekV32IndexerCache)
    torch.nn.Module.__init__(cache)
    with pytest.raises(NanoCPConfigError, match="of the kind DeepseekV32IndexerCache"):
        check_layers({"indexer": cache}, LatentOnCPU())


def judge_flash(layer: Any, shape: tuple[int, int, int] = (8, 2, 64)) -> None:
    experts = SimpleNamespace()  # the forward context knows these too
    heads, kv_heads, size = shape
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        get_num_attention_heads=lambda _: heads,
        get_num_kv_heads=lambda _: kv_heads,
        get_head_size=lambda: size,
    )
    family = GroupedQueryOnHopper(SimpleNamespace(model_config=model, parallel_config=None))
    check_layers({"experts": experts, "l": layer}, family)


def test_flash_attention_without_features() -> None:
    judge_flash(flash_layer())
    judge_flash(flash_layer(kv_cache_dtype="fp8"))
    judge_flash(flash_layer({"batch_invariant_enabled": True, "dcp_rank": 0, "_dcp_dtype": None}))


def test_flash_attention_as_vllm_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attributes that its own ``__init__`` sets, on a Hopper GPU."""
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: True)

    def layer(**args: Any) -> Attention:
        made: dict[str, Any] = dict(num_heads=8, head_size=64, scale=0.1, num_kv_heads=2, alibi_slopes=None)
        impl = NanoCPFlashAttentionImpl(**{**made, "sliding_window": None, "kv_cache_dtype": "auto", **args})
        made_layer = flash_layer()
        made_layer.impl = impl
        return made_layer

    judge_flash(layer())
    for args in (dict(sliding_window=128), dict(logits_soft_cap=30.0), dict(alibi_slopes=[0.5] * 8)):
        with pytest.raises(NanoCPConfigError):
            judge_flash(layer(**args))


@pytest.mark.parametrize(
    ("impl", "layer", "part"),
    [
        ({"sinks": torch.zeros(8)}, {}, "attention sinks"),
        ({"sliding_window": (127, 0)}, {}, "sliding-window"),
        ({"sliding_window": (-1, 0)}, {}, "sliding-window"),
        ({"logits_soft_cap": 50.0}, {}, "softcapped"),
        ({"alibi_slopes": torch.ones(8)}, {}, "ALiBi"),
        ({"attn_type": "encoder_only"}, {}, "no decoder's"),
        ({"kv_sharing_target_layer_name": "l.0"}, {}, "KV that layers share"),
        ({"fa4_hd256": True}, {}, "FlashAttention 4"),
        ({"dcp_world_size": 2}, {}, "decode context parallelism"),
        ({"pcp_world_size": 2}, {}, "prefill context parallelism"),
        ({"chunk_lookback": 1}, {}, "'chunk_lookback'"),
        ({"mask": torch.ones(1)}, {}, "'mask'"),
        ({}, {"has_sink": True}, "attention sinks"),
        ({}, {"sliding_window": 128}, "sliding-window"),
        ({}, {"use_alibi_sqrt": True}, "ALiBi"),
        ({}, {"use_mm_prefix": True}, "later tokens of an image"),
        ({}, {"mm_prefix_clamp_sliding_window": True}, "later tokens of an image"),
        ({}, {"attn_type": "encoder"}, "no decoder's"),
        ({}, {"kv_sharing_target_layer_name": "l.0"}, "KV that layers share"),
        ({}, {"head_size_v": 128}, "not as long"),
        ({}, {"_k_scale": torch.ones(2)}, "KV scales of each head"),
        ({}, {"kv_cache_dtype": "fp8_e5m2"}, "a KV cache of fp8_e5m2"),
        ({}, {"kv_cache_dtype": "nvfp4"}, "a KV cache of nvfp4"),
        ({"num_heads": 16}, {}, "(8, 2, 64), (16, 2, 64)"),
    ],
)
def test_flash_attention_with_a_feature(impl: dict[str, Any], layer: dict[str, Any], part: str) -> None:
    with pytest.raises(NanoCPConfigError) as caught:
        judge_flash(flash_layer(impl, **layer))
    _check(str(caught.value), part)


def test_another_class_of_flash_attention() -> None:
    layer = flash_layer()
    layer.impl.__class__ = type("Other", (NanoCPFlashAttentionImpl,), {})
    with pytest.raises(NanoCPConfigError, match="attention backend"):
        judge_flash(layer)


def test_a_layer_with_a_state() -> None:
    """Whatever keeps KV or a state is asked, also if it is no ``Attention``."""
    with pytest.raises(NanoCPConfigError, match="of the kind SimpleNamespace"):
        judge_flash(SimpleNamespace(impl=object()))


# -- what vLLM has --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [CPUAttentionBackendImpl, FlashAttentionImpl])
def test_every_argument_of_an_implementation_is_classified(impl: type) -> None:
    """A new vLLM cannot bring a feature that is trusted unseen."""
    arguments = set(inspect.signature(impl.__init__).parameters) - {"self"}  # type: ignore[misc]
    assert arguments <= FEATURES.keys() | KNOWN


def test_every_argument_of_a_layer_is_classified() -> None:
    asked = {"alibi_slopes", "logits_soft_cap", "per_layer_sliding_window", "attn_backend", "head_size_v"}
    asked |= {"extra_impl_args"}  # the implementation's own, see above
    harmless = {"self", "num_heads", "head_size", "scale", "num_kv_heads", "cache_config", "quant_config", "prefix"}
    arguments = set(inspect.signature(Attention.__init__).parameters)
    assert arguments - asked - harmless <= LAYER_FEATURES.keys()
