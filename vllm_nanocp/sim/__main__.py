# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_nanocp.sim --trace FILE.jsonl --ranks N``: does the plugin help with a load, with which settings?"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..placement.auto import AUTO
from ..placement.prefill_steps import PrefillGap
from .figures import SYSTEMS, Run, simulate
from .machine import MEASURED_RANKS, PRESETS, Machine
from .nanocp import Settings
from .report import check_plot, plot, table, verdict
from .trace import InputError, Requests, poisson, read_trace, replayed, stretched

# Simulated at most: ranks; requests times ranks, each of which is four bytes.
_MOST_RANKS, _MOST = 2**14, 10**9

_ABOUT = """A trace has one JSON object a line: "at" (seconds), "prompt" and "output" (tokens), and "hash_ids" (a number
for each 512 tokens of the prompt; equal ones are equal text), if any; or "timestamp" (ms), "input_length",
"output_length". It is replayed as recorded, --speed times as fast, or, with --rates, its lengths arrive at random.

Systems: nanocp (this plugin; one line for each --segment-size), stock (vLLM's data + expert parallelism with its
balancer), round-robin (the same, ranks in turn), tensor (tensor parallelism over all GPUs)."""


def _segment(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return int(_above(int, 1)(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {AUTO}") from None


def _above(kind: Callable[[str], Any], least: float, strict: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of at least this much, or above it."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (value > least if strict else value >= least) or value > 1e12:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r}; use a {what} {'above' if strict else 'of at least'} {least:g}")
        return value

    return parse


def _several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them."""

    def parse(text: str) -> list[Any]:
        return [one(part.strip()) for part in text.split(",")]

    return parse


def _system(text: str) -> str:
    if text not in SYSTEMS:
        raise argparse.ArgumentTypeError(f"{text!r}; use some of {','.join(SYSTEMS)}")
    return text


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not JSON; use a JSON object") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, without the usage."""
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m vllm_nanocp.sim",
        description=__doc__ + "\n\n" + _ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count, positive, any_time = _above(int, 1), _above(float, 0, strict=True), _above(float, 0)
    add("--trace", type=Path, required=True, help="requests, one JSON object a line")
    add("--ranks", type=count, required=True, help="GPUs: data-parallel ranks")
    add("--systems", type=_several(_system), default=["nanocp", "stock"], help="default: nanocp,stock")
    add("--machine", choices=sorted(PRESETS), default=next(iter(PRESETS)), help="GPU and model (default: %(default)s)")
    add("--coefficients", type=_object, default={}, help="others than the preset's, a JSON object")
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--speed", type=_several(positive), default=[1.0], help="times as fast as recorded; several with commas")
    add("--copies", type=count, default=1, help="of the trace, each shifted in time")
    add("--rates", type=_several(positive), help="requests a second at random times instead; several with commas")
    add("--window", type=positive, default=120.0, help="seconds of arrivals with --rates (default 120)")
    add("--stretch", type=positive, default=1.0, help="prompts are so many times as long")
    add("--max-prompt", type=count, help="longer prompts are cut")
    add("--max-output", type=count, help="longer outputs are cut")
    add("--limit", type=count, help="only the first requests of the trace")
    add("--skip", type=_above(int, 0), default=0, help="without these first ones")
    add("--settle", type=any_time, default=0.0, help="requests of the first seconds do not count")
    add("--decode-only", action="store_true", help="prompts are taken as computed")
    settings = parser.add_argument_group("the plugin's settings")
    add = settings.add_argument
    add("--segment-size", type=_several(_segment), default=[65536], help="or auto; several with commas (default 65536)")
    add("--visits", type=count, help="between any two ranks, that CUDA graphs have room for (default: all)")
    add("--max-degree", type=count, help="most ranks of a request (default: all)")
    add("--moves", action="store_true", help="homes move")
    add("--no-parallel-prefill", action="store_true", help="ranks of a long prompt compute one after another")
    add("--chunk-tokens", type=count, help="most tokens of a chunk that ranks compute together")
    add("--prefill-gap", type=positive, metavar="MS", help="prefill_gap: ms of a step with prompts (default: off)")
    add("--decode-share", type=any_time, default=0.0, metavar="PART", help="prefill_gap: decode_share (default: off)")
    vllm = parser.add_argument_group("vLLM's settings")
    add = vllm.add_argument
    add("--capacity", type=count, help="KV tokens of a GPU (default: the preset's)")
    add("--block-size", type=count, default=16)
    add("--max-num-seqs", type=count, default=256, help="of a rank (default 256)")
    add("--max-num-batched-tokens", type=count, default=8192, help="of a rank (default 8192)")
    add("--prefix-caching", action="store_true")
    add("--frontends", type=count, help="API servers of stock (default: as many as ranks)")
    out = parser.add_argument_group("output")
    add = out.add_argument
    add("--seed", type=int, default=0)
    add("--noise", type=any_time, default=0.0, help="of a step's time, as a part of it")
    add("--json", type=Path, help="write all figures")
    add("--plot", type=Path, help="write an SVG; needs matplotlib")
    return parser


def _machine(name: str, others: Any) -> Machine:
    machine = PRESETS[name]
    known = {field.name for field in fields(Machine)} - {"name", "source"}
    if not isinstance(others, dict):
        raise InputError(f"--coefficients must be a JSON object, got {others!r}")
    for key, value in others.items():
        if key not in known:
            raise InputError(f"--coefficients has no {key!r}; use some of {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
            raise InputError(f"--coefficients: {key} is {value!r}; use a number that is not negative")
        if type(getattr(machine, key)) is int and (not isinstance(value, int) or value < 1):
            raise InputError(f"--coefficients: {key} is {value!r}; use a whole number of at least 1")
    machine = replace(machine, **others)
    if machine.active > machine.experts:
        raise InputError(f"--coefficients: {machine.active} active experts of {machine.experts}; use at most all")
    return machine


def _gap(ms: float | None, share: float) -> PrefillGap | None:
    """The setting ``prefill_gap``. Without a gap no step lies between two with prompts but by the share."""
    if ms is None and not share:
        return None
    return PrefillGap(ms=ms, decode_steps=0 if ms is None else PrefillGap.decode_steps, decode_share=share)


def _loads(args: argparse.Namespace) -> list[tuple[str, Requests]]:
    """What is to be served, by name."""
    trace = read_trace(args.trace)
    if args.skip >= len(trace):
        raise InputError(f"--skip {args.skip} leaves nothing of {len(trace)} requests; use a smaller number")
    end = len(trace) if args.limit is None else min(len(trace), args.skip + args.limit)
    trace = trace.pick(range(args.skip, end))
    trace = replace(trace, at=trace.at - trace.at[0])
    trace = stretched(trace, args.stretch, args.max_prompt, args.max_output)
    most = max(rate * args.window for rate in args.rates) if args.rates else len(trace) * args.copies
    if most * args.ranks > _MOST:
        raise InputError(f"{most:.0f} requests on {args.ranks} ranks are too many; use fewer of one or the other")
    if args.rates:
        return [(f"{rate:g}/s", poisson(trace, rate, args.window, args.seed)) for rate in args.rates]
    return [(f"{speed:g}x", replayed(trace, speed, args.copies)) for speed in args.speed]


def _check(args: argparse.Namespace) -> None:
    if args.ranks > _MOST_RANKS:
        raise InputError(f"--ranks {args.ranks} is more than can be simulated; use at most {_MOST_RANKS}")
    if args.max_degree is not None and args.max_degree > args.ranks:
        raise InputError(f"--max-degree {args.max_degree} is more than there are ranks; use at most {args.ranks}")
    if args.decode_share > 1:
        raise InputError(f"--decode-share {args.decode_share:g} is more than all; use a number from 0 to 1")
    if args.ranks == 1 and "nanocp" in args.systems:
        raise InputError("--ranks 1 leaves nanocp nothing to spread over, and it is refused there; use 2 or more")
    if args.chunk_tokens is not None and (args.no_parallel_prefill or args.max_degree == 1):
        raise InputError("--chunk-tokens has no effect with --no-parallel-prefill or --max-degree 1; leave it out")
    if args.decode_only and (args.prefill_gap is not None or args.decode_share):
        raise InputError("--prefill-gap and --decode-share have no effect with --decode-only; leave them out")
    if args.prefix_caching and 512 % args.block_size:
        raise InputError(f"--prefix-caching needs a --block-size that divides 512, got {args.block_size}")
    if args.max_num_batched_tokens < args.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens {args.max_num_batched_tokens} is less than --max-num-seqs {args.max_num_seqs}, "
            "which vLLM refuses, too; use a larger number"
        )
    if args.json and not args.json.absolute().parent.is_dir():
        raise InputError(f"{args.json} cannot be written: there is no such folder")
    if args.plot:
        check_plot(args.plot)


def _points(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each system under each load."""
    run = Run(
        machine=_machine(args.machine, args.coefficients),
        ranks=args.ranks,
        capacity=args.capacity,
        block_size=args.block_size,
        slots=args.max_num_seqs,
        budget=args.max_num_batched_tokens,
        decode_only=args.decode_only,
        frontends=args.frontends,
        prefix_caching=args.prefix_caching,
        visits=args.visits,
        noise=args.noise,
        seed=args.seed,
        settle=args.settle,
    )
    points: list[dict[str, Any]] = []
    for load, requests in _loads(args):
        if requests.at.max() < args.settle:
            raise InputError(f"--settle {args.settle:g} leaves no request of {load} to count; use a smaller number")
        for system in dict.fromkeys(args.systems):
            for segment in args.segment_size if system == "nanocp" else [0]:
                settings = Settings(
                    segment or 65536,
                    args.max_degree,
                    args.moves,
                    not args.no_parallel_prefill,
                    args.chunk_tokens,
                    _gap(args.prefill_gap, args.decode_share),
                )
                began = time.perf_counter()
                found = simulate(replace(run, settings=settings), system, requests)
                name = f"nanocp {segment}" if segment else system
                points.append({"load": load, "system": name, **found})
                print(f"{load}, {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return points


def main(given: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        args = _parser().parse_args(given)
        _check(args)
        points = _points(args)
        print(table(points))
        if compared := verdict(points):
            print(compared)
        print(f"Simulated with {args.machine}: see docs/user-guide.md for what is not modelled.")
        if not args.decode_only:
            print("With computed prompts times were up to 1.7 times off the measured ones, mostly too long.")
        if "tensor" in args.systems and not args.decode_only:
            print("Prompts under tensor parallelism were never measured: its times with them are a guess.")
        if args.ranks > MEASURED_RANKS:
            print(f"No step of more than {MEASURED_RANKS} ranks was measured: what these show is no fact.")
        if args.json:
            command = ["python", "-m", "vllm_nanocp.sim", *(sys.argv[1:] if given is None else given)]
            machine = asdict(_machine(args.machine, args.coefficients))
            text = json.dumps({"command": " ".join(command), "machine": machine, "points": points}, indent=1)
            try:
                args.json.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{args.json} cannot be written: {error}") from error
        if args.plot:
            plot(points, args.plot)
    except InputError as error:
        print(f"vllm_nanocp.sim: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
