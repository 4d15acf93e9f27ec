# SPDX-License-Identifier: Apache-2.0
"""`detokenizer_prompt`: pieces of text are upstream's, whatever tokenizer and prompt; the first is as fast."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tokenizers_at_hand import BUILT, OTHERS, REAL, TEXT, with_specials
from vllm_nanocp.patches import Outcome, PatchError, detokenizer_prompt

pytest.importorskip("vllm")

PROMPTS = int(os.environ.get("NANOCP_PROMPTS", "150"))  # random ones of each tokenizer
FIRST = int(os.environ.get("NANOCP_FIRST_WORLD", "0"))
Maker = Callable[..., Any]


@pytest.fixture
def fast(stock: Any) -> Any:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    return stock(FastIncrementalDetokenizer, "__init__")


@pytest.fixture
def both(fast: Any) -> tuple[Maker, Maker]:
    """What makes upstream's detokenizer of a prompt, and the patched one."""
    upstream = fast.__init__
    assert detokenizer_prompt.apply() is Outcome.APPLIED
    assert detokenizer_prompt.apply() is Outcome.APPLIED

    def maker(start: Any) -> Maker:
        def make(tokenizer: Any, ids: list[int] | None, **params: Any) -> Any:
            from vllm import SamplingParams

            detokenizer = object.__new__(fast)
            request = SimpleNamespace(
                request_id="r", prompt_token_ids=ids, prompt_embeds=None, sampling_params=SamplingParams(**params)
            )
            start(detokenizer, SimpleNamespace(_tokenizer=tokenizer), request)
            return detokenizer

        return make

    return maker(upstream), maker(fast.__init__)


class Prompts:
    """Random ids of a tokenizer: any, specials, parts of characters, spaces, ids that it has not, and text."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        size = tokenizer.get_vocab_size()
        some = rng.sample(range(size), min(size, 3000))
        texts = {one: tokenizer.decode([one], skip_special_tokens=False) for one in some}
        parts = [one for one, text in texts.items() if "\ufffd" in text]
        named = [index for token, index in tokenizer.get_vocab().items() if token.startswith("<0x")]
        self.rng, self.text = rng, tokenizer.encode(TEXT, add_special_tokens=False).ids
        self.kinds = [
            range(size + 20),
            list(tokenizer.get_added_tokens_decoder()),
            parts or some,
            named or parts or some,
            [one for one, text in texts.items() if not text.strip()] or some,
        ]

    def ids(self, length: int) -> list[int]:
        """Stretches of few kinds, so that an end of one kind is as long as 3,000 ids now and then."""
        found: list[int] = []
        while len(found) < length:
            stretch = self.rng.choice((1, 2, 5, 20, 70, 1100))
            if self.rng.random() < 0.3:
                begin = self.rng.randrange(len(self.text))
                found += self.text[begin : begin + stretch]
            else:
                found += self.rng.choices(self.rng.choice(self.kinds), k=stretch)
        return found[len(found) - length :]

    def prompt(self) -> list[int]:
        return self.ids(self.rng.choice((0, 1, 60, 64, 65, 66, 90, 300, 1023, 1024, 1025, 1026, 1200, 3000)))


def pieces(detokenizer: Any, ids: list[int]) -> list[Any]:
    """The text that came with each id, or the error that did."""
    found = []
    for one in ids:
        try:
            found.append(detokenizer.decode_next(one))
        except BaseException as error:  # tokenizers' panics are no `Exception`
            return [*found, repr(error)]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*BUILT, *OTHERS, *REAL])
def test_pieces_are_upstreams(name: str, both: tuple[Maker, Maker]) -> None:
    if name in ("mistral", "tekken"):
        pytest.importorskip("mistral_common")
    tokenizer = with_specials({**BUILT, **OTHERS, **REAL}[name]())
    rng = random.Random(FIRST)
    prompts, cut, waited, said = Prompts(tokenizer, rng), 0, 0, 0
    for _ in range(PROMPTS):
        ids, new = prompts.prompt(), prompts.ids(rng.choice((1, 3, 12)))
        params = {"skip_special_tokens": rng.random() < 0.5, "spaces_between_special_tokens": rng.random() < 0.5}
        expected, ours = (pieces(make(tokenizer, ids, **params), new) for make in both)
        assert ours == expected, (ids, new, params)
        start = detokenizer_prompt.start_of_end(tokenizer, ids, params["skip_special_tokens"])
        cut += start > 0
        waited += start > 0 and expected[0] == ""
        said += start > 0 and any(expected)
    if name in OTHERS:
        assert not cut
    else:
        assert PROMPTS > cut > PROMPTS / 4 and said > cut / 4, "nearly all, or nearly none, are short"
        assert waited, "no character was awaited"


LONG = 40_000


def first_s(make: Maker, tokenizer: Any, ids: list[int]) -> float:
    """Seconds until the text of a first token, without those that it takes to make the detokenizer."""
    detokenizer = make(tokenizer, ids)
    begin = time.perf_counter()
    assert pieces(detokenizer, ids[:1]) == ["The"]
    return time.perf_counter() - begin


def test_only_the_end_is_decoded(both: tuple[Maker, Maker]) -> None:
    tokenizer = BUILT["byte level"]()
    text = tokenizer.encode(TEXT).ids
    ids = (text * (LONG // len(text) + 1))[:LONG]
    assert 0 < LONG - detokenizer_prompt.start_of_end(tokenizer, ids, True) < 80
    upstream, ours = (min(first_s(make, tokenizer, ids) for _ in range(3)) for make in both)
    assert upstream > 20 * ours, "it is about 300 times"


@pytest.mark.parametrize("skip", [True, False])
def test_where_all_is_kept(skip: bool) -> None:
    tokenizer = with_specials(BUILT["byte level"]())
    text, party = (tokenizer.encode(one).ids for one in (TEXT * 4, "\N{PARTY POPPER}"))
    special = tokenizer.token_to_id("<s>")

    def start(ids: list[int]) -> int:
        return detokenizer_prompt.start_of_end(tokenizer, ids, skip)

    assert start(text) and start(text + party) and start(text + [special] * 300)
    assert not start(text[:64]), "short"
    assert not start(text + party[:-1]), "within a character: upstream gives all out"
    assert bool(start(text + [special] * 1024)) is not skip, "no text"


def test_bytes_are_read_as_a_whole(both: tuple[Maker, Maker]) -> None:
    tokenizer = BUILT["llama 2"]()
    lead, letter = tokenizer.token_to_id("<0xE3>"), tokenizer.token_to_id("<0x41>")
    ids = [*tokenizer.encode(TEXT * 4).ids, lead, *[letter] * 80]
    upstream, ours = (pieces(make(tokenizer, ids), ids[:1]) for make in both)
    assert ours == upstream and len(upstream[0]) > len(TEXT), "one wrong byte, and none of the run is a character"
    assert detokenizer_prompt.start_of_end(tokenizer, [*ids[:-80], *[letter] * 1100], True) == 0


@pytest.mark.parametrize(("name", "last", "new"), [("llama 2", [], "▁know?"), ("three spaces", ["▁"], "▁▁")])
def test_spaces_are_stripped_at_the_beginning_only(
    both: tuple[Maker, Maker], name: str, last: list[str], new: str
) -> None:
    tokenizer = with_specials(BUILT[name]())
    *spaces, special, token = (tokenizer.token_to_id(one) for one in (*last, "<s>", new))
    ids = [*tokenizer.encode(TEXT * 4).ids, *spaces, *[special] * (64 - len(spaces))]
    assert [pieces(make(tokenizer, ids), [token]) for make in both] == [[new.replace("▁", " ")]] * 2


def test_an_end_is_not_stripped() -> None:
    from tokenizers import decoders

    tokenizer = BUILT["gemma"]()
    ids = tokenizer.encode(TEXT * 4).ids
    assert detokenizer_prompt.start_of_end(tokenizer, ids, True)
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    assert not detokenizer_prompt.start_of_end(tokenizer, ids, True)


def test_a_stream_of_another_kind_is_left_alone(both: tuple[Maker, Maker], monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers.decoders

    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", lambda ids, skip_special_tokens: ids)
    tokenizer = BUILT["byte level"]()
    ids = tokenizer.encode(TEXT * 4).ids
    assert both[1](tokenizer, ids).stream is ids, "VLLM_USE_FASTOKENS"


def test_prompts_without_ids_and_with_wrong_ones(both: tuple[Maker, Maker]) -> None:
    tokenizer = BUILT["byte level"]()
    ids = tokenizer.encode(TEXT * 4).ids
    for make in both:
        assert pieces(make(tokenizer, None), ids[:1]) == ["The"], "embeddings"
        with pytest.raises(OverflowError):
            make(tokenizer, [-1, *ids])


def test_another_upstream_is_refused(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_next(self: Any, next_token_id: int) -> str:
        return ""

    monkeypatch.setattr(fast, "decode_next", decode_next)
    with pytest.raises(PatchError, match="detokenizer_prompt"):
        detokenizer_prompt.apply()
