# SPDX-License-Identifier: Apache-2.0
"""How the tokens of a rank's step are divided among the prompts that it computes.

Most go to the one that came first, then to the next one: so nobody's first token is late for those who came later, and
a long prompt that is computed on several ranks keeps its turn at each of them. A part is kept for short prompts, so
that they get their first tokens while long ones are computed; it bounds what the long ones lose by that, whatever comes.
"""

from __future__ import annotations

from collections.abc import Sequence

# One part in so many of a step's tokens is for short prompts; a prompt is short if it has no more left to compute.
PARTS = 4


def chunk_shares(left: Sequence[int], budget: int, kept: int, short: int) -> list[int]:
    """Tokens that each prompt gets.

    Args:
        left: tokens that each has left to compute; the first to come first.
        budget: tokens of the step for prompts.
        kept: of these, for prompts that have not begun.
        short: tokens of it, at most, that short ones get before others.
    """
    shares = [0] * len(left)
    budget -= kept
    for index in sorted(range(len(left)), key=left.__getitem__):
        if left[index] > short:
            break
        shares[index] = left[index]
        short -= left[index]
        budget -= left[index]
    for index, tokens in enumerate(left):
        if not shares[index] and budget > 0:
            shares[index] = min(tokens, budget)
            budget -= shares[index]
    return shares
