# SPDX-License-Identifier: Apache-2.0
"""The reference is DeepSeek-V2 (as another implementation has it), and the tiny checkpoint is fit for comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.deepseek_reference import DeepseekReference
from tests.engine.harness import prompt
from tests.tiny_models import make_deepseek_v2


@pytest.fixture(scope="module", params=[None, 96], ids=["q_proj", "q_lora"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deepseek_v2(tmp_path_factory.mktemp("deepseek"), q_lora_rank=request.param)


def test_another_implementation_agrees(checkpoint: Path) -> None:
    """That of transformers, in float64 but for its rotary embeddings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    for length in (1, 200):
        given = prompt(length, seed=5)
        decoded = DeepseekReference(checkpoint).decode(given, 4)
        with torch.no_grad():
            logits = model(torch.tensor([given + decoded.tokens[:-1]])).logits[0, -4:]
        assert logits.argmax(-1).tolist() == decoded.tokens
        assert (logits.log_softmax(-1) - decoded.logprobs).abs().max() < 1e-4


def test_rounding_flips_nothing(checkpoint: Path) -> None:
    """Errors of float32 are below 1e-4 in logprobs and router logits."""
    reference = DeepseekReference(checkpoint)
    decoded = [reference.decode(prompt(length, seed=length), 24) for length in (1, 17, 130, 1000)]
    assert min(one.router_margin for one in decoded) > 0.2
    leads = torch.cat([one.leads for one in decoded])
    assert leads.median() > 0.5 and leads.min() > 2e-3
    # Of a prompt of one token the context may be that token over and over.
    assert all(len(set(one.tokens)) > 12 for one in decoded[1:]), "greedy output does not loop"


def test_every_part_of_the_prompt_counts(checkpoint: Path) -> None:
    """Other tokens anywhere, a block long, change the next tokens' logprobs."""
    reference = DeepseekReference(checkpoint)
    whole = prompt(800, seed=3)
    logprobs = reference.decode(whole, 4).logprobs[0]
    for first in range(0, 784, 112):
        other = whole[:first] + prompt(16, seed=first + 7) + whole[first + 16 :]
        assert (reference.decode(other, 1).logprobs[0] - logprobs).abs().max() > 0.05, first


@pytest.mark.parametrize(("name", "value"), [("norm_topk_prob", True), ("rope_scaling", {"type": "yarn"})])
def test_refuses_what_it_does_not_compute(tmp_path: Path, name: str, value: object) -> None:
    make_deepseek_v2(tmp_path, num_layers=1, num_experts=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match="reference computes"):
        DeepseekReference(tmp_path)
