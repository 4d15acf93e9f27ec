# SPDX-License-Identifier: Apache-2.0
"""How two engines' answers to the same random request differ: in words, none if they do not."""

from __future__ import annotations

import math
from typing import Any

from .random_requests import Case, Choice, Seen

TOLERANCE = 1e-3


def differences(case: Case, ours: Seen, stocks: Seen, block: int) -> list[str]:
    """What a client could tell apart, and what is wrong by itself."""
    found = [f"ours: {one}" for one in ours.wrong] + [f"stock's: {one}" for one in stocks.wrong]
    if ours.error or stocks.error:
        return found if ours.error == stocks.error else [*found, f"error: {ours.error} not {stocks.error}"]
    if case.cut:
        return found + cut_off(ours, stocks)
    if case.pooling:
        return found
    found += _same("finished", ours.finished, stocks.finished)
    found += _same("prompt", (ours.prompt, ours.prompt_tokens), (stocks.prompt, stocks.prompt_tokens))
    found += _same("choices", sorted(ours.choices), sorted(stocks.choices))
    found += _logprobs("prompt_logprobs", ours.prompt_logprobs, stocks.prompt_logprobs)
    for index in set(ours.choices) & set(stocks.choices):
        found += [f"choice {index}: {one}" for one in choice_differences(ours.choices[index], stocks.choices[index])]
    cached, length = ours.cached or 0, len(ours.prompt_tokens or ())
    alone = case.alone and case.params.get("n", 1) == 1
    if cached % block or not 0 <= cached <= max(0, length - 1) or (cached and alone):
        found.append(f"cached: {cached} of {length}")
    return found


def choice_differences(ours: Choice, stocks: Choice) -> list[str]:
    found: list[str] = []
    for name in ("tokens", "text", "finish", "stop"):
        found += _same(name, getattr(ours, name), getattr(stocks, name))
    found += _logprobs("logprobs", ours.logprobs, stocks.logprobs)
    mine, theirs = ours.cumulative_logprob, stocks.cumulative_logprob
    if mine is None or theirs is None:
        return found + _same("cumulative_logprob", mine, theirs)
    if not abs(mine - theirs) <= TOLERANCE * (1 + len(ours.tokens)):
        found.append(f"cumulative_logprob: {mine} not {theirs}")
    return found


def cut_off(ours: Seen, stocks: Seen) -> list[str]:
    """Whoever was cut off has the beginning of the other's answer; whoever was not, an end."""
    found: list[str] = []
    for index in set(ours.choices) & set(stocks.choices):
        mine, theirs = ours.choices[index], stocks.choices[index]
        most = min(len(mine.tokens), len(theirs.tokens))
        found += _same(f"choice {index}: tokens", mine.tokens[:most], theirs.tokens[:most])
        if mine.finish not in (None, "abort") and theirs.finish not in (None, "abort"):
            found += _same(f"choice {index}: finish", mine.finish, theirs.finish)
    return found


def _same(name: str, ours: Any, stocks: Any) -> list[str]:
    return [] if ours == stocks else [f"{name}: {ours!r} not {stocks!r}"]


def _logprobs(name: str, ours: Any, stocks: Any) -> list[str]:
    """Per position the same number of candidates, the same ranks and values but for those that trade places."""
    if (ours is None) != (stocks is None):
        return [f"{name}: {ours} not {stocks}"]
    if ours is None:
        return []
    if len(ours) != len(stocks):
        return [f"{name}: {len(ours)} positions, not {len(stocks)}"]
    for at, (mine, theirs) in enumerate(zip(ours, stocks, strict=True)):
        if (mine is None) != (theirs is None):
            return [f"{name} {at}: {mine} not {theirs}"]
        if mine is None:
            continue
        if abs(len(mine) - len(theirs)) > 1:
            return [f"{name} {at}: {len(mine)} candidates, not {len(theirs)}"]
        common = set(mine) & set(theirs)
        # Which of those that a grammar forbids are named is chance.
        possible = {token for token, one in theirs.items() if one.logprob > -math.inf}
        if len(common & possible) < len(possible) - 1:
            return [f"{name} {at}: {sorted(mine)} not {sorted(theirs)}"]
        for token in common:
            one, other = mine[token], theirs[token]
            if one.logprob != other.logprob and not abs(one.logprob - other.logprob) <= TOLERANCE:
                return [f"{name} {at}: of {token} {one.logprob} not {other.logprob}"]
            if one.decoded_token != other.decoded_token:
                return [f"{name} {at}: {token} is {one.decoded_token!r} not {other.decoded_token!r}"]
    return []
