# SPDX-License-Identifier: Apache-2.0
"""Tiny random Mixture-of-Experts checkpoints for tests.

The models are small enough to load in a second, yet behave like real ones where it matters to
this project:

* attention is peaked: a few keys anywhere in the context decide a head's output, so a rank that
  loses, doubles or shifts a part of the KV cache changes the next tokens;
* every layer is a MoE layer (DeepSeek-V2: but the first), and the router's choices differ from token
  to token and from layer to layer, yet never by rounding: a token's choice hangs on a few components
  of the hidden state that its embedding sets, that no layer changes, and whose order is far apart.
  (With a plain random router one choice in about a hundred thousand is closer than float32 rounding,
  and any other order of summation, as when attention is split, takes another expert.)
* greedy output depends on the prompt and does not fall into a loop. In float32 the best logit leads
  the second by far more than rounding: of 864 steps (18 prompts of up to 3,000 tokens) the median
  lead was 0.8 (Qwen3-MoE) and 1.0 (Mixtral), the hundredth 0.016 and 0.011, the least 0.0014 and 0.0009.
  Of DeepSeek-V2, in float64: 0.98, 0.017 and 0.0004 (with `q_lora_rank` 96: 0.93, 0.012 and 0.0009). The
  last expert that its router chose led the next by a router logit of at least 0.24;
* each token id decodes to ASCII text, and the tokenizer has a chat template, so that the OpenAI
  endpoints work.

Everything is a function of the arguments: the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, silent_ids, write_tokenizer

# Standard deviation of the attention scores before softmax. At 2.5 about n * exp(-2.5 ** 2) of n
# keys carry the weight: one in 500, peaked at any length the models allow.
_SCORE_STD = 2.5
_ROUTER_GAIN = 2.0
_LOGIT_STD = 4.0


@dataclass(frozen=True)
class _Sizes:
    num_layers: int = 4
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    moe_intermediate_size: int = 64
    vocab_size: int = 512
    max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TinyShape(_Sizes):
    """Sizes of a tiny model. `head_dim` must be one the CPU attention kernel has (32, 64, ...)."""

    num_kv_heads: int = 2
    head_dim: int = 32


@dataclass(frozen=True)
class TinyLatentShape(_Sizes):
    """Sizes of a tiny DeepSeek-V2. On CPU `kv_lora_rank` and `qk_rope_head_dim` must be 512 and 64."""

    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    num_dense_layers: int = 1
    dense_intermediate_size: int = 128
    num_shared_experts: int = 1


def make_qwen3_moe(path: str | Path, *, seed: int = 0, dtype: str = "float32", **shape: int) -> Path:
    """Write a random Qwen3-MoE checkpoint with its tokenizer into the folder `path`.

    `shape` overrides fields of `TinyShape`; `dtype` is that of the stored weights.
    Returns `path`. Raises `TypeError` for an unknown field.
    """
    sizes = TinyShape(**shape)
    weights = _attention_weights(sizes, torch.Generator().manual_seed(seed), qk_norm=True)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}.mlp"
        weights |= _expert_weights(
            sizes,
            torch.Generator().manual_seed(seed * 1000 + layer + 1),
            gate=f"{prefix}.gate.weight",
            expert=prefix + ".experts.{}.{}.weight",
            names=("gate_proj", "up_proj", "down_proj"),
        )
    config = _common_config(sizes, dtype) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_heads_config(sizes),
        "num_experts": sizes.num_experts,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "intermediate_size": sizes.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }
    return _write(Path(path), config, weights, dtype)


def make_mixtral(path: str | Path, *, seed: int = 0, dtype: str = "float32", **shape: int) -> Path:
    """Write a random Mixtral checkpoint with its tokenizer into the folder `path`.

    Arguments, result and errors as of `make_qwen3_moe`.
    """
    sizes = TinyShape(**shape)
    weights = _attention_weights(sizes, torch.Generator().manual_seed(seed), qk_norm=False)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        weights |= _expert_weights(
            sizes,
            torch.Generator().manual_seed(seed * 1000 + layer + 1),
            gate=f"{prefix}.gate.weight",
            expert=prefix + ".experts.{}.{}.weight",
            names=("w1", "w3", "w2"),
        )
    config = _common_config(sizes, dtype) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_heads_config(sizes),
        "num_local_experts": sizes.num_experts,
        "intermediate_size": sizes.moe_intermediate_size,
        "sliding_window": None,
    }
    return _write(Path(path), config, weights, dtype)


def make_granite_moe(
    path: str | Path, *, sinks: bool = False, seed: int = 0, dtype: str = "float32", **shape: int
) -> Path:
    """Write a random GraniteMoE checkpoint with its tokenizer into the folder `path`.

    `sinks`: whether each head has an attention sink, that takes as much weight as the best of about 1,000 keys.
    Other arguments, result and errors as of `make_qwen3_moe`.
    """
    sizes = TinyShape(**shape)
    weights = _attention_weights(sizes, torch.Generator().manual_seed(seed), qk_norm=False)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        one = _expert_weights(
            sizes,
            torch.Generator().manual_seed(seed * 1000 + layer + 1),
            gate="gate",
            expert="{}.{}",
            names=("w1", "w3", "w2"),
        )
        moe = f"{prefix}.block_sparse_moe"
        first = [torch.cat([one[f"{i}.w1"], one[f"{i}.w3"]]) for i in range(sizes.num_experts)]
        weights[f"{moe}.router.layer.weight"] = one["gate"]
        weights[f"{moe}.input_linear.weight"] = torch.stack(first)
        weights[f"{moe}.output_linear.weight"] = torch.stack([one[f"{i}.w2"] for i in range(sizes.num_experts)])
        if sinks:
            weights[f"{prefix}.self_attn.sinks"] = torch.full((sizes.num_heads,), 3 * _SCORE_STD)
    config = _common_config(sizes, dtype) | {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **_heads_config(sizes),
        "num_local_experts": sizes.num_experts,
        "intermediate_size": sizes.moe_intermediate_size,
        "attention_sinks": sinks,
        "attention_multiplier": sizes.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }
    return _write(Path(path), config, weights, dtype)


def make_deepseek_v2(path: str | Path, *, seed: int = 0, dtype: str = "float32", **shape: int | None) -> Path:
    """Write a random DeepSeek-V2 checkpoint with its tokenizer into the folder `path`.

    Rotary embeddings are plain (no YaRN), routing is greedy over all experts, the chosen experts' softmax weights are
    not renormalized (as in DeepSeek-V2), but scaled. `shape` overrides fields of `TinyLatentShape`.
    Other arguments, result and errors as of `make_qwen3_moe`.
    """
    sizes = TinyLatentShape(**shape)  # type: ignore[arg-type]
    return _write(Path(path), _deepseek_config(sizes, dtype), _deepseek_weights(sizes, seed), dtype)


def _deepseek_weights(sizes: TinyLatentShape, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = _token_weights(sizes, generator)
    for layer in range(sizes.num_layers):
        weights |= _latent_attention_weights(sizes, f"model.layers.{layer}", generator)
        prefix = f"model.layers.{layer}.mlp"
        own = torch.Generator().manual_seed(seed * 1000 + layer + 1)
        if layer < sizes.num_dense_layers:
            weights |= _mlp_weights(sizes, prefix, sizes.dense_intermediate_size, own)
            continue
        weights |= _expert_weights(
            sizes,
            own,
            gate=f"{prefix}.gate.weight",
            expert=prefix + ".experts.{}.{}.weight",
            names=("gate_proj", "up_proj", "down_proj"),
        )
        inner = sizes.num_shared_experts * sizes.moe_intermediate_size
        weights |= _mlp_weights(sizes, f"{prefix}.shared_experts", inner, own)
    return weights


def _deepseek_config(sizes: TinyLatentShape, dtype: str) -> dict[str, Any]:
    return _common_config(sizes, dtype) | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": sizes.num_heads,
        "kv_lora_rank": sizes.kv_lora_rank,
        "q_lora_rank": sizes.q_lora_rank,
        "qk_nope_head_dim": sizes.qk_nope_head_dim,
        "qk_rope_head_dim": sizes.qk_rope_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "first_k_dense_replace": sizes.num_dense_layers,
        "intermediate_size": sizes.dense_intermediate_size,
        "moe_layer_freq": 1,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": sizes.num_shared_experts,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "attention_bias": False,
    }


def _common_config(sizes: _Sizes, dtype: str) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_experts_per_tok": sizes.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": dtype,
    }


def _heads_config(sizes: TinyShape) -> dict[str, int]:
    return {"num_key_value_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim}


def _linear(rows: int, columns: int, gain: float, generator: torch.Generator) -> torch.Tensor:
    """A [rows, columns] matrix that maps unit-variance inputs to outputs of deviation `gain`."""
    return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))


def _output(rows: int, columns: int, gain: float, kept: int, generator: torch.Generator) -> torch.Tensor:
    """As `_linear`, for what is added to the hidden state: its first `kept` components stay."""
    weight = _linear(rows, columns, gain, generator)
    weight[:kept] = 0.0
    return weight


def _token_weights(sizes: _Sizes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Embeddings, last norm and the projection to logits."""
    hidden = sizes.hidden_size
    lm_head = _linear(sizes.vocab_size, hidden, _LOGIT_STD, generator)
    lm_head[silent_ids(sizes.vocab_size)] = 0.0
    embeddings = 0.5 * torch.randn(sizes.vocab_size, hidden, generator=generator)
    # The components that the router reads: for each token the same values, spread evenly, in an order of its own.
    values = torch.linspace(-2.0, 2.0, sizes.num_experts)
    order = torch.rand(sizes.vocab_size, sizes.num_experts, generator=generator).argsort(dim=1)
    embeddings[:, : sizes.num_experts] = values[order]
    return {
        # Smaller than what a layer adds: the context, not the last token alone, decides.
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": lm_head,
    }


def _attention_weights(sizes: TinyShape, generator: torch.Generator, *, qk_norm: bool) -> dict[str, torch.Tensor]:
    """What `_token_weights` gives, and each layer's attention and norms."""
    hidden, q_size = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    kv_size = sizes.num_kv_heads * sizes.head_dim
    weights = _token_weights(sizes, generator)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        q_gain = 1.0 if qk_norm else _SCORE_STD
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{attention}.q_proj.weight": _linear(q_size, hidden, q_gain, generator),
            f"{attention}.k_proj.weight": _linear(kv_size, hidden, 1.0, generator),
            f"{attention}.v_proj.weight": _linear(kv_size, hidden, 1.0, generator),
            f"{attention}.o_proj.weight": _output(hidden, q_size, 1.5, sizes.num_experts, generator),
        }
        if qk_norm:
            weights[f"{attention}.q_norm.weight"] = torch.full((sizes.head_dim,), _SCORE_STD)
            weights[f"{attention}.k_norm.weight"] = torch.ones(sizes.head_dim)
    return weights


def _latent_attention_weights(
    sizes: TinyLatentShape, prefix: str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One layer's attention and norms. Those of the latents differ from one number to the next, by up to 3 times."""
    hidden, latent, rope = sizes.hidden_size, sizes.kv_lora_rank, sizes.qk_rope_head_dim
    q_size = sizes.num_heads * (sizes.qk_nope_head_dim + rope)
    up_size = sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
    attention = f"{prefix}.self_attn"
    weights = {
        f"{prefix}.input_layernorm.weight": torch.ones(hidden),
        f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        f"{attention}.kv_a_proj_with_mqa.weight": _linear(latent + rope, hidden, 1.0, generator),
        f"{attention}.kv_a_layernorm.weight": 0.5 + torch.rand(latent, generator=generator),
        f"{attention}.kv_b_proj.weight": _linear(up_size, latent, 1.0, generator),
        f"{attention}.o_proj.weight": _output(
            hidden, sizes.num_heads * sizes.v_head_dim, 1.5, sizes.num_experts, generator
        ),
    }
    if sizes.q_lora_rank is None:
        return weights | {f"{attention}.q_proj.weight": _linear(q_size, hidden, _SCORE_STD, generator)}
    return weights | {
        f"{attention}.q_a_proj.weight": _linear(sizes.q_lora_rank, hidden, 1.0, generator),
        f"{attention}.q_a_layernorm.weight": 0.5 + torch.rand(sizes.q_lora_rank, generator=generator),
        f"{attention}.q_b_proj.weight": _linear(q_size, sizes.q_lora_rank, _SCORE_STD, generator),
    }


def _mlp_weights(sizes: _Sizes, prefix: str, inner: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A dense layer, or the shared experts of a layer."""
    hidden = sizes.hidden_size
    return {
        f"{prefix}.gate_proj.weight": _linear(inner, hidden, 1.0, generator),
        f"{prefix}.up_proj.weight": _linear(inner, hidden, 1.0, generator),
        f"{prefix}.down_proj.weight": _output(hidden, inner, 2.0, sizes.num_experts, generator),
    }


def _expert_weights(
    sizes: _Sizes,
    generator: torch.Generator,
    *,
    gate: str,
    expert: str,
    names: tuple[str, str, str],
) -> dict[str, torch.Tensor]:
    """Router and experts of one layer; `names` are those of the gate, up and down projections."""
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    router = torch.zeros(sizes.num_experts, hidden)
    router[torch.arange(sizes.num_experts), torch.randperm(sizes.num_experts, generator=generator)] = _ROUTER_GAIN
    weights = {gate: router}
    for index in range(sizes.num_experts):
        weights[expert.format(index, names[0])] = _linear(inner, hidden, 1.0, generator)
        weights[expert.format(index, names[1])] = _linear(inner, hidden, 1.0, generator)
        weights[expert.format(index, names[2])] = _output(hidden, inner, 2.0, sizes.num_experts, generator)
    return weights


def _write(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], dtype: str) -> Path:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    stored = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path, config["vocab_size"], config["max_position_embeddings"])
    return path
