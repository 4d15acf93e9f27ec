#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many drafts of sharded requests are right, next to stock vLLM's of the same requests.

    python benchmarks/draft_acceptance.py --folder EMPTY --lengths 2000,4000,8000

Writes tiny targets into a folder (``tests/tiny_drafts.py``) and asks stock vLLM, one rank, and the plugin for the same
greedy tokens, with drafts by n-grams, by an EAGLE head and by an MTP layer. Prints JSON: for each method and length the
acceptance length (tokens a step with drafts: 1 + accepted / steps that had drafts) of stock, and of the plugin's
sharded requests by its own metrics, and whether all tokens are equal.

The targets' next token hangs on the last one nearly alone, so that heads without training know it, and n-grams find it
once the output repeats itself: what is compared is both systems' drafts, not a trained model's quality.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MOST = 3


def targets(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By method: the model to serve, and how it drafts."""
    from tests.tiny_drafts import drafts, make_eagle, make_first_order, make_glm4_moe

    first, head = make_first_order(folder / "first-order"), make_eagle(folder / "eagle")
    ngram = dict(method="ngram", num_speculative_tokens=MOST, prompt_lookup_min=1, prompt_lookup_max=3)
    return {
        "ngram": (first, ngram),
        "eagle": (first, drafts(head, "eagle", MOST)),
        "mtp": (make_glm4_moe(folder / "glm4-moe"), dict(method="mtp", num_speculative_tokens=MOST)),
    }


class Counts:
    """An engine's counters of drafts, since the last look."""

    def __init__(self, llm: Any, prefix: str, names: tuple[str, str]) -> None:
        self._llm, self._names = llm, [prefix + name for name in names]
        self._before = self._now()

    def _now(self) -> list[float]:
        values = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        return [values[name] for name in self._names]

    def length(self) -> float:
        now = self._now()
        steps, accepted = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return round(1 + accepted / steps, 3)


def measure(
    model: Path, drafts: dict[str, Any], args: argparse.Namespace, ranks: int
) -> tuple[dict[int, float], dict[int, list[list[int]]]]:
    """By prompt length: the acceptance length, and the tokens made."""
    from vllm import LLM, SamplingParams

    ours = dict(
        enable_expert_parallel=True,
        additional_config={"nanocp": {"ranks": ranks, "segment_size": args.segment_size}},
    )
    llm = LLM(
        str(model),
        **(ours if ranks > 1 else {}),  # type: ignore[arg-type]
        speculative_config=dict(drafts),
        max_model_len=8192,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        num_gpu_blocks_override=2048,
        block_size=32,
        gpu_memory_utilization=0.3,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    names = ("drafts", "accepted_tokens")
    counts = Counts(llm, "vllm:nanocp_spec_decode_" if ranks > 1 else "vllm:spec_decode_num_", names)
    params = SamplingParams(max_tokens=args.output, temperature=0.0, ignore_eos=True)
    found: dict[int, float] = {}
    tokens: dict[int, list[list[int]]] = {}
    for length in args.lengths:
        dice = random.Random(length)
        prompts = [dict(prompt_token_ids=dice.choices(range(3, 512), k=length)) for _ in range(args.requests)]
        made = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        tokens[length] = [list(one.outputs[0].token_ids) for one in made]
        found[length] = counts.length()
    llm.llm_engine.engine_core.shutdown()
    return found, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[2000, 4000, 8000]
    )
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["ngram", "eagle", "mtp"])
    for name, value in dict(ranks=2, segment_size=1024, requests=4, output=96).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    import vllm

    made = targets(args.folder)
    rows = []
    for method in args.methods:
        stock, expected = measure(*made[method], args, 1)
        ours, tokens = measure(*made[method], args, args.ranks)
        rows += [
            dict(
                method=method,
                tokens=length,
                stock=stock[length],
                sharded=ours[length],
                ratio=round(ours[length] / stock[length], 3),
                same_tokens=tokens[length] == expected[length],
            )
            for length in args.lengths
        ]
    settings = {name: value for name, value in vars(args).items() if name != "folder"}
    command = "python benchmarks/draft_acceptance.py --folder EMPTY"
    print(json.dumps(dict(command=command, vllm=vllm.__version__, settings=settings, rows=rows), indent=1))


if __name__ == "__main__":
    main()
