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

    The cheapest that is enough by itself, or several that cost less together: those that free most for what they cost.

    Args:
        running: without those that are to stay.
        short: blocks.

    Returns:
        Indices; all that free anything, if these are not enough.
    """
    useful = [i for i, victim in enumerate(running) if victim.frees > 0]
    enough = [i for i in useful if running[i].frees >= short]
    alone = min(enough, key=lambda i: (running[i].cost, -i), default=None)
    several: list[int] = []
    freed, cost = 0, 0.0
    for i in sorted(useful, key=lambda i: (running[i].cost / running[i].frees, -i)):
        if freed >= short:
            break
        several.append(i)
        freed, cost = freed + running[i].frees, cost + running[i].cost
    if alone is not None and running[alone].cost <= cost:
        return [alone]
    return several
