# SPDX-License-Identifier: Apache-2.0
"""What happened since the last look, and how the ranks stand. Plain numbers: no vLLM, no prometheus_client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RankState(NamedTuple):
    """How one rank stands after a step.

    Attributes:
        kv_usage: used part of its KV blocks, 0 to 1.
        running: requests in its batch.
        waiting: requests that were placed here and have not started.
        guests: sharded requests that compute elsewhere and have a finished part here.
        shards: shards of sharded requests that it holds.
    """

    kv_usage: float
    running: int
    waiting: int
    guests: int
    shards: int


@dataclass(slots=True)
class Snapshot:
    """State of the ranks, and counts since the snapshot before.

    Attributes:
        ranks: one a rank.
        degrees: degree -> requests that were placed with it.
        local_hits: prompt tokens of placed requests that were cached at their home.
        remote_hits: those that were cached at other ranks.
        missed: those that were not cached.
        moves: times that a decoding request changed its home for balance.
        spills: times that one did because its home was full.
        preemptions_with_room: preemptions while other ranks had room for the request.
        preemptions_without_room: all others.
        sharded_drafts: steps of sharded requests that had drafts.
        sharded_draft_tokens: drafts of them.
        sharded_accepted_tokens: those that were right.
        prevented_preemptions: times a rank's blocks ran out and spills made up for all that was missing.
        coefficients: of the cost model, by name; empty without one.
    """

    ranks: list[RankState]
    degrees: dict[int, int] = field(default_factory=dict)
    local_hits: int = 0
    remote_hits: int = 0
    missed: int = 0
    moves: int = 0
    spills: int = 0
    preemptions_with_room: int = 0
    preemptions_without_room: int = 0
    prevented_preemptions: int = 0
    sharded_drafts: int = 0
    sharded_draft_tokens: int = 0
    sharded_accepted_tokens: int = 0
    coefficients: dict[str, float] = field(default_factory=dict)

    @property
    def kv_imbalance(self) -> float:
        """KV usage of the fullest rank over the mean: 1 is even, the number of ranks is all on one."""
        return _imbalance([rank.kv_usage for rank in self.ranks])

    @property
    def batch_imbalance(self) -> float:
        """The same for running requests."""
        return _imbalance([rank.running for rank in self.ranks])

    def to_payload(self) -> dict[str, Any]:
        """Lists, numbers, and dictionaries with text as keys: fit for JSON and msgpack."""
        payload: dict[str, Any] = {
            "ranks": [list(rank) for rank in self.ranks],
            "degrees": [[degree, count] for degree, count in self.degrees.items()],
            "coefficients": self.coefficients,
        }
        for name in _COUNTS:
            payload[name] = getattr(self, name)
        return payload

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Snapshot:
        """The inverse of ``to_payload``.

        Raises:
            ValueError: a payload that ``to_payload`` does not make.
        """
        try:
            return cls(
                ranks=[RankState(_number(usage), *map(_count, counts)) for usage, *counts in payload["ranks"]],
                degrees={_count(degree): _count(count) for degree, count in payload["degrees"]},
                coefficients={str(name): _number(value) for name, value in payload["coefficients"].items()},
                **{name: _count(payload[name]) for name in _COUNTS},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a snapshot: {error!r}") from error


_COUNTS = (
    "local_hits",
    "remote_hits",
    "missed",
    "moves",
    "spills",
    "preemptions_with_room",
    "preemptions_without_room",
    "prevented_preemptions",
    "sharded_drafts",
    "sharded_draft_tokens",
    "sharded_accepted_tokens",
)


def _count(value: Any) -> int:
    # A counter of prometheus_client raises when it is told to go down, in the loop that all answers go through.
    if type(value) is not int or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"not finite: {value!r}")
    return number


def _imbalance(values: Sequence[float]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


class Collector:
    """Counts for the scheduler. Every method but ``snapshot`` is a few additions.

    Nothing grows with the number of requests: the only container has one entry a degree.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._degrees: dict[int, int] = {}
        self._local_hits = self._remote_hits = self._missed = 0
        self._moves = self._spills = self._prevented = 0
        self._with_room = self._without_room = 0
        self._drafts = self._draft_tokens = self._accepted = 0

    def admitted(self, degree: int, local_hits: int, remote_hits: int, missed: int) -> None:
        """A request was placed.

        Args:
            degree: ranks it is spread over.
            local_hits: prompt tokens found in its home's prefix cache.
            remote_hits: those found in other ranks'.
            missed: all others.
        """
        self._degrees[degree] = self._degrees.get(degree, 0) + 1
        self._local_hits += local_hits
        self._remote_hits += remote_hits
        self._missed += missed

    def moved(self) -> None:
        """A decoding request changed its home for balance."""
        self._moves += 1

    def spilled(self) -> None:
        """A decoding request changed its home because that was full."""
        self._spills += 1

    def preempted(self, rooms_elsewhere: bool) -> None:
        """A request was preempted.

        Args:
            rooms_elsewhere: whether other ranks had room for it at that time.
        """
        if rooms_elsewhere:
            self._with_room += 1
        else:
            self._without_room += 1

    def drafted(self, drafts: int, tokens: int, accepted: int) -> None:
        """Sharded requests were decoded with drafts.

        Args:
            drafts: how many requests, in one step.
            tokens: drafts of all of them.
            accepted: how many were right.
        """
        self._drafts += drafts
        self._draft_tokens += tokens
        self._accepted += accepted

    def prevented_preemption(self) -> None:
        """A request would have been preempted, had nothing been moved or spilled."""
        self._prevented += 1

    def snapshot(self, ranks: list[RankState], coefficients: dict[str, float] | None) -> Snapshot:
        """Take the counts since the last snapshot, and begin anew.

        Args:
            ranks: their state now.
            coefficients: of the cost model, by name.
        """
        taken = Snapshot(
            ranks=ranks,
            degrees=self._degrees,
            local_hits=self._local_hits,
            remote_hits=self._remote_hits,
            missed=self._missed,
            moves=self._moves,
            spills=self._spills,
            preemptions_with_room=self._with_room,
            preemptions_without_room=self._without_room,
            prevented_preemptions=self._prevented,
            sharded_drafts=self._drafts,
            sharded_draft_tokens=self._draft_tokens,
            sharded_accepted_tokens=self._accepted,
            coefficients=coefficients or {},
        )
        self._reset()
        return taken
