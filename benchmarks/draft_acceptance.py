#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many drafts of sharded requests are right, next to stock vLLM's of the same requests.

    python examples/make_moe.py --out MODEL
    python benchmarks/draft_acceptance.py --folder EMPTY --methods text --model MODEL --lengths 2000,8000 --out FILE
    python benchmarks/draft_acceptance.py --folder EMPTY --methods eagle,mtp,ngram --lengths 2000,8000 --out FILE

Asks stock vLLM, one rank, and the plugin for the same greedy tokens with drafts. Of each method and length: the
acceptance length (tokens a step with drafts: 1 + accepted / steps that had drafts) of stock, and of the plugin's
sharded requests by its own metrics, what both are made of, and whether all tokens are equal. Rows are added to those
that are in the file.

``text``: a real model, and n-grams over a real text: the texts in this repository, as often as it takes. Each request
asks for a paragraph of it, whose first words the answer begins with, so that there is something to be found. All
requests of a length have the text in common, which is computed once (prefix caching).

``ngram``, ``eagle``, ``mtp``: tiny targets with random prompts (``tests/tiny_drafts.py``), written into the folder.
Their next token hangs on the last one nearly alone, so that heads without training know it, and n-grams find it once
the output repeats itself: what is compared is both systems' drafts, not a trained model's quality. ``--tiny`` has
sizes of these: without it four layers of four heads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept_result import about, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MOST = 3
TEXTS = ("examples/text/constitution.txt", "LICENSE")
# Words of a paragraph that the question names, and that the answer begins with.
NAMED, BEGUN = 6, 8
# Tokens that no request makes: near a model's longest request vLLM drafts for nobody.
ROOM = 64
METRICS = ("drafts", "draft_tokens", "accepted_tokens")


@dataclass
class Case:
    """A model, how it drafts, and what it is asked: by length, prompts as token ids."""

    model: Path
    drafts: dict[str, Any]
    prompts: dict[int, list[list[int]]]
    shared: bool = False


def ngram(most: int) -> dict[str, Any]:
    return dict(method="ngram", num_speculative_tokens=MOST, prompt_lookup_min=1, prompt_lookup_max=most)


def tiny_case(method: str, args: argparse.Namespace) -> Case:
    from tests.tiny_drafts import drafts, make_eagle, make_first_order, make_glm4_moe

    sizes = {"max_position_embeddings": max(8192, max(args.lengths) + 2 * args.output)} | args.tiny
    heads = {name: size for name, size in sizes.items() if name != "num_layers"}
    folder = args.folder / method
    if method == "mtp":
        model, config = make_glm4_moe(folder, **sizes), dict(method="mtp", num_speculative_tokens=MOST)
    else:
        model = make_first_order(folder, **sizes)
        config = ngram(3) if method == "ngram" else drafts(make_eagle(args.folder / "head", **heads), "eagle", MOST)
    dice = {length: random.Random(length) for length in args.lengths}
    prompts = {n: [dice[n].choices(range(3, 512), k=n) for _ in range(args.requests)] for n in args.lengths}
    return Case(model, config, prompts)


def text_case(args: argparse.Namespace) -> Case:
    """Prompts of exactly so many tokens: the text is cut to what the question leaves."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    text = "\n\n".join((ROOT / name).read_text() for name in TEXTS)
    once, mark = encode(text), "@@"
    prompts: dict[int, list[list[int]]] = {}
    for length in args.lengths:
        repeated = once * -(-length // len(once))
        # Paragraphs that are surely in the text, spread over it; no longer ones than are asked for.
        known = tokenizer.decode(repeated[: length * 3 // 4])
        paragraphs = [one for one in re.split(r"\s*\n\s*\n\s*", known)[:-1] if len(one.split()) > 40]
        step = max(1, len(paragraphs) // args.requests)
        prompts[length] = []
        for paragraph in paragraphs[::step][: args.requests]:
            words = paragraph.split()
            question = f'{mark}\n\nQuote the paragraph that begins with "{" ".join(words[:NAMED])}" word for word.'
            asked = [{"role": "user", "content": question}]
            chat = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            before, after = chat.split(mark)
            head, tail = encode(before), encode(after + " ".join(words[:BEGUN]))
            prompts[length].append([*head, *repeated[: length - len(head) - len(tail)], *tail])
    return Case(args.model, ngram(4), prompts, shared=True)


class Counts:
    """An engine's counters of drafts, since the last look."""

    def __init__(self, llm: Any, prefix: str) -> None:
        self._llm, self._names = llm, [prefix + name for name in METRICS]
        self._before = self._now()

    def _now(self) -> list[int]:
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        return [int(values[name]) for name in self._names]

    def since(self) -> dict[str, int]:
        now = self._now()
        found = {name: new - old for name, new, old in zip(METRICS, now, self._before, strict=True)}
        self._before = now
        return found


def length_of(counts: dict[str, int]) -> float:
    return 1 + counts["accepted_tokens"] / counts["drafts"]


def measure(case: Case, args: argparse.Namespace, ranks: int) -> dict[int, tuple[dict[str, Any], list[Sequence[int]]]]:
    """By prompt length: what was counted, and the tokens made."""
    from vllm import LLM, SamplingParams

    longest = max(args.lengths) + args.output
    needed = args.requests * (longest + 32) if not case.shared else longest + args.requests * (args.output + 512)
    engine = dict(
        speculative_config=dict(case.drafts),
        max_model_len=longest + ROOM,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        num_gpu_blocks_override=2 * needed // 32,
        block_size=32,
        gpu_memory_utilization=0.3,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=case.shared,
        disable_log_stats=False,
    )
    if ranks > 1:
        config = {"nanocp": {"ranks": ranks, "segment_size": args.segment_size}}
        engine |= dict(enable_expert_parallel=True, additional_config=config)
    llm = LLM(str(case.model), **engine | args.engine)
    counts = Counts(llm, "vllm:nanocp_spec_decode_" if ranks > 1 else "vllm:spec_decode_num_")
    params = SamplingParams(max_tokens=args.output, temperature=0.0, ignore_eos=True)
    found: dict[int, tuple[dict[str, Any], list[Sequence[int]]]] = {}
    for length, prompts in case.prompts.items():
        began = time.monotonic()
        asks: list[Any] = [dict(prompt_token_ids=tokens) for tokens in prompts]
        if case.shared:
            llm.generate(asks[:1], SamplingParams(max_tokens=1), use_tqdm=False)
        made = llm.generate(asks, params, use_tqdm=False)
        took = round(time.monotonic() - began, 1)
        found[length] = counts.since() | {"seconds": took}, [one.outputs[0].token_ids for one in made]
        print(ranks, length, found[length][0], file=sys.stderr, flush=True)
        llm.reset_prefix_cache()
    llm.llm_engine.engine_core.shutdown()
    return found


def compare(method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    case = text_case(args) if method == "text" else tiny_case(method, args)
    stock, ours = measure(case, args, 1), measure(case, args, args.ranks)
    rows = []
    for length, prompts in case.prompts.items():
        (theirs, expected), (sharded, tokens) = stock[length], ours[length]
        rows.append(
            dict(
                method=method,
                tokens=length,
                requests=len(prompts),
                stock=round(length_of(theirs), 3),
                sharded=round(length_of(sharded), 3),
                ratio=round(length_of(sharded) / length_of(theirs), 3),
                same_tokens=sum(map(lambda a, b: list(a) == list(b), tokens, expected)),
                raw=dict(stock=theirs, sharded=sharded),
                settings={name: getattr(args, name) for name in ("ranks", "segment_size", "output", "tiny", "engine")},
            )
        )
    return rows


def machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[2000, 8000])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["ngram", "eagle", "mtp"])
    parser.add_argument("--model", type=Path, help="of text")
    parser.add_argument("--tiny", type=json.loads, default={}, help="sizes of the tiny targets, a JSON object")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of vLLM's arguments, a JSON object")
    parser.add_argument("--out", type=Path)
    for name, value in dict(ranks=2, segment_size=1024, requests=4, output=96).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if "text" in args.methods and args.model is None:
        parser.error("text needs --model")
    import torch
    import vllm

    before = json.loads(args.out.read_text())["runs"] if args.out and args.out.exists() else []
    run = {**about(vllm, torch), "machine": machine(), "rows": []}
    what = "acceptance length: 1 + accepted / steps that had drafts; sharded: of the plugin's sharded requests"
    for method in args.methods:
        run["rows"] += compare(method, args)
        write({"what": what, "runs": [*before, run]}, args.out)


if __name__ == "__main__":
    main()
