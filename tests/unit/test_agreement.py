# SPDX-License-Identifier: Apache-2.0
"""What the ranks agree on without asking each other: against what vLLM's own functions find by asking."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker import dp_utils as v1_dp_utils
from vllm.v1.worker.gpu import cudagraph_utils, dp_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.sharded_step import ShardedStep
from vllm_nanocp.config import MAX_PLACES, parse
from vllm_nanocp.entry.engine_config import check_capacities
from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.graph_capacities import capacities
from vllm_nanocp.plan import IDLE, Batch, Holder, PlanRow, StepPlan, idle_batch
from vllm_nanocp.worker.dp_agreement import agree, capacity_of
from vllm_nanocp.worker.runner import V1Runner, V2Runner
from vllm_nanocp.worker.sharded_graphs import (
    NanoCPCudaGraphManager,
    NanoCPDraftGraphManager,
    ShardedCapture,
    ShardedDescriptor,
    sharded_sizes,
)
from vllm_nanocp.worker.speculator_drafts import SpeculatorDrafts
from vllm_nanocp.worker.worker import _smallest

SIZES = [1, 2, 4, 8, 16, 24, 32]


def make_manager(
    monkeypatch: pytest.MonkeyPatch,
    mode: CUDAGraphMode,
    degree: int = 2,
    lora: Any = None,
    queries: int = 1,
    kind: type[Any] = NanoCPCudaGraphManager,
    sizes: list[int] = SIZES,
    seqs: int = 24,
    capacities: tuple[int, ...] = (2, 8),
) -> Any:
    """With graphs 'captured' for all it would capture."""
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=1, is_last_rank=1))
    nanocp = {"ranks": 2, "max_degree": degree}
    monkeypatch.setattr(context, "capacities", capacities)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode, cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)
        ),
        lora_config=lora,
        model_config=SimpleNamespace(is_encoder_decoder=False, use_mla=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=2, data_parallel_rank=1),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        additional_config={"nanocp": nanocp},
    )
    monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)
    manager = kind(config, torch.device("cpu"), mode, decode_query_len=queries)
    manager._graphs_captured = True
    manager.graphs = {d: SimpleNamespace() for d in manager._capture_descs.get(CUDAGraphMode.FULL, [])}  # type: ignore
    return manager


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> dict[CUDAGraphMode, NanoCPCudaGraphManager]:
    return {mode: make_manager(monkeypatch, mode) for mode in MODES}


MODES = [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE]


def test_sizes() -> None:
    """The largest, and of the others those that spare a fifth of the next; of capacities, none above what is enough."""
    assert sharded_sizes([1, 2, 4, 8, 16, 24, 28, 32], [4, 16]) == [
        (1, 4), (2, 4), (4, 4), (8, 4), (8, 16), (16, 4), (16, 16), (24, 4), (24, 16), (32, 4), (32, 16)
    ]  # fmt: skip
    assert sharded_sizes([8], []) == sharded_sizes([], [4]) == []
    assert sharded_sizes([1, 2], [8, 16]) == [(1, 8), (2, 8)]


@pytest.mark.parametrize(("routed", "latent"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(("seqs", "largest"), [(256, 512), (1024, 512), (7, 8), (1024, None)])
def test_no_number_of_sharded_rows_leaves_the_graphs(
    routed: bool, latent: bool, queries: int, seqs: int, largest: int | None
) -> None:
    """Unless capacities are set: every batch that vLLM has a graph for has one with room for all its visits."""
    sizes = [] if largest is None else sorted({1, 2, 4, *range(8, largest + 1, 8)})
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes),
        num_speculative_tokens=queries - 1,
        model_config=SimpleNamespace(use_mla=latent),
        additional_config={"nanocp": {"ranks": 4}},
    )
    found = capacities(config, routed)
    # What attends to latents takes all places of a capacity, used or not.
    assert not latent or found == capacities(config, False)
    assert found == tuple(sorted(set(found))) and (len(found) == 1 or latent or not routed)
    assert (4 in found[:-1]) == (latent and found[-1] > 4), "few visits are the common case"
    # Requests, as vLLM rounds tokens.
    requests = sorted({-(-size // queries) for size in sizes if -(-size // queries) * queries <= max(sizes)})
    pairs = sharded_sizes(requests, found)
    for rows in range(1, min(seqs, max(requests, default=0)) + 1):
        fitting = [(size, c) for size, c in pairs if size >= rows and c >= rows]
        vllms = min(size for size in requests if size >= rows)
        assert fitting and min(fitting)[0] <= max(1.25 * vllms, vllms), rows
    config.additional_config = {"nanocp": {"ranks": 4, "graph_capacities": [3, 9]}}
    assert capacities(config, routed) == (3, 9)
    config.additional_config = {"nanocp": {"ranks": 4, "graph_capacities": []}}
    assert capacities(config, routed) == ()


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("ranks", [2, 100, MAX_PLACES])
def test_there_are_places_for_the_capacity(ranks: int, drafts: int) -> None:
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_PLACES),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[MAX_PLACES]),
        num_speculative_tokens=drafts,
        model_config=SimpleNamespace(use_mla=False),
        additional_config={"nanocp": {"ranks": ranks}},
    )
    (most,) = capacities(config, True)
    assert most == 1 or most * (ranks + 1) * (1 + drafts) <= MAX_PLACES


@pytest.mark.parametrize("drafts", [0, 1, 4])
@pytest.mark.parametrize("ranks", [2, 8])
def test_capacities_set_by_hand_have_places_for_drafts(ranks: int, drafts: int) -> None:
    """They are read before it is known how many drafts there are."""
    config: Any = SimpleNamespace(num_speculative_tokens=drafts)
    most = MAX_PLACES // ((ranks + 1) * (1 + drafts))
    for fitting in (None, [], [1, most]):
        check_capacities(config, parse({"graph_capacities": fitting}, ranks))
    if drafts:
        with pytest.raises(NanoCPConfigError) as caught:
            check_capacities(config, parse({"graph_capacities": [1, most + 1]}, ranks))
        (line,) = str(caught.value).splitlines()
        assert f"{most + 1} visits of {1 + drafts} queries from each of {ranks} ranks" in line
        assert f"use at most {most}," in line


def test_what_is_captured(managers: dict[CUDAGraphMode, NanoCPCudaGraphManager]) -> None:
    """After all of vLLM's, from large to small; vLLM's dispatcher never finds them."""
    manager = managers[CUDAGraphMode.FULL_AND_PIECEWISE]
    captured = manager._capture_descs[CUDAGraphMode.FULL]
    stock, sharded = captured[:6], captured[6:]
    assert [d.num_tokens for d in stock] == [24, 16, 8, 4, 2, 1]
    assert sharded and set(sharded) == set(manager.sharded)
    assert [d.num_tokens for d in sharded] == sorted((d.num_tokens for d in sharded), reverse=True)
    for tokens in range(1, 33):
        assert not isinstance(manager.dispatch(tokens, tokens, 1, 0), ShardedDescriptor)
    assert not managers[CUDAGraphMode.PIECEWISE].sharded and not managers[CUDAGraphMode.NONE].sharded


def test_nothing_more_is_captured_without_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not make_manager(monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE, degree=1).sharded


def test_no_graph_is_captured_that_no_step_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA the ranks ask each other, and know nothing of these graphs."""
    assert make_manager(monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE).sharded
    assert not make_manager(monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE, lora=SimpleNamespace(max_loras=1)).sharded


def test_the_smallest_graph_that_fits(managers: dict[CUDAGraphMode, NanoCPCudaGraphManager]) -> None:
    manager = managers[CUDAGraphMode.FULL_AND_PIECEWISE]

    def found(tokens: int, visits: int) -> tuple[int, int] | None:
        desc = manager.sharded_graph(tokens, visits)
        return None if desc is None else (desc.num_tokens, desc.capacity)

    assert found(1, 1) == (1, 2) and found(3, 2) == (4, 2) and found(3, 3) == (4, 8) and found(9, 8) == (16, 8)
    assert found(24, 1) == (24, 2) and found(25, 1) is None and found(4, 9) is None
    manager.graphs = {}  # not captured yet
    assert found(1, 1) is None


def captured_in(manager: Any, monkeypatch: pytest.MonkeyPatch) -> dict[BatchExecutionDescriptor, list[Any]]:
    """For each graph the steps of the context: while vLLM prepares inputs, and in the forward that it records."""
    seen: dict[BatchExecutionDescriptor, list[Any]] = {}

    def note(desc: Any) -> None:
        seen.setdefault(desc, []).append((context.step, context.draft_step, context.draft_index))

    def prepare(desc: Any, warmup: bool) -> Callable[[Any], None]:
        note(desc)
        return lambda mode: note(desc)

    def fake(self: Any, create: Callable[..., Any], progress: str) -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            forward = create(desc, warmup=True)
            assert context.step is context.draft_step is None and not context.draft_index
            forward(CUDAGraphMode.NONE)
            assert context.step is context.draft_step is None and not context.draft_index

    monkeypatch.setattr(CudaGraphManager, "capture", fake)
    ShardedCapture.capture(manager, prepare)
    assert len(seen) == len(manager._capture_descs[CUDAGraphMode.FULL])
    return seen


def test_capture_lays_out_an_empty_step(
    monkeypatch: pytest.MonkeyPatch, managers: dict[CUDAGraphMode, NanoCPCudaGraphManager]
) -> None:
    """While vLLM prepares the inputs of a sharded graph, and for no other."""
    for desc, contexts in captured_in(managers[CUDAGraphMode.FULL_AND_PIECEWISE], monkeypatch).items():
        step = None
        if isinstance(desc, ShardedDescriptor):
            step = ShardedStep(1, send_counts=[0, 0], recv_counts=[0, 0], capacity=desc.capacity)
        assert contexts == [(step, None, 0)] * 2


@pytest.mark.parametrize("routed", [False, True])
def test_graphs_of_a_draft_model(monkeypatch: pytest.MonkeyPatch, routed: bool) -> None:
    """Of its first forward as many as of the target, with the same rows. Of the later ones, of one query a row, where
    these have tables of fixed size, and they are told apart."""
    monkeypatch.setattr(context, "queries", 3)
    monkeypatch.setattr(context, "draft_routes", {4: None, 1: None} if routed else {})
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    target = make_manager(monkeypatch, mode, queries=3)
    first = make_manager(monkeypatch, mode, queries=3, kind=NanoCPDraftGraphManager)
    assert first.sharded == target.sharded and {d.capacity for d in first.sharded} == {2, 8}
    for desc, contexts in captured_in(first, monkeypatch).items():
        assert all((step is not None) == isinstance(desc, ShardedDescriptor) for step, _, _ in contexts)
        assert all((later, index) == (None, 0) for _, later, index in contexts)
    # vLLM takes graphs of one query a row for decodes only.
    later = make_manager(monkeypatch, CUDAGraphMode.FULL_DECODE_ONLY, kind=NanoCPDraftGraphManager)
    assert {d.capacity for d in later.sharded} == ({1, 4} if routed else set())
    assert all(d.num_tokens == d.num_reqs for d in later.sharded)
    for desc, contexts in captured_in(later, monkeypatch).items():
        step = None
        if isinstance(desc, ShardedDescriptor):
            step = ShardedStep(1, send_counts=[0, 0], recv_counts=[0, 0], capacity=desc.capacity)
        assert contexts == [(step, step, int(step is not None))] * 2


def worlds_of(queries: int) -> st.SearchStrategy[list[Batch]]:
    """Batches of the ranks: idle, of decodes with drafts, of decodes with fewer, of anything."""
    batches = st.one_of(
        st.just(idle_batch(queries)),
        st.integers(1, 24).map(lambda n: Batch(n, n * queries, queries)),
        st.tuples(st.integers(1, 24), st.integers(1, queries)).map(lambda t: Batch(t[0], t[0] * t[1], t[1])),
        st.tuples(st.integers(1, 24), st.integers(0, 40)).map(lambda t: Batch(t[0], sum(t), 0)),
    )
    return st.lists(batches, min_size=2, max_size=5)


def stock_answer(manager: Any, worlds: list[Batch], rank: int) -> Any:
    """vLLM's functions, with an all-reduce that knows what the others would put in."""

    def contributions(tensor: torch.Tensor, group: Any = None) -> None:
        for other, batch in enumerate(worlds):
            if other == rank:
                continue
            uniform = batch.queries or None
            desired = manager.dispatch(
                batch.num_reqs, batch.num_tokens, uniform, num_active_loras=0, max_query_len=None
            )
            tensor[0][other], tensor[1][other] = batch.num_tokens, desired.cg_mode.value
            tensor[2][other], tensor[3][other], tensor[5][other] = uniform or 0, -1, batch.num_reqs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_utils, "get_dp_group", lambda: SimpleNamespace(cpu_group=None, cpu_all_reduce_=contributions))
        if hasattr(dp_utils, "dist"):  # 0.32
            patch.setattr(dp_utils.dist, "all_reduce", contributions)
        mine = worlds[rank]
        return dp_utils.dispatch_cg_and_sync_dp(
            manager, mine.num_reqs, mine.num_tokens, mine.queries or None, len(worlds), rank
        )


def same(ours: Any, stock: Any) -> None:
    (desc, state), (stock_desc, stock_state) = ours, stock
    assert desc == stock_desc
    assert torch.equal(state.num_tokens_across_dp, stock_state.num_tokens_across_dp)
    for f in dataclasses.fields(state):
        if f.name != "num_tokens_across_dp":
            assert getattr(state, f.name) == getattr(stock_state, f.name), f.name


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_without_shards_it_is_what_vllm_finds(mode: CUDAGraphMode, data: st.DataObject) -> None:
    queries = data.draw(st.sampled_from([1, 3]))
    world = data.draw(worlds_of(queries))
    with pytest.MonkeyPatch.context() as patch:
        manager = make_manager(patch, mode, queries=queries)
        for rank in range(len(world)):
            same(agree(manager, world, rank, False, None), stock_answer(manager, world, rank))


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data(), visits=st.none() | st.integers(1, 10))
def test_with_shards_all_ranks_find_the_same(mode: CUDAGraphMode, data: st.DataObject, visits: int | None) -> None:
    """One graph that knows shards and has room for all; or, on every rank, none that would replay without them."""
    queries = data.draw(st.sampled_from([1, 3]))
    world = data.draw(worlds_of(queries))
    with pytest.MonkeyPatch.context() as patch:
        manager = make_manager(patch, mode, queries=queries)
        found = [agree(manager, world, rank, True, visits) for rank in range(len(world))]
        modes = {desc.cg_mode for desc, _ in found}
        assert len(modes) == 1
        if modes == {CUDAGraphMode.FULL}:
            assert len({desc for desc, _ in found}) == 1
            (desc, _) = found[0]
            assert all(b.queries == queries for b in world) and visits is not None and visits <= capacity_of(desc)
            assert desc.num_tokens >= max(b.num_tokens for b in world)
            assert desc.num_reqs is not None and desc.num_reqs * queries == desc.num_tokens
        else:
            assert all(capacity_of(desc) == 0 for desc, _ in found)
            plain = [Batch(b.num_reqs, b.num_tokens, 0) for b in world]
            for rank, ours in enumerate(found):
                same(ours, stock_answer(manager, plain, rank))


COUNTS = (1, 3, 4, 5, 15, 16, 17, 64, 65)  # about capacities


def sharded_plan(dice: Random, queries: int, ranks: int, most: int) -> StepPlan:
    """Decodes on each rank, or none, and of some of them visits."""
    counts = [min(most, dice.choice((0, *COUNTS))) for _ in range(ranks)]
    plan = StepPlan(batches=[Batch(n, n * queries, queries) if n else idle_batch(queries) for n in counts])
    for home, count in enumerate(counts):
        for _ in range(min(count, dice.choice((0, *COUNTS)))):
            holders = dice.choice(([dice.randrange(ranks)], [(home + 1) % ranks], range(ranks)))
            plan.rows.append(PlanRow("r", home, queries, 0, 0, tuple(Holder(rank, "s", 16) for rank in holders)))
    return plan


@pytest.mark.parametrize(("routed", "latent"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize(("seqs", "largest"), [(4, 16), (20, 64), (256, 16), (256, 256)])
def test_all_forwards_of_a_step_have_the_same_graphs_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, routed: bool, latent: bool, queries: int, seqs: int, largest: int
) -> None:
    """With capacities as they are by default, few and many visits, idle ranks, fewer slots than a capacity, graphs up
    to some size: the target's, the draft model's first forward and its later ones each replay one graph on all ranks,
    with room for all that it is for, or none do. The first one's has the target's tables."""
    dice, ranks, sizes = Random(seqs + queries), 2 + 2 * (largest == 64), sorted({1, 2, 4, *range(8, largest + 1, 8)})
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes),
        num_speculative_tokens=queries - 1,
        model_config=SimpleNamespace(use_mla=latent),
        additional_config={"nanocp": {"ranks": ranks}},
    )
    found = capacities(config, routed)
    routes = dict.fromkeys(found) if routed else {}
    later_routes = routes if queries > 2 else {}
    monkeypatch.setattr(context, "queries", queries)
    monkeypatch.setattr(context, "draft_routes", later_routes)
    made = functools.partial(make_manager, monkeypatch, sizes=sizes, seqs=seqs, capacities=found)
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    target, first = made(mode, queries=queries), made(mode, queries=queries, kind=NanoCPDraftGraphManager)
    later = made(CUDAGraphMode.FULL_DECODE_ONLY, kind=NanoCPDraftGraphManager) if queries > 2 else None
    most_reqs, replayed = max((d.num_reqs for d in target.sharded), default=0), 0
    for _ in range(80):
        plan = sharded_plan(dice, queries, ranks, seqs)
        if not plan.rows:
            continue
        visits, most = plan.most_visits(ranks, queries), max(batch.num_reqs for batch in plan.batches)
        seen = set()
        for rank in range(ranks):
            drafts: Any = object.__new__(SpeculatorDrafts)
            step, draft_step = (ShardedStep(rank, capacity=_smallest(r, visits)) for r in (routes, later_routes))
            monkeypatch.setattr(context, "step", step)
            monkeypatch.setattr(context, "draft_step", draft_step)
            desc, state = agree(target, plan.batches, rank, True, visits)
            if capacity_of(desc):
                step.capacity, step.captured = capacity_of(desc), True
            graphs = [desc if capacity_of(desc) else None, drafts._first_graph(first, desc.num_tokens)]
            graphs.append(drafts._later_graph(later, state.num_reqs))
            assert graphs[1] is None or capacity_of(graphs[1]) == step.capacity
            for graph, each in zip(graphs, (queries, queries, 1), strict=True):
                if graph is not None:
                    assert visits is not None and visits <= capacity_of(graph) and graph.num_tokens >= most * each
            seen.add((desc.cg_mode, *graphs, step.capacity, draft_step.capacity, state.num_reqs))
        assert len(seen) == 1, seen
        # No step of decodes that there is room for is without.
        fits = most <= most_reqs and visits is not None and visits <= found[-1]
        assert [graph is not None for graph in graphs[:2]] == [fits, fits]
        assert graphs[2] is not None or not (fits and later_routes)
        replayed += fits
    assert replayed > 3


def test_busiest_pair() -> None:
    def row(home: int, *holders: int, queries: int = 1) -> PlanRow:
        return PlanRow("r", home, queries, 0, 0, tuple(Holder(rank, "s", 16) for rank in holders))

    assert StepPlan().most_visits(3) == 0
    assert StepPlan(rows=[row(0, 1), row(0, 2), row(0, 2), row(1, 0)]).most_visits(3) == 3  # of three rows at 0
    assert StepPlan(rows=[row(0, 1, 1), row(2, 1)]).most_visits(3) == 2
    assert StepPlan(rows=[row(0, 1), row(0, 1, queries=2)]).most_visits(3) is None
    assert StepPlan(rows=[row(0, 1, queries=2), row(0, 1, queries=2)]).most_visits(3, 2) == 2
    assert StepPlan(rows=[row(0, 1), row(0, 1, queries=2)]).most_visits(3, 2) is None
    assert StepPlan(rows=[row(0, 1, 2, 0)]).most_visits(3) == 1  # the own part has a place of its own
    assert StepPlan(rows=[row(0, 1, 2, 0, 1)]).most_visits(3) is None


def runner_of(**values: Any) -> Any:
    defaults: dict[str, Any] = dict(lora_config=None, is_encoder_decoder=False, parallel_config=None)
    return SimpleNamespace(prepare_attn=lambda batch: batch, speculative_config=None, **(defaults | values))


def test_the_v2_runner_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, managers: dict[CUDAGraphMode, NanoCPCudaGraphManager]
) -> None:
    from vllm.v1.worker.gpu import model_runner as module

    asked: list[Any] = []
    monkeypatch.setattr(module, "dispatch_cg_and_sync_dp", lambda *args, **kwargs: asked.append((args, kwargs)))
    monkeypatch.setattr(module, "ModelCudaGraphManager", module.ModelCudaGraphManager)
    runner = V2Runner(runner_of())
    manager = managers[CUDAGraphMode.FULL_AND_PIECEWISE]
    assert module.ModelCudaGraphManager is NanoCPCudaGraphManager
    dispatch = module.dispatch_cg_and_sync_dp
    dispatch(manager, 3, 3, 1, 2, 0)
    assert len(asked) == 1  # vLLM's own warm-up runs have no plan
    runner.plan = StepPlan(batches=[Batch(3, 3, 1), IDLE])
    desc, _ = dispatch(manager, 3, 3, 1, 2, 0)
    assert (desc.cg_mode, desc.num_tokens) == (CUDAGraphMode.FULL, 4) and len(asked) == 1
    runner.plan.rows.append(PlanRow("r", 0, 1, 0, 0, (Holder(1, "s", 16),)))
    context.step = ShardedStep(0)
    try:
        desc, _ = dispatch(manager, 3, 3, 1, 2, 0)
        assert context.step.capacity == 2 == desc.capacity and len(asked) == 1
        with pytest.raises(RuntimeError, match=r"rank 1 runs \(2, 2, 1\)"):
            dispatch(manager, 2, 2, 1, 2, 1)
        runner._must_ask = True
        dispatch(manager, 3, 3, 1, 2, 0, max_query_len=1, uniform_decode=True)
        assert asked[1] == ((manager, 3, 3, None, 2, 0), dict(max_query_len=None, uniform_decode=False))
    finally:
        context.step = None


def test_the_v1_runner_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import gpu_model_runner as module

    def ask(num_tokens: int, **_: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(module, "coordinate_batch_across_dp", ask)
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)
    model_runner = runner_of(compilation_config=graphs)
    model_runner.parallel_config = SimpleNamespace(data_parallel_rank=0)
    runner = V1Runner(model_runner)
    world = [Batch(2, 9, 0), IDLE]
    runner.plan = StepPlan(batches=world)
    kwargs = dict(allow_microbatching=False, num_tokens_padded=9, uniform_decode=False, cudagraph_mode=0)
    ours = module.coordinate_batch_across_dp(num_tokens_unpadded=9, parallel_config=None, **kwargs)

    def reduce(**_: Any) -> torch.Tensor:
        return torch.tensor([[9, 1], [9, 1], [0, 0], [0, 0]], dtype=torch.int32)

    monkeypatch.setattr(v1_dp_utils, "_run_ar", reduce)
    config: Any = SimpleNamespace(data_parallel_size=2, num_ubatches=1, disable_nccl_for_dp_synchronization=True)
    stock = v1_dp_utils.coordinate_batch_across_dp(num_tokens_unpadded=9, parallel_config=config, **kwargs)
    assert ours[0] == stock[0] and ours[2] == stock[2] and torch.equal(ours[1], stock[1])
    with pytest.raises(RuntimeError, match="rank 0 runs 8"):
        module.coordinate_batch_across_dp(num_tokens_unpadded=8, parallel_config=None, **kwargs)
    runner.plan = None
    with pytest.raises(AssertionError, match="asked"):
        module.coordinate_batch_across_dp(num_tokens_unpadded=9, parallel_config=None, **kwargs)
