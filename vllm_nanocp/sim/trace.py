# SPDX-License-Identifier: Apache-2.0
"""Requests to be served: read from a file, stretched, and given times of arrival."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


class InputError(ValueError):
    """Something that a user has given and cannot be used; the text is one line."""


# Names of a line's fields: this package's, and those of the trace that Mooncake published.
_AT, _PROMPT, _OUTPUT, _PREFIX = (
    ("at", "timestamp"),
    ("prompt", "input_length"),
    ("output", "output_length"),
    "hash_ids",
)
# Tokens that one prefix id stands for, where a line does not say.
PREFIX_TOKENS = 512
# Of a prompt or an output: a number beyond this is a mistake.
MOST_TOKENS = 10**12


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival.

    Attributes:
        at: seconds.
        prompt: tokens.
        output: tokens, at least one.
        prefix: of each, ids of the prompt's blocks of ``PREFIX_TOKENS`` tokens; equal ids in equal places are equal
            text. Empty: nobody shares anything.
    """

    at: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    prefix: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.at)

    def pick(self, which: Sequence[int] | np.ndarray) -> Requests:
        """These requests, in this order, with their times."""
        index = np.asarray(which, dtype=np.int64)
        prefix = tuple(self.prefix[i] for i in index.tolist()) if self.prefix else ()
        return Requests(self.at[index], self.prompt[index], self.output[index], prefix)


def _number(row: dict[str, Any], names: tuple[str, ...], where: str, least: float) -> float:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise InputError(f"{where}: no {' or '.join(map(repr, names))}; each line needs arrival, prompt and output")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < MOST_TOKENS:
        raise InputError(f"{where}: {name} is {value!r}; use a number of at least {least:g}")
    return float(value) / (1e3 if name == "timestamp" else 1)


def read_trace(path: Path) -> Requests:
    """A file of JSON objects, one a line: ``at`` (seconds), ``prompt``, ``output`` (tokens), and ``hash_ids``, if any;
    or ``timestamp`` (milliseconds), ``input_length``, ``output_length``.

    Raises:
        InputError: no such file, a line that is no such object, or no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    rows: list[tuple[float, int, int, tuple[int, ...]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); use one JSON object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: {line[:40]!r} is not a JSON object")
        ids = row.get(_PREFIX, ())
        if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
            raise InputError(f"{where}: {_PREFIX} must be a list of integers")
        lengths = int(_number(row, _PROMPT, where, 1)), max(1, int(_number(row, _OUTPUT, where, 0)))
        rows.append((_number(row, _AT, where, 0), *lengths, tuple(ids)))
    if not rows:
        raise InputError(f"{path} has no requests; it needs one JSON object a line")
    rows.sort(key=lambda row: row[0])
    at, prompt, output, prefix = zip(*rows, strict=True)
    return Requests(
        np.array(at), np.array(prompt, dtype=np.int64), np.array(output, dtype=np.int64), prefix if any(prefix) else ()
    )


def stretched(
    requests: Requests, factor: float, most_prompt: int | None = None, most_output: int | None = None
) -> Requests:
    """The same with longer (or shorter) prompts, and no more tokens than these. Prefixes are left out then."""
    prompt = np.clip(requests.prompt * factor, 1, MOST_TOKENS).astype(np.int64)
    prompt = prompt if most_prompt is None else np.minimum(prompt, most_prompt)
    output = requests.output if most_output is None else np.minimum(requests.output, most_output)
    same = factor == 1 and (prompt == requests.prompt).all()
    return replace(requests, prompt=prompt, output=output, prefix=requests.prefix if same else ())


def poisson(requests: Requests, rate: float, seconds: float, seed: int) -> Requests:
    """Requests of these lengths, in a random order, that arrive by themselves at so many a second for so long.

    With the lengths of a list in a given order, the same draws as a load generator makes that shuffles the list with
    ``random.Random(seed)`` and then waits by ``expovariate``.
    """
    dice = random.Random(seed)
    order = list(range(len(requests)))
    dice.shuffle(order)
    at: list[float] = []
    now = 0.0
    while now < seconds:
        now += dice.expovariate(rate)
        at.append(now)
    picked = requests.pick([order[i % len(order)] for i in range(len(at))])
    return replace(picked, at=np.array(at))


def replayed(requests: Requests, speed: float, copies: int = 1) -> Requests:
    """The trace so many times as fast as recorded, made of copies of it that begin at different places."""
    span = float(requests.at.max()) + 1.0
    at = np.concatenate([(requests.at + k * span / copies) % span for k in range(copies)]) * copies / speed
    order = np.argsort(at, kind="stable")
    most = max((max(ids, default=0) for ids in requests.prefix), default=0) + 1
    # No two copies have a prefix in common, apart from the first block, which nearly all requests share.
    prefix = [tuple(i and i + k * most for i in ids) for k in range(copies) for ids in requests.prefix]
    return Requests(
        at[order],
        np.tile(requests.prompt, copies)[order],
        np.tile(requests.output, copies)[order],
        tuple(prefix[i] for i in order.tolist()) if prefix else (),
    )
