# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with every decoder that models have, for tests of what makes text of ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The Constitution of the United States, don't you know? It 's 12,5 % .\n\n"
    "\tdef f(x):\n        return x ** 2\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Съешь ещё этих мягких французских булок. "
    "いろはにほへと ちりぬるを 我能吞下玻璃而不伤身体。 키스의 고유조건은 입술끼리 만나야 하고 "
    "नमस्ते दुनिया ကမ္ဘာ ༄༅། བོད་ཡིག "
    "شكرا جزيلا שלום 👩‍👩‍👧‍👦🎉🦜 🇩🇪 e\u0301 \ufffd \u00a0 \u200b\U0001d518\U0001d52b"
)
_SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<\uff5cend\uff5c>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level() -> Any:
    """Byte-level BPE, as of GPT-2, Llama 3, Qwen and DeepSeek; some tokens are parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(*stages: Any, unigram: bool = False) -> Any:
    """Pieces with a mark for spaces and a token for each byte, as of Llama 2, Gemma, Mistral and T5."""
    words = TEXT.split()
    letters = sorted(set("".join(words[: len(words) // 2])))
    pieces = [*_SPECIALS[:3], *_BYTES, "▁", "▁▁", "▁▁▁▁", "▁\n", "\n", *letters]
    pieces = list(dict.fromkeys([*pieces, *(f"▁{word}" for word in words), *(f"{word}▁" for word in words)]))
    model: Any
    if unigram:
        model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    else:
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = stages[0] if len(stages) == 1 else decoders.Sequence(list(stages))
    return tokenizer


def _word_piece(decoder: Any) -> Any:
    words = dict.fromkeys(
        [*_SPECIALS, "##s", "##ing", "##'", *TEXT.split(), *"'.,?!", "n't", "'s", "do not", "#", "##"]
    )
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def _mark(replaced: str = " ") -> Any:
    return decoders.Replace("▁", replaced)


BUILT: dict[str, Callable[[], Any]] = {
    "byte level": _byte_level,
    "llama 2": lambda: _sentence_piece(_mark(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "gemma": lambda: _sentence_piece(_mark(), decoders.ByteFallback(), decoders.Fuse()),
    "three spaces": lambda: _sentence_piece(
        _mark(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)
    ),
    "no bytes": lambda: _sentence_piece(decoders.Sequence([_mark()])),
    "metaspace": lambda: _sentence_piece(decoders.Metaspace(), unigram=True),
    "metaspace, never": lambda: _sentence_piece(decoders.Metaspace(prepend_scheme="never")),
    "bytes, metaspace": lambda: _sentence_piece(decoders.ByteFallback(), decoders.Metaspace()),
    "word piece": lambda: _word_piece(decoders.WordPiece()),
    "word piece, unclean": lambda: _word_piece(decoders.WordPiece(cleanup=False)),
    "none": lambda: _word_piece(None),
}


class _Python:
    def decode_chain(self, tokens: list[str]) -> list[str]:
        return ["".join(tokens).swapcase()]


# Whose texts hang together in other ways: a text as a whole, repeated tokens, or anything.
OTHERS: dict[str, Callable[[], Any]] = {
    "replaced when joined": lambda: _sentence_piece(decoders.Fuse(), _mark()),
    "replaced by a letter": lambda: _sentence_piece(_mark("<"), decoders.ByteFallback()),
    "ctc": lambda: _word_piece(decoders.CTC()),
    "bpe": lambda: _word_piece(decoders.BPEDecoder("s")),
    "python": lambda: _sentence_piece(decoders.Decoder.custom(_Python())),
}


def _mistral(name: str) -> Any:
    """A vocabulary that comes with vLLM: Mistral's first one, of SentencePiece, or `tekken`, byte-level."""
    import mistral_common

    path = Path(mistral_common.__file__).parent / "data" / name
    if path.suffix == ".json":
        import base64

        characters = _characters()
        ranks = json.loads(path.read_text())["vocab"][:60_000]
        tokens = ["".join(characters[byte] for byte in base64.b64decode(row["token_bytes"])) for row in ranks]
        tokenizer = Tokenizer(models.BPE(vocab={token: rank for rank, token in enumerate(tokens)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [_mark(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _characters() -> list[str]:
    """What byte-level tokenizers write for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


REAL: dict[str, Callable[[], Any]] = {
    "mistral": lambda: _mistral("tokenizer.model.v1"),
    "tekken": lambda: _mistral("tekken_240911.json"),
}
# A folder of more: NAME.json or NAME/tokenizer.json.
_FOLDER = os.environ.get("NANOCP_TOKENIZERS")
for _path in sorted(Path(_FOLDER).rglob("*.json")) if _FOLDER else ():
    REAL[str(_path.relative_to(str(_FOLDER)))] = lambda path=_path: Tokenizer.from_file(str(path))


def with_specials(tokenizer: Any) -> Any:
    """The tokenizer with special tokens, and with others that were added to it."""
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIALS])
    tokenizer.add_tokens(["<tool_call>", "▁added", "é", " two words "])
    return tokenizer
