# SPDX-License-Identifier: Apache-2.0
"""How the tokens of a rank's step are divided among the prompts there.

Most go to the prompt that came first, and what that one leaves to the next one. So none is late for those that came
later, and one that is computed on several ranks has its turn on each of them, though it comes to each again and again.
A part goes to those that have least left, so that short ones get their first tokens while long ones are computed. That
part bounds what the long ones lose by it, whatever comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# One part in so many of a step's tokens is for the shortest: a prompt that is passed by shorter ones all the time takes
# a third longer. With a half the median wait is shorter, and the longest ones come nearer to those of ranks with a
# queue each (``benchmarks/prompt_waits.py``).
PARTS = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of which something is left to compute.

    Attributes:
        left: tokens.
        begun: whether it has begun, or has its blocks; else it waits, and begins where it is among the shortest.
        more: whether it goes on elsewhere behind these, so that it is not short.
        importance: less is more; the shortest of the most important come first.
    """

    left: int
    begun: bool = True
    more: bool = False
    importance: int = 0


def chunk_shares(prompts: Sequence[Prompt], budget: int, part: int) -> list[int]:
    """Tokens that each prompt gets in a step.

    Args:
        prompts: those that have begun in the order in which they came (or of their importance).
        budget: tokens of the step for prompts.
        part: of these, for the shortest, whether they have begun or not.

    Returns:
        As many as there are prompts. Their sum is the budget if those that have begun have as many left.
    """
    shares = [0] * len(prompts)
    budget = max(0, budget)
    part = min(part, budget)
    short = [index for index, prompt in enumerate(prompts) if not prompt.more]
    for index in sorted(short, key=lambda index: (prompts[index].importance, prompts[index].left)):
        shares[index] = min(prompts[index].left, part)
        part -= shares[index]
    budget -= sum(shares)
    for index, prompt in enumerate(prompts):
        if prompt.begun:
            more = min(prompt.left - shares[index], budget)
            shares[index] += more
            budget -= more
    return shares
