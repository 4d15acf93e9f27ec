# SPDX-License-Identifier: Apache-2.0
"""Configurations of the models whose shapes are measured. Weights are random: ``--load-format dummy``."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = dict(
    torch_dtype="bfloat16", attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02,
    rms_norm_eps=1e-6, rope_scaling=None, max_position_embeddings=4194304, use_cache=True, tie_word_embeddings=False,
    bos_token_id=256, eos_token_id=256,
)  # fmt: skip
# Rotary embeddings are plain: no table of them has to be as long as the longest request.
_LATENT: dict[str, Any] = dict(
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_layer_freq=1, rope_theta=10000.0,
)  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=151936, hidden_size=2048,
        intermediate_size=6144, num_hidden_layers=48, max_window_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=False,
        router_aux_loss_coef=0.001, rope_theta=1000000.0, sliding_window=None, use_sliding_window=False,
    ),
    "deepseek-v2-lite": _LATENT | dict(
        architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", vocab_size=102400, hidden_size=2048,
        intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16,
        q_lora_rank=None, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", n_group=1, topk_group=1,
        norm_topk_prob=False, routed_scaling_factor=1.0,
    ),
    # Eight layers of 61, and 32 experts of 256.
    "deepseek-v3-slice": _LATENT | dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=129280, hidden_size=7168,
        intermediate_size=18432, num_hidden_layers=8, num_attention_heads=128, num_key_value_heads=128,
        q_lora_rank=1536, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        first_k_dense_replace=1, topk_method="noaux_tc", scoring_func="sigmoid", n_group=8, topk_group=4,
        norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
    ),
}  # fmt: skip
_CONFIGS["deepseek-v3-slice-mtp"] = _CONFIGS["deepseek-v3-slice"] | dict(num_nextn_predict_layers=1)
SHAPES = tuple(_CONFIGS)


def config_of(shape: str, **changes: Any) -> dict[str, Any]:
    """What a model's ``config.json`` has; ``changes``: other values, for a smaller one."""
    return _COMMON | _CONFIGS[shape] | changes
