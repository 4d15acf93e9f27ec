# SPDX-License-Identifier: Apache-2.0
"""Who is preempted where a rank has too few blocks: whoever is cheapest to compute again.

vLLM preempts the request that began to run last, whatever it has computed: a prompt of 400,000 tokens for want of one
block, beside short ones that would be computed again in a step. Here what is to be computed again counts: tokens, and
the pairs of queries and keys, which grow with the square of them. The oldest request of a rank is never preempted while
there is another one, so that there always is one that comes to its end; and who was preempted before counts for more
each time, so that it is another one's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

# Tokens whose keys take a query as long as all else of it: 18 us over 1.28 ns on an H200 (``sim.machine``). Where that
# is wrong the order of very different lengths is still right.
PAIRS_ALIKE = 14_000


@dataclass(frozen=True, slots=True)
class Victim:
    """A running request.

    Attributes:
        computed: tokens that would be computed again.
        frees: blocks that nobody else has.
        preemptions: how often it was preempted.
    """

    computed: int
    frees: int
    preemptions: int = 0

    @property
    def cost(self) -> float:
        """Of computing it again, in tokens of a short prompt."""
        return (1 + self.preemptions) * self.computed * (1 + self.computed / (2 * PAIRS_ALIKE))


def victims(running: Sequence[Victim], short: int) -> list[int]:
    """Which requests to preempt so that a rank has so many blocks more, at little cost; the first one first.

    By what they free for their cost, and then one that is enough: at most twice what the best choice costs (Csirik,
    Frenk, Labbe, Zhang, Heuristics for the 0-1 min-knapsack problem, 1991). O(n log n).

    Args:
        running: without those that are to stay.
        short: blocks.

    Returns:
        Indices; all that free anything, if these are not enough.
    """
    order = sorted(
        (i for i, victim in enumerate(running) if victim.frees > 0),
        key=lambda i: (running[i].cost / running[i].frees, -i),
    )
    best, least = order, float("inf")
    freed, cost = 0, 0.0
    # The largest last; of those that are enough with what is taken so far, the cheapest first, the taken ones included.
    smaller = sorted(range(len(order)), key=lambda at: running[order[at]].frees)
    enough: list[tuple[float, int, int]] = []
    for taken, first in enumerate(order):
        while smaller and freed + running[order[smaller[-1]]].frees >= short:
            at = smaller.pop()
            heappush(enough, (running[order[at]].cost, -order[at], at))
        while enough and enough[0][2] < taken:
            heappop(enough)
        if enough and cost + enough[0][0] < least:
            best, least = [*order[:taken], -enough[0][1]], cost + enough[0][0]
        freed, cost = freed + running[first].frees, cost + running[first].cost
        if freed >= short or cost >= least:
            break
    return best
