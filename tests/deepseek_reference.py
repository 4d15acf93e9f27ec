# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 in float64 and plain PyTorch, to compare engines with: greedy decoding, one request at a time.

Written from the architecture: keys and values are projected up from the latents for every token and kept (no absorbed
weights, no latent cache), a prompt is computed at once. Frequencies and angles of rotary embeddings are computed in
float32, as every implementation does (at position 3,000 exact ones change logprobs by up to 9e-4). It reads the
checkpoints of `tests.tiny_models`, and no others: plain rotary embeddings, softmax routing over all experts without
renormalization.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_SCORES = 1 << 24  # of one block of attention, in numbers


@dataclass
class Decoded:
    """What greedy decoding gave: `logprobs` [steps, vocab], and how far its choices are from other ones.

    `leads` [steps]: the best logit less the second. `router_margin`: over all tokens and layers, the least difference
    between the last expert chosen and the first one left out, as router logits.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    leads: torch.Tensor
    router_margin: float


@dataclass
class _Kept:
    """Keys [heads, tokens, nope + rope] and values [heads, tokens, v] of each layer so far."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.keys:
            key, value = torch.cat([self.keys[layer], key], 1), torch.cat([self.values[layer], value], 1)
        self.keys[layer], self.values[layer] = key, value
        return key, value


class DeepseekReference:
    """A checkpoint folder's model. Raises `ValueError` for what it does not compute."""

    def __init__(self, path: str | Path) -> None:
        from safetensors.torch import load_file

        self.config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
        wanted = {"model_type": "deepseek_v2", "scoring_func": "softmax", "n_group": 1, "norm_topk_prob": False}
        for name, value in wanted.items():
            if self.config.get(name) != value:
                raise ValueError(f"{name} is {self.config.get(name)!r}, the reference computes {value!r}")
        if self.config.get("rope_scaling") or self.config.get("rope_parameters"):
            raise ValueError("the reference computes plain rotary embeddings")
        self.weights = {n: w.double() for n, w in load_file(Path(path) / "model.safetensors").items()}
        self._margin = float("inf")

    @torch.no_grad()
    def decode(self, prompt: list[int], steps: int) -> Decoded:
        """The next `steps` tokens after `prompt`, the best one each time (an end token does not end it)."""
        self._margin = float("inf")
        kept, given = _Kept(), list(prompt)
        tokens: list[int] = []
        logprobs, leads = [], []
        position = 0
        for _ in range(steps):
            logits = self._forward(torch.tensor(given), position, kept)
            best = logits.topk(2)
            position += len(given)
            given = [int(best.indices[0])]
            tokens += given
            logprobs.append(logits.log_softmax(-1))
            leads.append(best.values[0] - best.values[1])
        return Decoded(tokens, torch.stack(logprobs), torch.stack(leads), self._margin)

    def _forward(self, tokens: torch.Tensor, start: int, kept: _Kept) -> torch.Tensor:
        """Logits [vocab] of the last of `tokens`, which stand at positions from `start` on."""
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            hidden = hidden + self._attention(layer, self._norm(f"{prefix}.input_layernorm", hidden), start, kept)
            hidden = hidden + self._mlp(layer, self._norm(f"{prefix}.post_attention_layernorm", hidden))
        return self._linear("lm_head", self._norm("model.norm", hidden[-1]))

    def _linear(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        return numbers @ self.weights[f"{name}.weight"].T

    def _norm(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        scale = (numbers.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return numbers * scale * self.weights[f"{name}.weight"]

    def _attention(self, layer: int, hidden: torch.Tensor, start: int, kept: _Kept) -> torch.Tensor:
        config, name = self.config, f"model.layers.{layer}.self_attn"
        heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"] is None:
            query = self._linear(f"{name}.q_proj", hidden)
        else:
            query = self._norm(f"{name}.q_a_layernorm", self._linear(f"{name}.q_a_proj", hidden))
            query = self._linear(f"{name}.q_b_proj", query)
        query = query.view(len(hidden), heads, nope + rope).transpose(0, 1)
        query = torch.cat([query[..., :nope], self._rotate(query[..., nope:], start)], -1)
        low = self._linear(f"{name}.kv_a_proj_with_mqa", hidden)
        latent = self._norm(f"{name}.kv_a_layernorm", low[:, :rank])
        up = self._linear(f"{name}.kv_b_proj", latent).view(len(hidden), heads, -1).transpose(0, 1)
        shared = self._rotate(low[:, rank:], start).expand(heads, -1, -1)  # one key part for all heads
        key, value = kept.extend(layer, torch.cat([up[..., :nope], shared], -1), up[..., nope:])
        mixed = _causal(query * (nope + rope) ** -0.5, key, value, start)
        return self._linear(f"{name}.o_proj", mixed.transpose(0, 1).reshape(len(hidden), -1))

    def _rotate(self, numbers: torch.Tensor, start: int) -> torch.Tensor:
        """Neighbouring pairs of [..., tokens, size], rotated by position times frequency."""
        tokens, size = numbers.shape[-2:]
        frequencies = 1 / self.config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        angles = (torch.arange(start, start + tokens).float()[:, None] * frequencies).double()
        pairs = torch.view_as_complex(numbers.reshape(*numbers.shape[:-1], size // 2, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def _mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{layer}.mlp"
        if layer < self.config["first_k_dense_replace"]:
            return self._gated(name, hidden)
        count, scale = self.config["num_experts_per_tok"], self.config["routed_scaling_factor"]
        logits = self._linear(f"{name}.gate", hidden)
        order = logits.sort(dim=-1, descending=True)
        self._margin = min(self._margin, float((order.values[:, count - 1] - order.values[:, count]).min()))
        shares = logits.softmax(-1)
        result = self._gated(f"{name}.shared_experts", hidden)
        for expert in range(logits.shape[1]):
            rows = (order.indices[:, :count] == expert).any(-1).nonzero()[:, 0]
            if len(rows):
                share = scale * shares[rows, expert, None]
                result[rows] += share * self._gated(f"{name}.experts.{expert}", hidden[rows])
        return result

    def _gated(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(self._linear(f"{name}.gate_proj", hidden))
        return self._linear(f"{name}.down_proj", gate * self._linear(f"{name}.up_proj", hidden))


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int) -> torch.Tensor:
    """Attention [heads, queries, v] of queries at positions from `start` on over keys at positions from 0 on."""
    heads, queries, _ = query.shape
    rows = max(1, _SCORES // (heads * key.shape[1]))
    parts = []
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        seen = start + last
        scores = query[:, first:last] @ key[:, :seen].transpose(1, 2)
        positions = torch.arange(start + first, seen)
        scores.masked_fill_(torch.arange(seen) > positions[:, None], float("-inf"))
        parts.append(scores.softmax(-1) @ value[:, :seen])
    return torch.cat(parts, 1)
