# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters for `tests.tiny_models`' Qwen3-MoE, in the files of PEFT.

They change queries, keys and values, and nothing else: what they add to the residual stream goes through the model's
own output projection, which leaves the components alone that its router decides by.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny_models import TinyShape

RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj")


def make_adapter(path: Path, seed: int, **sizes: int) -> Path:
    """Write an adapter for a model of these sizes into the folder `path`; what it adds is as large as what is there."""
    shape = TinyShape(**sizes)
    heads = dict(zip(MODULES, (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), strict=True))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(shape.num_layers):
        for module, count in heads.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down = torch.randn(RANK, shape.hidden_size, generator=generator)
            up = torch.randn(count * shape.head_dim, RANK, generator=generator)
            weights[f"{name}.lora_A.weight"] = down / shape.hidden_size**0.5
            weights[f"{name}.lora_B.weight"] = up / RANK**0.5
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, bias="none")
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": MODULES}))
    return path
