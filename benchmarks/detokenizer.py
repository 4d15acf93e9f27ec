#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long the first output of a prompt holds up the front-end, as vLLM is and with ``patches/detokenizer_prompt.py``.

    python examples/make_moe.py --out MODEL
    python benchmarks/detokenizer.py --model MODEL --out FILE

vLLM's ``OutputProcessor`` gets requests of several lengths, over a real text as often as it takes, and then one token
after another. No engine. Of each length: milliseconds to add the request, to process its first token and a later one,
on the API server's event loop; the least of several times, stock and patched in turn. Texts must be the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kept_result import about, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LENGTHS = "1024,16384,65536,131072,1000000"


def _ms(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _one(tokenizer: Any, ids: list[int], new: list[int]) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of each of a request's parts, and its pieces of text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    processor = OutputProcessor(tokenizer, log_stats=False)
    request = EngineCoreRequest(
        request_id="r",
        external_req_id="r",
        prompt_token_ids=ids,
        mm_features=None,
        sampling_params=SamplingParams(output_kind=RequestOutputKind.DELTA),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    times = {"add_ms": _ms(lambda: processor.add_request(request, None, queue=queue))}
    texts = []
    for index, token in enumerate(new):
        output = EngineCoreOutput(request_id="r", new_token_ids=[token])
        took = _ms(lambda output=output: processor.process_outputs([output]))  # type: ignore[misc]
        times["first_ms" if index == 0 else "later_ms"] = took
        piece: Any = queue.get_nowait()
        texts.append(piece.outputs[0].text)
    return times, texts


def _row(tokenizer: Any, text: list[int], length: int, rounds: int, ways: dict[str, Callable[[], None]]) -> Any:
    ids = (text * (length // len(text) + 1))[:length]
    new = text[length % len(text) :][:3] or text[:3]
    least: dict[str, dict[str, float]] = {}
    said = set()
    for _ in range(rounds):
        for way, choose in ways.items():
            choose()
            times, texts = _one(tokenizer, ids, new)
            said.add(tuple(texts))
            best = least.setdefault(way, times)
            least[way] = {name: min(value, best[name]) for name, value in times.items()}
    if len(said) != 1:
        raise SystemExit(f"texts differ: {said}")
    rounded = {way: {name: round(value, 4) for name, value in times.items()} for way, times in least.items()}
    ratio = least["patched"]["first_ms"] / least["stock"]["first_ms"]
    return {"prompt_tokens": length, **rounded, "first_patched_over_stock": round(ratio, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    parser.add_argument("--lengths", default=LENGTHS, help="prompt lengths, tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import tokenizers
    import vllm
    from transformers import AutoTokenizer
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    from vllm_nanocp.patches import detokenizer_prompt

    stock = FastIncrementalDetokenizer.__init__
    detokenizer_prompt.apply()
    patched = FastIncrementalDetokenizer.__init__

    def choose(start: Any) -> Callable[[], None]:
        return lambda: setattr(FastIncrementalDetokenizer, "__init__", start)

    ways = {"stock": choose(stock), "patched": choose(patched)}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = tokenizer.encode((ROOT / "examples/text/constitution.txt").read_text())
    rows = [_row(tokenizer, text, int(length), args.rounds, ways) for length in args.lengths.split(",")]
    write({**about(vllm, tokenizers), "rounds": args.rounds, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
