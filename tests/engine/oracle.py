# SPDX-License-Identifier: Apache-2.0
"""Drafts of known quality: what is added to the workers of a test's engine that drafts by n-grams."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

STEM = 16  # tokens by which a prompt is known
KINDS = 512


class Oracle:
    """Mixed into a worker, stock vLLM's or one here (``worker_extension_cls``)."""

    model_runner: Any

    def teach(self, answers: list[tuple[list[int], list[int], float]]) -> None:
        """Draft what prompts are known to be answered, instead of what follows the same n-gram in them.

        Args:
            answers: of each prompt of at least ``STEM`` tokens: it, what it is answered, and the share of drafts
                that are right.
        """
        known = {tuple(prompt[:STEM]): (len(prompt), answer, share) for prompt, answer, share in answers}
        drafter = self.model_runner.drafter
        by_ngram = type(drafter).propose
        counts = drafter.counts = Counter()

        def propose(most: int, sampled: list[list[int]], num_tokens: Any, token_ids: Any, **kwargs: Any) -> Any:
            drafts = by_ngram(drafter, most, sampled, num_tokens, token_ids, **kwargs)
            for i, made in enumerate(sampled):
                counts["accepted"] += max(0, len(made) - 1)
                found = known.get(tuple(token_ids[i, :STEM].tolist()))
                if not made or found is None:
                    counts["by n-gram"] += bool(drafts[i])
                    continue
                length, answer, share = found
                at = int(num_tokens[i]) - length
                drafts[i] = [
                    token if Random(1000 * length + at + j).random() < share else (token + 1) % KINDS
                    for j, token in enumerate(answer[at : at + most])
                ]
                counts["right"] += share == 1
            return drafts

        drafter.propose = propose

    def count_drafts(self) -> dict[str, int]:
        """Of this rank, since it was taught."""
        return dict(self.model_runner.drafter.counts)
