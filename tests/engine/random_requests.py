# SPDX-License-Identifier: Apache-2.0
"""Random requests with everything that a client can ask an engine for, and what two engines answered compared."""

from __future__ import annotations

import asyncio
import math
import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from .harness import Engine, prompt

KINDS = 512
WORDS = ("a b", " the", "ab", " q", "xy z", "no such", "e", "th", " K", "zz")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "a" tail | "b" tail\ntail ::= [0-9] | [0-9] tail'


@dataclass
class Case:
    """One request.

    ``given`` is vLLM's prompt; ``params`` are of ``SamplingParams``, or ``pooling`` is asked for. ``leave_after`` and
    ``abort_after``: its client leaves, or another one aborts it by its id, once it has so many tokens. ``alone``: its
    salt or a like is nobody else's, so that nothing of it can be cached.
    """

    given: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    priority: int = 0
    rank: int | None = None
    pooling: bool = False
    leave_after: int | None = None
    abort_after: int | None = None
    alone: bool = False
    tokenization: dict[str, Any] | None = None

    @property
    def cut(self) -> bool:
        return self.leave_after is not None or self.abort_after is not None

    def sampling(self) -> SamplingParams:
        made: dict[str, Any] = dict(self.params)
        if "structured" in made:
            made["structured_outputs"] = StructuredOutputsParams(**made.pop("structured"))
        if "repeating" in made:
            made["repetition_detection"] = RepetitionDetectionParams(**made.pop("repeating"))
        made["output_kind"] = RequestOutputKind[made.pop("kind", "CUMULATIVE")]
        return SamplingParams(**made)


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] | None = None
    finish: str | None = None
    stop: Any = None
    cumulative_logprob: float | None = None


@dataclass
class Seen:
    """What a client saw; ``wrong`` is what no client should see in any engine."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_logprobs: Any = None
    prompt_tokens: list[int] | None = None
    prompt: str | None = None
    cached: int | None = None
    finished: bool = False
    error: tuple[str, str] | None = None
    wrong: list[str] = field(default_factory=list)


class Maker:
    """Makes requests.

    Args:
        longest: tokens of the longest request there may be.
        greedy: whether none has a temperature; ``drafting``: whether none has what drafts forbid.
        embeddings: the model's, if prompts may be given as such.
    """

    def __init__(
        self, seed: int, longest: int, *, drafting: bool = False, ranks: int = 1, embeddings: torch.Tensor | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.seed, self.longest, self.drafting, self.ranks, self.embeddings = seed, longest, drafting, ranks, embeddings
        self.stems = [prompt(self.rng.choice([70, 300, 700, 1500]), 7000 * seed + i) for i in range(4)]
        self.made: list[list[int]] = []
        self.serial = 0

    def many(self, count: int) -> list[Case]:
        """So many, that come within some seconds."""
        cases, at = [], 0.0
        for _ in range(count):
            case = self.one()
            case.delay = at
            cases.append(case)
            at += self.rng.choice([0.0, 0.0, 0.01, 0.05, 0.15])
        return cases

    def chance(self, part: float) -> bool:
        return self.rng.random() < part

    def tokens(self) -> list[int]:
        """Mostly short, a long tail; some begin as others do, or are others."""
        rng, self.serial = self.rng, self.serial + 1
        if self.made and self.chance(0.15):
            tokens = list(rng.choice(self.made))
            return tokens[: rng.randint(1, len(tokens))] if self.chance(0.3) else tokens
        if self.chance(0.03):
            length = self.longest - rng.choice([-2, -1, 0, 1, 2, 3, 20])
        else:
            length = min(self.longest - 80, int(rng.paretovariate(0.8) * 50) + rng.randint(0, 30))
        stem = rng.choice(self.stems) if self.chance(0.25) else []
        tokens = [*stem, *prompt(length, 100_000 * self.seed + self.serial)][: max(1, length)]
        self.made.append(tokens)
        return tokens

    def one(self) -> Case:
        rng = self.rng
        if self.chance(0.08):
            return self.bad()
        tokens = self.tokens()
        given: dict[str, Any] = {"prompt_token_ids": tokens}
        case = Case(given)
        params = case.params
        params["max_tokens"] = rng.choice([1, 2, 5, 12, 12, 30, 30, 90])
        if self.chance(0.02) and len(tokens) < self.longest:
            params["max_tokens"] = None if self.longest - len(tokens) < 300 else 200
        if self.chance(0.05):
            given.clear()
            given["prompt"] = " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 20, 400])))
            if self.chance(0.5):
                case.tokenization = {"truncate_prompt_tokens": rng.choice([1, 7, 100])}
        elif self.embeddings is not None and self.chance(0.1):
            given.clear()
            given["prompt_embeds"] = self.embeddings[tokens]
        if self.chance(0.1):
            given["cache_salt"] = rng.choice(["s", "t", f"only-{self.seed}-{self.serial}"])
            case.alone = given["cache_salt"].startswith("only")
        self.sampling(params)
        if "prompt_embeds" in given:  # vLLM counts the prompt that its row in the batch had before
            params.pop("repetition_penalty", None)
        self.ends(params)
        self.told(params)
        if self.chance(0.1):
            self.structured(params)
        if self.chance(0.12):
            setattr(case, rng.choice(["leave_after", "abort_after"]), rng.choice([0, 1, 3, 10]))
        if self.chance(0.3):
            case.priority = rng.randint(-3, 3)
        if self.chance(0.1):
            case.rank = rng.randrange(self.ranks)
        return case

    def sampling(self, params: dict[str, Any]) -> None:
        """How tokens are chosen."""
        rng = self.rng
        params["temperature"] = 0.0
        if self.chance(0.35) and not self.drafting:
            params |= dict(temperature=rng.choice([0.3, 0.8, 1.0, 1.7]), seed=rng.randrange(1 << 40))
            if self.chance(0.4):
                params["top_p"] = rng.choice([0.3, 0.9, 0.99])
            if self.chance(0.4):
                params["top_k"] = rng.choice([-1, 1, 5, 50, 600])
            if self.chance(0.3):
                params["min_p"] = rng.choice([0.01, 0.2])
        if self.chance(0.2):
            params["n"] = rng.choice([2, 3, 5])
        for name, values in (
            ("presence_penalty", (-1.5, 0.7, 2.0)),
            ("frequency_penalty", (-0.8, 0.6, 2.0)),
            ("repetition_penalty", (0.8, 1.1, 1.6)),
        ):
            if self.chance(0.1):
                params[name] = rng.choice(values)
        if self.chance(0.1) and not self.drafting:
            params["logit_bias"] = {rng.randrange(3, KINDS): rng.uniform(-9, 9) for _ in range(rng.randint(1, 6))}
        if self.chance(0.06):
            params["bad_words"] = rng.sample(WORDS, rng.randint(1, 3))
        if self.chance(0.07):
            params["allowed_token_ids"] = rng.sample(range(KINDS), rng.choice([1, 4, 200]))

    def ends(self, params: dict[str, Any]) -> None:
        """When it ends."""
        rng = self.rng
        params["ignore_eos"] = self.chance(0.6)
        if self.chance(0.15):
            params["stop"] = rng.choice([["e"], ["th", "q"], ["a b", " the "], "ab"])
            params["include_stop_str_in_output"] = self.chance(0.5)
        if self.chance(0.15):
            params["stop_token_ids"] = rng.sample(range(KINDS), rng.choice([1, 20, 120]))
        if self.chance(0.1) and not self.drafting:
            params["min_tokens"] = rng.randint(0, params["max_tokens"] or 5)
        if self.chance(0.04):
            params["repeating"] = dict(max_pattern_size=4, min_pattern_size=1, min_count=3)

    def told(self, params: dict[str, Any]) -> None:
        """What the client is told, and how."""
        rng = self.rng
        if self.chance(0.3):
            params["logprobs"] = rng.choice([0, 1, 5, 20])
        if self.chance(0.02):
            params["logprobs"] = -1
        if self.chance(0.08):
            params["prompt_logprobs"] = rng.choice([0, 1, 4])
        if self.chance(0.1):
            params["flat_logprobs"] = True
        if self.chance(0.08) and "stop" not in params:
            params["detokenize"] = False
        if self.chance(0.2):
            params["skip_special_tokens"] = False
        if self.chance(0.1):
            params["spaces_between_special_tokens"] = False
        if self.chance(0.1):
            params["stream_interval"] = rng.choice([2, 7])
        if self.chance(0.05):
            params["skip_reading_prefix_cache"] = True
        params["kind"] = rng.choice(["CUMULATIVE", "CUMULATIVE", "DELTA", "FINAL_ONLY"])

    def structured(self, params: dict[str, Any]) -> None:
        for name in ("allowed_token_ids", "bad_words", "stop_token_ids", "min_tokens", "logit_bias", "repeating"):
            params.pop(name, None)
        params["structured"] = self.rng.choice(
            [
                {"json": SCHEMA},
                {"regex": "[ab]{3}-[0-9]+(x|y)"},
                {"choice": ["yes", "no way", "perhaps"]},
                {"grammar": GRAMMAR},
                {"json_object": True},
            ]
        )
        params["ignore_eos"] = False
        params["max_tokens"] = self.rng.choice([3, 40])

    def bad(self) -> Case:
        """What an engine refuses, or might."""
        rng = self.rng
        tokens = prompt(rng.choice([5, 900]), self.serial)
        case = Case({"prompt_token_ids": tokens}, dict(max_tokens=4, temperature=0.0))
        case.params |= rng.choice(
            [
                {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"logprobs": 21}, {"logprobs": -2},
                {"prompt_logprobs": 21}, {"logit_bias": {KINDS: 1.0}}, {"allowed_token_ids": []},
                {"allowed_token_ids": [KINDS + 5]}, {"min_tokens": 5}, {"stop": ["x"], "detokenize": False},
                {"bad_words": [""]}, {"structured": {"grammar": "root ::= ("}}, {"structured": {"regex": "("}},
                {"structured": {"json": {"type": "no such"}}}, {"structured": {"choice": []}}, {"n": 0},
                {"thinking_token_budget": 5}, {"trace_decode_token_ids": [5, 6]}, {"repetition_penalty": 0.0},
                {"stop_token_ids": [KINDS + 9]}, {"stream_interval": 0}, {"watermarking": True},
                {"prompt_logprob_token_ids": [[1]] * 4}, {"routed_experts_prompt_start": 9999}, {"min_p": 0.5},
                {"seed": -1}, {"seed": 1 << 63}, {"prompt_logprobs": -1}, {"structured": {"json_object": False}},
            ]
        )  # fmt: skip
        if self.chance(0.3):
            case.params = dict(max_tokens=4, temperature=0.0)
            case.given = rng.choice(
                [
                    {"prompt_token_ids": []}, {"prompt": ""}, {"prompt_token_ids": [KINDS + 90]},
                    {"prompt_token_ids": [KINDS - 1, 0, 1, 2]},
                    {"prompt_embeds": torch.zeros(3, 128)}, {"prompt_token_ids": [5, 6], "cache_salt": ""},
                    {"prompt_token_ids": prompt(self.longest + 1, 5)}, {"prompt_token_ids": prompt(self.longest, 5)},
                    {"prompt_token_ids": [7, 8], "multi_modal_data": {"image": 3}},
                ]
            )  # fmt: skip
        case.pooling = self.chance(0.05)
        return case


async def watch(engine: Engine, case: Case, request_id: str) -> Seen:
    """Ask, as its client would."""
    await asyncio.sleep(case.delay)
    seen = Seen()
    try:
        if case.pooling:
            async for _ in engine.llm.encode(case.given, PoolingParams(), request_id):
                pass
            return seen
        sampling = case.sampling()
        stream = engine.llm.generate(
            case.given,
            sampling,
            request_id,
            priority=case.priority,
            data_parallel_rank=case.rank if engine.ranks > 1 else None,
            tokenization_kwargs=case.tokenization,
        )
        delta = sampling.output_kind is RequestOutputKind.DELTA
        if case.leave_after == 0:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return seen
        async for output in stream:
            take(seen, output, delta)
            most = max((len(choice.tokens) for choice in seen.choices.values()), default=0)
            if case.leave_after is not None and most >= case.leave_after:
                break
            if case.abort_after is not None and most >= case.abort_after and not seen.finished:
                await engine.llm.abort(request_id)
        await stream.aclose()
    except Exception as error:
        seen.error = type(error).__name__, plain(str(error))
        if error.__cause__ is not None:
            seen.error = seen.error[0], f"{seen.error[1]} <- {type(error.__cause__).__name__}: {error.__cause__}"
    return seen


def plain(words: str) -> str:
    """Without addresses and ids."""
    return re.sub(r"0x[0-9a-f]+|ask-\S+", "*", words)


def take(seen: Seen, output: Any, delta: bool) -> None:
    """An update; what came before must be its beginning."""
    if seen.finished:
        seen.wrong.append("an update after the last one")
    seen.finished = output.finished
    seen.cached = output.num_cached_tokens
    if output.prompt_logprobs or (output.prompt_logprobs is not None and seen.prompt_logprobs is None):
        seen.prompt_logprobs = output.prompt_logprobs
    seen.prompt_tokens, seen.prompt = output.prompt_token_ids, output.prompt
    for one in output.outputs:
        choice = seen.choices.setdefault(one.index, Choice())
        if choice.finish is not None and (one.token_ids or one.finish_reason is None) and delta:
            seen.wrong.append("tokens after a choice's end")
        new, text = list(one.token_ids), one.text
        if delta:
            new, text = choice.tokens + new, choice.text + text
        elif new[: len(choice.tokens)] != choice.tokens:
            seen.wrong.append(f"{choice.tokens} became {new}")
        elif not text.startswith(choice.text) and one.finish_reason is None:
            seen.wrong.append(f"{choice.text!r} became {text!r}")
        choice.tokens, choice.text = new, text
        if one.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *one.logprobs] if delta else list(one.logprobs)
            if len(choice.logprobs) != len(new):
                seen.wrong.append(f"{len(choice.logprobs)} logprobs of {len(new)} tokens")
        choice.finish, choice.stop = one.finish_reason, one.stop_reason
        if one.cumulative_logprob is not None and not math.isnan(one.cumulative_logprob):
            choice.cumulative_logprob = one.cumulative_logprob
