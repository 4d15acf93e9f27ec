# SPDX-License-Identifier: Apache-2.0
"""The first output of a long prompt, in the front-end.

Wrong upstream: `FastIncrementalDetokenizer` (vllm/v1/engine/detokenizer.py) gives tokenizers' `DecodeStream` all ids
of the prompt. The stream's first `step` decodes them twice, once without the new token and once with it, on the API
server's event loop and under the GIL: tens of milliseconds for 131,072 tokens, hundreds for 1,000,000
(`benchmarks/results/detokenizer_cpu.json`). All streams of that API server stand still meanwhile.

Versions: 0.32.0, 0.33.0.

Repair: the stream gets the end of the prompt, from a token on that has a text of its own and is not one of bytes.
Texts stay as they were, each piece of them. For the stream compares the text of its ids with that of the same ids and
new ones, says what was added, and drops the prompt's ids. With the decoders that `_reads_from_anywhere` knows, the ids
before that token change nothing behind it, or behind the character that it is part of; of its own text, perhaps the
beginning, a space more or less. So what is added is the same, unless the text ends with U+FFFD: there the stream awaits
the rest of a character. Then all ids are kept, since upstream gives out the prompt's whole text with the first output.
They also are where the prompt is short, where none of its last 1,024 ids is such a token, where the decoder is another
one, and where the stream is not tokenizers' own (VLLM_USE_FASTOKENS). Upstream still makes a stream of all ids first,
as it refuses some; that takes about a millisecond for 131,072.

It concerns front-ends; where configurations are made it is applied with those that concern these.

Can go: when `FastIncrementalDetokenizer` decodes no more than a prompt's end, as `SlowIncrementalDetokenizer` does.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_INIT = {"7790834a246d20c1"}  # 0.32.0
_KNOWN_NEXT = {"b1e155bef256ef95"}  # 0.32.0
_KNOWN_STEP = {"997663f18675ab7c"}  # 0.32.0

_SHORT, _LONG = 64, 1024  # ids that are always kept, and the most that are looked at for where to begin
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no whole character
_STAGES = re.compile("(ByteLevel )|(WordPiece )|(Replace )?(ByteFallback )?(Metaspace )?(Fuse )?(Strip )?")


def apply() -> Outcome:
    """Give the front-end's decode streams the end of prompts only. Idempotent.

    Raises `PatchError` if `FastIncrementalDetokenizer` is not the known one.
    """
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    return replace(
        __name__,
        Guarded(FastIncrementalDetokenizer, "__init__", _KNOWN_INIT, _with_a_short_stream),
        Guarded(FastIncrementalDetokenizer, "decode_next", _KNOWN_NEXT),
        Guarded(FastIncrementalDetokenizer, "_protected_step", _KNOWN_STEP),
    )


def _with_a_short_stream(original: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.tokenizers import decoders as native

    def __init__(self: Any, tokenizer: Any, request: Any) -> None:
        original(self, tokenizer, request)
        ids = request.prompt_token_ids
        if ids is None or type(self.stream) is not native.DecodeStream or not isinstance(self.tokenizer, Tokenizer):
            return
        start = start_of_end(self.tokenizer, ids, self.skip_special_tokens)
        if start:
            self.stream = native.DecodeStream(ids=ids[start:], skip_special_tokens=self.skip_special_tokens)

    return __init__


def start_of_end(tokenizer: Any, ids: list[int], skip_special_tokens: bool) -> int:
    """Index of the id from which on a stream needs a prompt's ids: 0 if it is not known to do without the first ones.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        ids: the prompt's ids, which may be outside the vocabulary.
        skip_special_tokens: whether specials have no text.
    """
    if len(ids) <= _SHORT or not _reads_from_anywhere(tokenizer.decoder):
        return 0
    for start in range(len(ids) - _SHORT, max(len(ids) - _LONG, 0), -1):
        first = tokenizer.decode(ids[start : start + 1], skip_special_tokens=skip_special_tokens)
        # Not a special one, nor spaces that are stripped, nor a byte: ByteFallback reads a run of bytes as a whole.
        if first and not tokenizer.id_to_token(ids[start]).startswith("<0x"):
            text = tokenizer.decode(ids[start:], skip_special_tokens=skip_special_tokens)
            return 0 if text.endswith(_UNFINISHED) else start
    return 0


def _reads_from_anywhere(decoder: Any) -> bool:
    """Whether what comes before a token changes of the text from it on no more than the token's own beginning.

    True of decoders that take token by token (the first of all may lose spaces), and of one that strips or joins these
    texts in the end. Not of `Strip` at the end of a text, of `Replace` in joined texts, nor of what is not known here.
    """
    if decoder is None:
        return True  # tokens, and spaces between them
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # one that is written in Python has no state to read; tokenizers raises no narrower class
        return False
    stages = state["decoders"] if state["type"] == "Sequence" else [state]
    return (
        _STAGES.fullmatch("".join(f"{stage['type']} " for stage in stages)) is not None
        and all(stage["content"] == " " for stage in stages if stage["type"] == "Replace")  # which makes no byte token
        and all(stage["stop"] == 0 for stage in stages if stage["type"] == "Strip")
    )
