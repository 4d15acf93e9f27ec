# SPDX-License-Identifier: Apache-2.0
"""Drafts of known quality: what is added to the workers of a test's engine that drafts by n-grams or by a model."""

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
        counts = drafter.counts = Counter()
        if hasattr(drafter, "dummy_run"):
            drafter.propose = self._by_model(known)
            return
        by_ngram = type(drafter).propose

        def propose(most: int, sampled: list[list[int]], num_tokens: Any, token_ids: Any, **kwargs: Any) -> Any:
            drafts = by_ngram(drafter, most, sampled, num_tokens, token_ids, **kwargs)
            for i, made in enumerate(sampled):
                counts["accepted"] += max(0, len(made) - 1)
                found = known.get(tuple(token_ids[i, :STEM].tolist()))
                if not made or found is None:
                    counts["by n-gram"] += bool(drafts[i])
                    continue
                drafts[i] = lies(found, int(num_tokens[i]), most)
                counts["right"] += found[2] == 1
            return drafts

        drafter.propose = propose

    def _by_model(self, known: dict[tuple[int, ...], tuple[int, list[int], float]]) -> Any:
        """A model's forwards all run, and write its KV; of requests that are known its drafts are replaced."""
        runner, drafter = self.model_runner, self.model_runner.drafter
        by_model, counts, made = type(drafter).propose, drafter.counts, getattr(drafter, "made", None)

        def propose(num_speculative_tokens: int, **kwargs: Any) -> Any:
            common, rejected = kwargs["common_attn_metadata"], kwargs["num_rejected_tokens_gpu"]
            lengths = common.seq_lens.clone()
            if rejected is not None:
                lengths -= rejected
                queries = common.query_start_loc[1:] - common.query_start_loc[:-1]
                counts["accepted"] += int((queries - 1 - rejected)[queries <= 1 + num_speculative_tokens].sum())
            drafts = by_model(drafter, num_speculative_tokens, **kwargs)
            for i, req_id in enumerate(runner.input_batch.req_ids):
                prompt = runner.requests[req_id].prompt_token_ids
                if made is not None:
                    made.append((tuple(prompt[:STEM]), int(lengths[i]) + 1, drafts[i].tolist()))
                found = known.get(tuple(prompt[:STEM]))
                if found is None:
                    counts["by model"] += 1
                elif int(lengths[i]) + 1 > found[0]:
                    for j, token in enumerate(lies(found, int(lengths[i]) + 1, num_speculative_tokens)):
                        drafts[i, j] = token
                    counts["right"] += found[2] == 1
            return drafts

        return propose

    @property
    def _drafter(self) -> Any:
        """V1's runner has a drafter, V2's a speculator."""
        return getattr(self.model_runner, "drafter", None) or self.model_runner.speculator

    def note_drafts(self) -> None:
        """Have a model's drafts noted from now on."""
        drafter = self._drafter
        drafter.made = []
        if hasattr(self.model_runner, "drafter"):
            self.teach([])
            return
        runner, by_model, made, counts = self.model_runner, drafter.propose, drafter.made, Counter[str]()
        drafter.counts = counts

        def propose(*args: Any, **kwargs: Any) -> Any:
            drafts = by_model(*args, **kwargs)
            if kwargs.get("dummy_run"):
                return drafts
            batch, num_sampled, num_rejected = args[0], args[5], args[6]
            lengths = (batch.seq_lens[: batch.num_reqs] - num_rejected + 1).tolist()
            stems = runner.req_states.all_token_ids.gpu[batch.idx_mapping, :STEM].tolist()
            if not (drafts == -1).all():  # stock vLLM 0.33 makes none that no request of a step can use
                made.extend(zip(map(tuple, stems), lengths, drafts.tolist(), strict=True))
            counts["accepted"] += int((num_sampled - 1).clamp(min=0).sum())
            return drafts

        drafter.propose = propose

    def noted_drafts(self) -> list[tuple[tuple[int, ...], int, list[int]]]:
        """Of each request in each step: the first tokens of its prompt, how many tokens it has, and its drafts."""
        return list(self._drafter.made)

    def count_drafts(self) -> dict[str, int]:
        """Of this rank, since it was taught, or its drafts are noted."""
        return dict(self._drafter.counts)


def lies(found: tuple[int, list[int], float], num_tokens: int, most: int) -> list[int]:
    """Drafts behind so many tokens of a request: of what it is answered, such a share is right."""
    length, answer, share = found
    at = num_tokens - length
    return [
        token if Random(1000 * length + at + j).random() < share else (token + 1) % KINDS
        for j, token in enumerate(answer[at : at + most])
    ]


def teach(engine: Any, answers: list[tuple[list[int], list[int], float]]) -> None:
    """``Oracle.teach`` in all workers of a test's engine."""
    engine.call(engine.llm.collective_rpc("teach", args=(answers,)))


def counted(engine: Any) -> Counter[str]:
    """What all ranks of an engine have counted of drafts."""
    return sum(map(Counter, engine.call(engine.llm.collective_rpc("count_drafts"))), Counter[str]())
