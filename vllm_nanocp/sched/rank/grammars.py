# SPDX-License-Identifier: Apache-2.0
"""Structured output in a rank's process: a request that comes from another rank brings no grammar, only the place in
its output from which on a grammar has taken its tokens. Touches vLLM 0.32's ``StructuredOutputManager``, and
``Scheduler.grammar_compile_error_reqs``."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from ... import compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

logger = init_logger("vllm.nanocp.scheduler")

# An attribute of a structured request.
_BEGINS = "_nanocp_grammar_begins"


def grammar_begins(request: Request) -> int | None:
    """The first output token that a request's grammar has taken; None: reasoning has not ended, or nothing is made."""
    begins: int | None = getattr(request.structured_output_request, _BEGINS, None)
    return begins


def note_grammar_begins(structured: StructuredOutputRequest, begins: int | None) -> None:
    setattr(structured, _BEGINS, begins)


def end_by_grammar(scheduler: Scheduler, request: Request) -> None:
    """End a request that runs though its grammar has failed: with the next output, as vLLM's scheduler ends one that
    waits for its own. Until then it is not scheduled."""
    request.next_decode_eligible_step = sys.maxsize
    compat.note_grammar_error(scheduler.grammar_compile_error_reqs, request.request_id)


class RankGrammars(StructuredOutputManager):
    """vLLM's manager, which also notes where reasoning has ended.

    To look for that place once more, with all tokens at hand, takes vLLM a time that grows with their square.
    """

    def _get_constraint_bounds(self, request: Request, spec_tokens: Any, spec_tokens_committed: bool = False) -> Any:
        bounds = super()._get_constraint_bounds(request, spec_tokens, spec_tokens_committed)
        if spec_tokens_committed and bounds.grammar_start <= len(spec_tokens) and grammar_begins(request) is None:
            begins = request.num_output_tokens - len(spec_tokens) + bounds.grammar_start
            structured = request.structured_output_request
            assert structured is not None
            note_grammar_begins(structured, begins)
        return bounds

    def validate_tokens(self, request: Request, spec_tokens: list[int]) -> list[int]:
        """Drafts that may be verified. Where one of them ends the reasoning of a request whose grammar is still being
        compiled here, or has failed, only those before it: nothing can judge what follows."""
        structured = request.structured_output_request
        if structured is not None and (structured.grammar is None or isinstance(structured.grammar, Exception)):
            known = [token for token in spec_tokens if token != -1]
            begins = self._get_constraint_bounds(request, known).constraint_start
            spec_tokens = known[: max(0, begins - 1)]
        return super().validate_tokens(request, spec_tokens)

    def accept_tokens(self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any) -> bool:
        structured = request.structured_output_request
        # A request that runs when it comes has not waited for its grammar to be compiled.
        if structured is not None and isinstance(structured._grammar, Future) and not structured._grammar.done():
            bounds = self._get_constraint_bounds(request, new_token_ids, spec_tokens_committed=True)
            if bounds.grammar_start <= len(new_token_ids):
                structured._grammar.exception()  # waits
        if structured is not None and isinstance(structured.grammar, Exception):
            return False  # it was compiled here anew, in vain; vLLM's scheduler ends the request with an error
        return super().accept_tokens(request, new_token_ids, *args, **kwargs)

    def replay(self, request: Request) -> bool:
        """Bring the grammar of a request from another rank to where it was there.

        Returns:
            False if it has failed; one that is still being compiled has not, yet.
        """
        structured, begins = request.structured_output_request, grammar_begins(request)
        assert structured is not None
        if begins is not None and isinstance(structured._grammar, Future):
            structured._grammar.exception()  # waits
        grammar = structured.grammar
        if isinstance(grammar, Exception):
            logger.warning("nanocp: the grammar of request %s has failed: %r", request.request_id, grammar)
            return False
        if begins is None:
            return True
        assert grammar is not None
        structured.reasoning_ended = True
        return grammar.accept_tokens(request.request_id, list(request.output_token_ids)[begins:])
