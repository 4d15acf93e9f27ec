# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoints are a function of their arguments, and their tokenizer covers the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import EOS_ID, make_deepseek_v2, make_mixtral, make_qwen3_moe

Maker = Callable[..., Path]


@pytest.mark.parametrize("make", [make_qwen3_moe, make_mixtral, make_deepseek_v2])
def test_same_arguments_same_files(make: Maker, tmp_path: Path) -> None:
    first, second, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_unknown_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_heds"):
        make_qwen3_moe(tmp_path, num_heds=2)
    with pytest.raises(TypeError, match="head_dim"):
        make_deepseek_v2(tmp_path, head_dim=32)


def test_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_qwen3_moe(tmp_path, num_layers=1, num_experts=2))
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == EOS_ID
    text = "The capital of France, Päris: 100 €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi\nassistant: "
