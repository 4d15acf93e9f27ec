# SPDX-License-Identifier: Apache-2.0
"""Structured output that moves from rank to rank: its grammar takes each token once, as if it had stayed."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_nanocp.sched.rank import grammars
from vllm_nanocp.sched.rank.grammars import RankGrammars
from vllm_nanocp.sched.rank.wire import pack, unpack

from . import loopback
from .test_queue import Queue
from .world_shapes import Ask, vllm_config  # noqa: F401
from .worlds import InMode, World, WorldError, in_mode, run_worlds  # noqa: F401

END = 7  # the token by which reasoning ends


class Grammar(StructuredOutputGrammar):
    """Keeps what it takes."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.calls = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.taken += tokens
        self.calls += 1
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        raise NotImplementedError

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """All tokens may come."""

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None:
        raise NotImplementedError


class Reasoner:
    """As parsers that look through all tokens, each time they are asked; counts how many it has looked at."""

    looked_at: ClassVar[int] = 0

    def __init__(self, **_: Any) -> None:
        """Takes a tokenizer and what the request's template was given."""

    def is_reasoning_end(self, tokens: Sequence[int]) -> bool:
        Reasoner.looked_at += len(tokens)
        return END in tokens

    def is_reasoning_end_streaming(self, tokens: Sequence[int], delta: Sequence[int]) -> bool:
        return self.is_reasoning_end(tokens)


def manager(cls: type[StructuredOutputManager], reasoner: bool, in_reasoning: bool) -> Any:
    """One that never compiles anything."""
    made = object.__new__(cls)
    made.enable_in_reasoning, made.reasoner_cls = in_reasoning, Reasoner if reasoner else None  # type: ignore[assignment]
    made.tokenizer = None  # type: ignore[assignment]
    return made


def structured(prompt: list[int]) -> Request:
    params = SamplingParams(max_tokens=10_000, structured_outputs=StructuredOutputsParams(regex="a*"))
    request = Request("r", prompt, params, None)
    assert request.structured_output_request is not None
    request.structured_output_request._grammar = Grammar()
    return request


def step(here: Any, request: Request, token: int) -> None:
    """As vLLM's scheduler takes a token in."""
    request.append_output_token_ids(token)
    assert here.accept_tokens(request, [token])


def move(there: Any, request: Request) -> Request:
    """As from one process to another."""
    moved = unpack(pack(request), None)
    assert moved.structured_output_request is not None
    moved.structured_output_request._grammar = Grammar()
    there.replay(moved)
    return moved


@pytest.mark.parametrize("ends_at", [0, 1, 9, 10, 30, None], ids=lambda at: f"end{at}")
@pytest.mark.parametrize(("reasoner", "in_reasoning"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("in_prompt", [False, True])
def test_a_moved_grammar_is_where_it_was(
    ends_at: int | None, reasoner: bool, in_reasoning: bool, in_prompt: bool
) -> None:
    tokens = [100 + i for i in range(40)]
    if ends_at is not None:
        tokens[ends_at] = END
    prompt = [1, 2, END if in_prompt else 3]
    stays, moves = structured(prompt), structured(prompt)
    stock = manager(StructuredOutputManager, reasoner, in_reasoning)
    ranks = [manager(RankGrammars, reasoner, in_reasoning) for _ in range(2)]
    for at, token in enumerate(tokens):
        step(stock, stays, token)
        step(ranks[at % 2], moves, token)
        if at % 5 in (0, 4):
            moves = move(ranks[(at + 1) % 2], moves)
        else:
            ranks.reverse()
        there, here = moves.structured_output_request, stays.structured_output_request
        assert there is not None and here is not None
        assert there.grammar.taken == here.grammar.taken  # type: ignore[union-attr]
        assert bool(there.reasoning_ended) == bool(here.reasoning_ended)


def test_a_move_looks_for_the_end_of_reasoning_no_more() -> None:
    """With 2,000 tokens of reasoning vLLM would look at millions to find it anew."""
    rank = manager(RankGrammars, True, False)
    request = structured([1])
    request.append_output_token_ids([100] * 2_000)
    for token in (END, *[101] * 2_000):
        step(rank, request, token)
    Reasoner.looked_at = 0
    moved = move(rank, request)
    assert Reasoner.looked_at == 0
    grammar: Any = moved.structured_output_request.grammar  # type: ignore[union-attr]
    assert (len(grammar.taken), grammar.calls) == (2_000, 1)


def test_a_grammar_is_waited_for_when_reasoning_ends() -> None:
    """Of a request that moves while it reasons it may still be compiled then."""
    rank = manager(RankGrammars, True, False)
    request = structured([1])
    step(rank, request, 100)
    moved = unpack(pack(request), None)
    assert moved.structured_output_request is not None
    compiled, grammar = Future[Any](), Grammar()
    moved.structured_output_request._grammar = compiled
    rank.replay(moved)
    step(rank, moved, 101)
    timer = threading.Timer(0.1, compiled.set_result, [grammar])
    timer.start()
    for token in (END, 102):
        step(rank, moved, token)
    timer.join()
    assert grammar.taken == [102]


class Compiling(Future[Any]):
    """Nobody waits for it."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        assert self.done(), "it runs without"
        return super().exception(timeout)


def test_one_that_goes_to_another_rank_to_start_waits_for_its_grammar_there(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it waited it was compiled, and elsewhere it is compiled anew: a mask cannot be made without."""
    compiled: list[Compiling] = []

    def grammar_init(_: Any, request: Request) -> None:
        if request.structured_output_request is not None:
            compiled.append(Compiling())
            request.structured_output_request._grammar = compiled[-1]

    monkeypatch.setattr(grammars.RankGrammars, "grammar_init", grammar_init)
    loopback.use(monkeypatch)
    queue = Queue(vllm_config)
    for name, outputs in (("goes on", 200), ("ends", 5)):
        queue.add(name, 400, outputs)
    queue.step(2)
    queue.add("waits", 400, 3, structured_outputs=StructuredOutputsParams(regex="a*"))
    queue.step()
    compiled[0].set_result(Grammar())
    queue.step(8)
    assert len(compiled) == 2 and "waits" not in queue.first
    compiled[1].set_result(Grammar())
    queue.end()
    assert queue.first["waits"] < 20


class StructuredWorld(World):
    """A world in which every request is structured, and its grammar must be told all its tokens, in order."""

    current: ClassVar[StructuredWorld]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        StructuredWorld.current = self

    def draw(self) -> list[Ask]:
        asks = super().draw()
        for ask in asks:
            request = ask.request
            assert request.sampling_params is not None
            request.sampling_params.structured_outputs = StructuredOutputsParams(regex="a*")
            moved = Request(
                request.request_id,
                request.prompt_token_ids,
                request.sampling_params,
                None,
                arrival_time=request.arrival_time,
                priority=request.priority,
                block_hasher=request._block_hasher,
            )
            ask.request = moved
        return asks


class Told(Grammar):
    """Takes only what the request makes next."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        super().accept_tokens(request_id, tokens)
        outputs = StructuredWorld.current.asks[request_id].truth.outputs
        if self.taken != outputs[: len(self.taken)]:
            raise WorldError(f"the grammar of {request_id} takes {self.taken[-3:]} at {len(self.taken)} of {outputs}")
        return True


def test_worlds(in_mode: InMode, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def grammar_init(_: Any, request: Request) -> None:
        assert request.structured_output_request is not None
        request.structured_output_request._grammar = Told()

    monkeypatch.setattr(grammars.RankGrammars, "grammar_init", grammar_init)
    counts = in_mode.run(StructuredWorld, 4, apart=True)
    assert counts["moves"] and counts["spills"] and counts["preemptions"], counts


class FailingWorld(StructuredWorld):
    """Every third request's grammar fails the first time it is compiled, every third one's the second time: where
    schedulers have processes, when it has moved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.compiled = Counter[str]()
        schedule = self.scheduler.schedule

        def with_bitmask() -> Any:
            output = schedule()
            self.scheduler.get_grammar_bitmask(output)
            return output

        self.scheduler.schedule = with_bitmask  # type: ignore[method-assign]

    def compile(self, request: Request) -> Future[StructuredOutputGrammar]:
        name, compiled = request.request_id, Future[StructuredOutputGrammar]()
        self.compiled[name] += 1
        if self.compiled[name] == 1 + int(name[1:]) % 3:
            compiled.set_exception(ValueError("in vain"))
        else:
            compiled.set_result(Told())
        return compiled

    def arrive(self, request: Request) -> None:
        if not loopback.in_use:  # the engine's process compiles it
            assert request.structured_output_request is not None
            request.structured_output_request._grammar = self.compile(request)
        super().arrive(request)

    def take(self, name: str, tokens: list[int], finish: FinishReason | None) -> None:
        if finish != FinishReason.ERROR:
            super().take(name, tokens, finish)
            return
        assert not tokens and self.compiled[name] == 1 + int(name[1:]) % 3
        self.counts["fail at first" if self.compiled[name] == 1 else "fail later"] += 1
        self.ended.add(name)


@pytest.mark.parametrize(("apart", "asynchronous"), [(False, False), (True, True)])
def test_a_grammar_that_fails_ends_its_request_only(
    vllm_config: Any,  # noqa: F811
    apart: bool,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "vllm")

    def grammar_init(manager: Any, request: Request) -> None:
        assert request.structured_output_request is not None
        request.structured_output_request._grammar = FailingWorld.current.compile(request)  # type: ignore[attr-defined]

    monkeypatch.setattr(grammars.RankGrammars, "grammar_init", grammar_init)
    init = StructuredOutputManager.__init__

    def with_bitmask(manager: Any, config: Any) -> None:
        init(manager, config)
        manager._grammar_bitmask = torch.zeros(64, 1, dtype=torch.int32)

    monkeypatch.setattr(StructuredOutputManager, "__init__", with_bitmask)
    counts = run_worlds(FailingWorld, vllm_config, 1, asynchronous, 1 + 2 * apart, monkeypatch, apart=apart)
    assert counts["arrivals"] and counts["fail at first"] > 2 and bool(counts["fail later"]) == apart, counts


def moved_while_compiled(rank: Any) -> tuple[Request, Request, Future[Any]]:
    """A request that reasons, the same as it comes to another rank, and its grammar there, which is being compiled."""
    request = structured([1])
    step(rank, request, 100)
    moved = unpack(pack(request), None)
    assert moved.structured_output_request is not None
    compiled = Future[Any]()
    moved.structured_output_request._grammar = compiled
    return request, moved, compiled


@pytest.mark.parametrize("fails", [False, True])
def test_drafts_that_end_reasoning_wait_for_a_grammar_that_is_being_compiled(fails: bool) -> None:
    """They are left out from the end of reasoning on, for nothing can judge them; then as in stock vLLM."""
    rank, stock = manager(RankGrammars, True, False), manager(StructuredOutputManager, True, False)
    request, moved, compiled = moved_while_compiled(rank)
    rank.replay(moved)
    drafts = [[101, END, 102], [101, 102, -1], [END], []]
    found = [rank.validate_tokens(moved, list(some)) for some in drafts]
    assert found == [[101], [101, 102], [], []]
    if fails:
        compiled.set_exception(ValueError("in vain"))
        assert [rank.validate_tokens(moved, list(some)) for some in drafts] == found
    else:
        compiled.set_result(Grammar())
        for some in drafts:
            assert rank.validate_tokens(moved, list(some)) == stock.validate_tokens(request, list(some))


@pytest.mark.parametrize("errors", [set(), {}], ids=["0.32", "0.33"])
def test_a_grammar_that_fails_is_noted_as_each_version_does(errors: Any) -> None:
    """0.33 has a dict there: from each request to what its client is told."""
    request = structured([1])
    grammars.end_by_grammar(SimpleNamespace(grammar_compile_error_reqs=errors), request)  # type: ignore[arg-type]
    assert set(errors) == {request.request_id} and request.next_decode_eligible_step > 10**9


def test_a_grammar_that_fails_while_its_request_reasons_is_refused_its_tokens() -> None:
    """As tokens that a grammar rejects, by which vLLM's scheduler ends a request with an error."""
    rank = manager(RankGrammars, True, False)
    _, moved, compiled = moved_while_compiled(rank)
    assert rank.replay(moved)
    step(rank, moved, 101)
    compiled.set_exception(ValueError("in vain"))
    moved.append_output_token_ids(END)
    assert not rank.accept_tokens(moved, [END])
