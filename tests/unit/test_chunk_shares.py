# SPDX-License-Identifier: Apache-2.0
"""How a step's tokens are divided among prompts: nothing is lost, the first has most, the shortest have a part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_nanocp.placement.chunk_shares import PARTS, Prompt, chunk_shares

prompts = st.builds(
    Prompt, left=st.integers(1, 3000), begun=st.booleans(), more=st.booleans(), importance=st.integers(0, 2)
)


@given(st.lists(prompts, min_size=1, max_size=12), st.integers(0, 4096), st.integers(0, 1024))
def test_nothing_is_lost(given_prompts: list[Prompt], budget: int, part: int) -> None:
    """Nobody gets more than is left of it, all together not more than there is; and if they get less, nobody who has
    begun needs more. Who has not begun, or goes on elsewhere, has only of the part, or nothing of it."""
    shares = chunk_shares(given_prompts, budget, part)
    assert all(0 <= share <= prompt.left for share, prompt in zip(shares, given_prompts, strict=True))
    assert sum(shares) <= budget
    begun = [index for index, prompt in enumerate(given_prompts) if prompt.begun]
    if sum(shares) < budget:
        assert all(shares[index] == given_prompts[index].left for index in begun)
    assert sum(share for share, prompt in zip(shares, given_prompts, strict=True) if not prompt.begun) <= part
    assert not any(share for share, prompt in zip(shares, given_prompts, strict=True) if prompt.more > prompt.begun)


@given(st.lists(prompts, min_size=1, max_size=12), st.integers(1, 4096))
def test_the_first_has_all_but_the_part(given_prompts: list[Prompt], budget: int) -> None:
    """However many others there are, and however short: so it takes a third longer at most."""
    first = Prompt(left=100_000)
    shares = chunk_shares([first, *given_prompts], budget, budget // PARTS)
    assert shares[0] >= budget - budget // PARTS


def test_the_shortest_come_first_in_their_part() -> None:
    waiting = [Prompt(700, begun=False), Prompt(50, begun=False), Prompt(400, begun=False)]
    assert chunk_shares([Prompt(9000), *waiting], 1000, 250) == [750, 0, 50, 200]


def test_the_more_important_come_before_the_shorter() -> None:
    """Also a long one before a short one that is less important."""
    waiting = [Prompt(60, begun=False, importance=1), Prompt(200, begun=False)]
    assert chunk_shares([Prompt(9000), *waiting], 1000, 250) == [800, 0, 200]
