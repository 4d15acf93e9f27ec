# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with weights of 8 bits, a scale for each block, as DeepSeek-V3's are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
# What such checkpoints keep in 16 bits: embeddings, norms, the router, the projection to logits.
_KEPT = ("embed_tokens", "norm", "mlp.gate.", "lm_head")


def quantize(path: str | Path) -> str:
    """Turn the weights of the checkpoint in the folder `path` into float8_e4m3fn, in place; returns it.

    A block of 128 rows and columns has one scale, float32, `weight_scale_inv`: what its numbers are times.
    """
    path = Path(path)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if weight.dim() != 2 or any(part in name for part in _KEPT):
            stored[name] = weight
            continue
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        most = torch.finfo(torch.float8_e4m3fn).max
        scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / most
        scaled = (blocks / scales[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
        stored[name] = scaled.to(torch.float8_e4m3fn).contiguous()
        stored[name.removesuffix("weight") + "weight_scale_inv"] = scales
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return str(path)
