#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much sooner a long prompt's first token comes when its ranks compute its chunks together.

    python benchmarks/parallel_prefill.py --model MODEL --tokens 12000

Two engines, one after the other, alike but for ``parallel_prefill``; one prompt of random tokens at a time, and nothing
else. Prints JSON: seconds to the first token, each repeat, and the ratio of the medians. On CPU each rank needs a core
of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time


def measure(args: argparse.Namespace, parallel: bool) -> list[float]:
    """Seconds to the first token, of each repeat."""
    from vllm import LLM, SamplingParams

    config = {"ranks": args.ranks, "segment_size": args.segment_size, "parallel_prefill": parallel}
    llm = LLM(
        args.model,
        additional_config={"nanocp": config},
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        max_model_len=args.tokens + 16,
        max_num_batched_tokens=args.chunk,
        max_num_seqs=8,
        dtype=args.dtype,
        enforce_eager=True,
        disable_log_stats=True,
    )
    params, found = SamplingParams(max_tokens=1, temperature=0.0), []
    for repeat in range(args.repeats + 1):
        tokens = random.Random(repeat).choices(range(300, args.vocabulary), k=args.tokens)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        found.append(round(time.perf_counter() - start, 3))
    llm.llm_engine.engine_core.shutdown()
    return found[1:]  # the first one also warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    defaults = dict(ranks=2, tokens=12000, segment_size=4096, chunk=1024, repeats=3, vocabulary=400)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    import vllm

    seconds = {name: measure(args, parallel) for name, parallel in (("one after another", False), ("together", True))}
    medians = [statistics.median(times) for times in seconds.values()]
    result = {"command": " ".join(["python", *sys.argv]), "vllm": vllm.__version__, "settings": vars(args)}
    print(json.dumps(result | {"seconds": seconds, "ratio": round(medians[1] / medians[0], 3)}, indent=1))


if __name__ == "__main__":
    main()
