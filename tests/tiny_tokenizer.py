# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the tiny checkpoints: every byte is a token, and some pairs of letters; it has a chat template."""

from __future__ import annotations

import string
from pathlib import Path

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable stand-ins that a byte-level tokenizer uses, in the order of the bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    kept = {ord(character) for character in alphabet if ord(character) < 256}
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def _merges(count: int) -> list[tuple[str, str]]:
    """The first `count` two-character merges: a space with a letter, then letter with letter."""
    pairs = [("Ġ", letter) for letter in string.ascii_letters]
    pairs += [(a, b) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    if count > len(pairs):
        raise ValueError(f"the tokenizer has at most {259 + len(pairs)} tokens")
    return pairs[:count]


def silent_ids(vocab_size: int) -> list[int]:
    """Ids that must not be generated: specials, and bytes that are no printable ASCII."""
    printable = set(range(0x20, 0x7F))
    return [PAD_ID, BOS_ID, EOS_ID] + [3 + byte for byte in range(256) if byte not in printable]


def write_tokenizer(path: Path, vocab_size: int, max_length: int) -> None:
    """Write a tokenizer of `vocab_size` tokens, with a chat template, into the folder `path`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN]
    merges = _merges(vocab_size - len(specials) - 256)
    tokens = specials + _byte_characters() + [first + second for first, second in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
