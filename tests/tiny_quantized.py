# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with weights of 8 bits, a scale for each block, as DeepSeek-V3's are published; and the same numbers
in 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
# What such checkpoints keep in 16 bits: embeddings, norms, the router, the projection to logits.
_KEPT = ("embed_tokens", "norm", "mlp.gate.", "lm_head")


def quantize(path: str | Path, exact: str | Path | None = None) -> str:
    """Turn the weights of the checkpoint in the folder `path` into float8_e4m3fn, in place; returns it.

    A block of 128 rows and columns has one scale, float32, `weight_scale_inv`: what its numbers are times.

    Args:
        path: with weights of 16 bits.
        exact: a folder to be made, whose checkpoint has the quantized weights' numbers in 16 bits.
    """
    path = Path(path)
    weights, kept = load_file(path / "model.safetensors"), list[str]()
    stored: dict[str, torch.Tensor] = {}
    same: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() != 2 or any(part in name for part in _KEPT):
            stored[name] = same[name] = weight
            kept += [name.removesuffix(".weight")] * (weight.dim() == 2)
            continue
        stored[name], scales = _in_blocks(weight)
        stored[name.removesuffix("weight") + "weight_scale_inv"] = scales
        each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        same[name] = (stored[name].float() * each).to(weight.dtype)
    if exact is not None:
        shutil.copytree(path, exact)
        save_file(same, Path(exact) / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,  # vLLM would look for a router's scales
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return str(path)


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in 8 bits, and the scales of its blocks."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    scaled = (blocks / scales[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return scaled.to(torch.float8_e4m3fn).contiguous(), scales
