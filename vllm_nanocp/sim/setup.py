# SPDX-License-Identifier: Apache-2.0
"""What simulated ranks are, what they have to compute, and what they ask a policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..placement import Run
from ..placement.prefill_steps import Allowance
from .machine import Machine


@dataclass(frozen=True)
class Setup:
    """The ranks.

    Attributes:
        machine: what their steps take.
        ranks: how many.
        capacity: KV tokens of each.
        block_size: tokens a block holds.
        slots: requests a rank runs at most (vLLM's ``max_num_seqs``).
        budget: tokens a rank computes in a step at most (``max_num_batched_tokens``).
        decode_only: prompts are taken as computed.
        as_benchmarks: of prompts taken as computed, as the systems' benchmark modes did when curves were
            measured: stock takes time to fill in their KV, and the plugin takes them as computed again after a
            preemption.
        prefix_caching: whether ranks keep what has ended, for those that begin alike.
        visits: between any two ranks, that graphs have room for; None: for all.
        noise: standard deviation of a step's time, and of a request's way to the scheduler, as a part of it.
        seed: of the noise, and of what policies draw.
    """

    machine: Machine
    ranks: int
    capacity: int
    block_size: int = 16
    slots: int = 256
    budget: int = 8192
    decode_only: bool = False
    as_benchmarks: bool = False
    prefix_caching: bool = False
    visits: int | None = None
    noise: float = 0.0
    seed: int = 0

    @property
    def blocks(self) -> int:
        return self.capacity // self.block_size


@dataclass(slots=True)
class Prompt:
    """A request whose tokens are computed: one run of blocks after another.

    Attributes:
        request: its number.
        runs: of its shard map.
        index: of the run at hand.
        at: tokens computed.
        end: tokens to compute in all.
    """

    request: int
    runs: tuple[Run, ...]
    index: int
    at: int
    end: int

    @property
    def rank(self) -> int:
        return self.runs[self.index].rank

    def left(self, block_size: int) -> int:
        """Tokens of the run at hand that are not computed."""
        return min(self.runs[self.index].end_block * block_size, self.end) - self.at


class Policy(Protocol):
    """Who goes where; a world asks it in every step."""

    # Whether the prompt of a preempted request is computed also where prompts are taken as computed.
    recomputes: bool
    # Whether filling the KV of prompts that are taken as computed takes time.
    fills: bool

    def arrive(self, request: int) -> None:
        """A request has come."""

    def admit(self) -> None:
        """Let requests enter ranks."""

    def balance(self) -> None:
        """Let decoding requests change their home."""

    def spill(self, request: int) -> int | None:
        """Where a request goes on whose home has no block for it; None: somebody is preempted."""

    def victim(self, running: np.ndarray) -> int:
        """Which of a rank's decoding requests gives up its blocks where one is missing."""

    def return_(self, request: int, home: int) -> None:
        """A request was preempted at its home."""

    def left(self, request: int) -> None:
        """A request has ended."""

    def measured(
        self,
        kv_tokens: np.ndarray,
        decodes: np.ndarray,
        guests: np.ndarray,
        seconds: float,
        tokens: int,
        pairs: float,
    ) -> None:
        """What a step took, how many tokens of prompts were computed in it, and the pairs of the rank with most."""

    def waiting(self) -> int:
        """Requests that have not entered."""

    def prompts(self, decodes: bool) -> Allowance | None:
        """What each rank may compute of prompts in the step at hand; None: as much as fits."""

    def order(self, prompts: Sequence[Prompt], budget: int) -> list[tuple[Prompt, int]]:
        """Which of a rank's prompts get how many tokens of a step at most, in this order."""


@dataclass
class Counts:
    """What happened.

    Attributes:
        events: preemptions, moves, spills, steps outside of graphs.
        steps: that computed something.
        kv, kv_ratio, batch_ratio: sums over time, to be divided by ``seconds``: part of the cache in use, the largest
            rank's blocks, and requests, over the mean.
        fullest: part of the cache that was ever in use on a rank.
        seconds: over which these were taken.
        degrees: of how many requests that have ended so many ranks had a shard.
    """

    events: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    kv: float = 0.0
    fullest: float = 0.0
    kv_ratio: float = 0.0
    batch_ratio: float = 0.0
    seconds: float = 0.0
    degrees: Counter[int] = field(default_factory=Counter)
