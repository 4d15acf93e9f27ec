# SPDX-License-Identifier: Apache-2.0
"""Tiny draft models for the tiny targets of `tiny_models.py`: EAGLE3 and EAGLE heads, and targets with an MTP layer.

A random head (`make_eagle3`) drafts what is nearly never right, but its attention is peaked as the target's is, so that
its drafts tell whether it saw all keys. `make_first_order` writes a target whose next token depends on its last one
nearly alone, and `make_eagle` the head that knows this much: most of its drafts are right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import (
    _SCORE_STD,
    TinyLatentShape,
    TinyShape,
    _attention_weights,
    _common_config,
    _deepseek_config,
    _deepseek_weights,
    _expert_weights,
    _heads_config,
    _linear,
    _mlp_weights,
    _write,
    make_qwen3_moe,
)

# By how much the layers of a target, or of a head, count beside the last token.
_FAINT = 0.05


def make_eagle3(path: str | Path, *, seed: int = 7, dtype: str = "float32", **shape: int) -> Path:
    """Write a random EAGLE3 head for `make_qwen3_moe` of the same shape into the folder `path`; returns it."""
    sizes, generator = TinyShape(**({"num_layers": 1} | shape)), torch.Generator().manual_seed(seed)
    hidden, q_size = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    kv_size, inner = sizes.num_kv_heads * sizes.head_dim, sizes.moe_intermediate_size
    attention, mlp = "midlayer.self_attn", "midlayer.mlp"
    weights = {
        "fc.weight": _linear(hidden, 3 * hidden, 1.0, generator),
        "midlayer.input_layernorm.weight": torch.ones(hidden),
        "midlayer.hidden_norm.weight": torch.ones(hidden),
        "midlayer.post_attention_layernorm.weight": torch.ones(hidden),
        f"{attention}.q_proj.weight": _linear(q_size, 2 * hidden, _SCORE_STD, generator),
        f"{attention}.k_proj.weight": _linear(kv_size, 2 * hidden, 1.0, generator),
        f"{attention}.v_proj.weight": _linear(kv_size, 2 * hidden, 1.0, generator),
        f"{attention}.o_proj.weight": _linear(hidden, q_size, 1.5, generator),
        f"{mlp}.gate_proj.weight": _linear(inner, hidden, 1.0, generator),
        f"{mlp}.up_proj.weight": _linear(inner, hidden, 1.0, generator),
        f"{mlp}.down_proj.weight": _linear(hidden, inner, 2.0, generator),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": _linear(sizes.vocab_size, hidden, 4.0, generator),
    }
    config = _head_config(sizes, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": sizes.vocab_size,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    return _write(Path(path), config, weights, dtype)


def make_first_order(path: str | Path, *, seed: int = 0, dtype: str = "float32", **shape: int) -> Path:
    """Write a Qwen3-MoE whose layers count little beside the last token; returns the folder `path`."""
    path = make_qwen3_moe(path, seed=seed, dtype=dtype, **shape)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * _FAINT
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_eagle(path: str | Path, *, seed: int = 7, dtype: str = "float32", **shape: int) -> Path:
    """Write an EAGLE head for `make_first_order` of the same shape into the folder `path`: it takes the last token's
    embedding, with a random layer that counts little; embeddings and the projection to logits are the target's. Returns
    `path`."""
    sizes, generator = TinyShape(**({"num_layers": 1} | shape)), torch.Generator().manual_seed(seed)
    hidden = sizes.hidden_size
    layer = {
        name.removeprefix("model."): value
        for name, value in _attention_weights(sizes, generator, qk_norm=False).items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name  # vLLM's heads have none
    }
    mlp = _mlp_weights(sizes, "layers.0.mlp", sizes.moe_intermediate_size, generator)
    for weights in (layer, mlp):
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = weights[name] * _FAINT
    eye = torch.eye(hidden)
    fc = {"fc.weight": torch.cat([eye, torch.zeros(hidden, hidden)], dim=1)}
    config = _head_config(sizes, dtype) | {"architectures": ["LlamaForCausalLM"]}
    return _write(Path(path), config, fc | layer | mlp, dtype)


def _head_config(sizes: TinyShape, dtype: str) -> dict[str, Any]:
    return _common_config(sizes, dtype) | {
        "model_type": "llama",
        **_heads_config(sizes),
        "intermediate_size": sizes.moe_intermediate_size,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _mtp_weights(mtp: str, after: torch.Tensor, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an MTP layer has beside a layer: it takes in the last token whole, and of the hidden state what `after`
    [hidden, hidden] makes of it."""
    hidden = len(after)
    return {
        f"{mtp}.enorm.weight": torch.ones(hidden),
        f"{mtp}.hnorm.weight": torch.ones(hidden),
        f"{mtp}.eh_proj.weight": torch.cat([torch.eye(hidden), after], dim=1),
        f"{mtp}.shared_head.norm.weight": torch.ones(hidden),
        f"{mtp}.shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{mtp}.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }


def make_glm4_moe(path: str | Path, *, seed: int = 0, dtype: str = "float32", **shape: int) -> Path:
    """Write a random GLM-4 MoE with one MTP layer, whose layers count little beside the last token, into the folder
    `path`; the MTP layer knows this much. Returns `path`."""
    sizes = TinyShape(**shape)
    whole = replace(sizes, num_layers=sizes.num_layers + 1)
    hidden = sizes.hidden_size
    weights = _attention_weights(whole, torch.Generator().manual_seed(seed), qk_norm=True)
    for layer in range(whole.num_layers):
        prefix = f"model.layers.{layer}.mlp"
        own = torch.Generator().manual_seed(seed * 1000 + layer + 1)
        names = ("gate_proj", "up_proj", "down_proj")
        weights |= _expert_weights(
            sizes, own, gate=f"{prefix}.gate.weight", expert=prefix + ".experts.{}.{}.weight", names=names
        )
        weights[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(sizes.num_experts)
        weights |= _mlp_weights(sizes, f"{prefix}.shared_experts", sizes.moe_intermediate_size, own)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * _FAINT
    mtp = f"model.layers.{sizes.num_layers}"
    weights |= _mtp_weights(mtp, torch.zeros(hidden, hidden), weights)
    config = _common_config(sizes, dtype) | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **_heads_config(sizes),
        "num_nextn_predict_layers": 1,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "intermediate_size": sizes.moe_intermediate_size,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": False,
    }
    return _write(Path(path), config, weights, dtype)


def make_deepseek_v3(
    path: str | Path, *, faint: bool = True, seed: int = 0, dtype: str = "float32", **shape: int | None
) -> Path:
    """Write a random DeepSeek-V3 with one MTP layer of latent attention into the folder `path`; returns it.

    `faint`: whether its layers count little beside the last token, which the MTP layer knows, so that most of its
    drafts are right. Otherwise they are nearly never right, but the layer's attention is peaked as the target's is.
    """
    sizes = TinyLatentShape(**({"q_lora_rank": 96} | shape))  # type: ignore[arg-type]
    whole = replace(sizes, num_layers=sizes.num_layers + 1)
    hidden, mtp = sizes.hidden_size, f"model.layers.{sizes.num_layers}"
    weights = _deepseek_weights(whole, seed)
    for layer in range(sizes.num_dense_layers, whole.num_layers):
        weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.zeros(sizes.num_experts)
    for name in weights:
        if faint and name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * _FAINT
    generator = torch.Generator().manual_seed(seed + 7)
    after = torch.zeros(hidden, hidden) if faint else _linear(hidden, hidden, 1.0, generator)
    weights |= _mtp_weights(mtp, after, weights)
    config = _deepseek_config(sizes, dtype) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    }
    return _write(Path(path), config, weights, dtype)


def drafts(model: str | Path, method: str, most: int = 3) -> dict[str, Any]:
    """`speculative_config` of one of these, with so many drafts a step; of an MTP layer `model` is the target."""
    return {"method": method, "model": str(model), "num_speculative_tokens": most}
