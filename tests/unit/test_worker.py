# SPDX-License-Identifier: Apache-2.0
"""What a rank's worker answers, without a model."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from tests.unit.attention_steps import Shape
from tests.unit.flash_steps import make_impl
from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.gqa.flash_backend import GroupedQueryOnHopper
from vllm_nanocp.plan import IDLE, Batch, StepPlan
from vllm_nanocp.step_messages import StepMessage, generators_in
from vllm_nanocp.worker import gpu_worker
from vllm_nanocp.worker.gpu_worker import NanoCPGPUWorker
from vllm_nanocp.worker.runner import V1Runner, V2Runner
from vllm_nanocp.worker.worker import OneRank


class _Stock:
    """vLLM's worker on a rank without tokens."""

    def execute_model(self, part: Any) -> Any:
        return EMPTY_MODEL_RUNNER_OUTPUT


class _Rank(OneRank, _Stock):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tp_rank, self.nanocp = 0, SimpleNamespace(ranks=2, scheduler_processes=False)
        self.shards = SimpleNamespace(rank=0, update=lambda plan: None)
        self.runner = SimpleNamespace(
            batch_row=None,
            plan=None,
            drafts=None,
            generator_states=lambda ids: dict.fromkeys(ids, b"state"),
            run_idle=lambda attention: None,
        )


def step(departing: list[str]) -> StepMessage:
    empty = pickle.dumps(SchedulerOutput.make_empty())
    plan = StepPlan(batches=[IDLE, Batch(1, 1, 1)], departing=departing)
    return StepMessage([empty, empty], plan)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> _Rank:
    monkeypatch.setattr("vllm_nanocp.worker.worker.make_step", lambda *_, **__: None)
    return _Rank()


def test_an_idle_rank_reports_generators_though_others_sample(rank: _Rank) -> None:
    """Its last request departs; the executor asks all ranks a second time, as other ranks have something to sample."""
    rank.execute_model(step(["gone"]))
    answer = rank.sample_tokens(None)
    assert generators_in(answer) == {"gone": b"state"}  # type: ignore[arg-type]


def test_generators_are_reported_once(rank: _Rank) -> None:
    rank.execute_model(step(["gone"]))
    rank.execute_model(step([]))
    assert generators_in(rank.sample_tokens(None)) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("busy", [False, True])
def test_a_step_that_failed_is_not_sampled(rank: _Rank, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With async scheduling the engine looks at the second answer only, and the other ranks have none: an empty one of
    this rank would have it wait for them for ever."""

    def failing(*_: Any, **__: Any) -> Any:
        raise ValueError("in the middle of the step")

    rank.execute_model(step([]))
    with monkeypatch.context() as patch:
        patch.setattr(*((_Stock, "execute_model") if busy else (rank.runner, "run_idle")), failing)
        with pytest.raises(ValueError, match="in the middle"):
            rank.execute_model(step([]))
    for ask in (lambda: rank.sample_tokens(None), lambda: rank.execute_model(step([]))):  # nor is another step run
        with pytest.raises(RuntimeError, match="rank 0 has failed in a step"):
            ask()


class _Runner(LoRAModelRunnerMixin):
    """A model runner that does nothing but what vLLM's do with adapters in a pass without requests."""

    def __init__(self, adapters: bool) -> None:
        self.lora_config = SimpleNamespace(max_loras=2, max_lora_rank=8) if adapters else None
        self.lora_manager = MagicMock()
        self.passes = 0

    def _dummy_run(self, num_tokens: int, **_: Any) -> None:
        scheduled = np.array([num_tokens], dtype=np.int32)
        with self.maybe_dummy_run_with_lora(self.lora_config, scheduled, None, remove_lora=True, num_active_loras=2):
            self.passes += 1


@pytest.mark.parametrize("runner", [V1Runner, V2Runner])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_pass_without_requests_keeps_adapters(runner: Any, adapters: bool) -> None:
    """It neither loads any, stand-ins neither, nor unloads those of requests; before serving it does."""
    adapter = object.__new__(runner)
    made = adapter.model_runner = _Runner(adapters)
    adapter.drafts = None
    adapter.run_idle(attention=True)
    calls = made.lora_manager.mock_calls
    assert made.passes == 1 and [name for name, *_ in calls] == ["set_active_adapters"] * adapters
    if adapters:
        requests, mapping = calls[0].args
        assert not requests and set(mapping.index_mapping) | set(mapping.prompt_mapping) == {0}
        made._dummy_run(1)
        assert made.lora_manager.remove_all_adapters.called and made.lora_manager.add_dummy_lora.called


def test_a_draft_model_runs_when_others_sample(rank: _Rank) -> None:
    """On a rank without tokens: not before all ranks have answered, and with the plan."""
    ran: list[int] = []
    rank.runner.drafts = SimpleNamespace(run_idle=lambda: ran.append(len(rank.runner.plan.batches)))  # type: ignore[union-attr, assignment]
    rank.execute_model(step([]))
    assert ran == [] and rank.runner.plan is not None
    rank.sample_tokens(None)
    assert ran == [2] and rank.runner.plan is None
    rank.execute_model(StepMessage([pickle.dumps(SchedulerOutput.make_empty())] * 2, StepPlan()))  # nobody has tokens
    assert rank.runner.plan is None
    rank.sample_tokens(None)
    assert ran == [2]


def test_kernels_are_warmed_up_before_vllm_watches_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--observability-config.jit_monitor_mode error`` it would end the start."""
    calls: list[Any] = []
    worker: Any = object.__new__(NanoCPGPUWorker)
    worker.nanocp = SimpleNamespace(degree_limit=2, decode_bench=False)
    worker.family = SimpleNamespace(warm_up=calls.append)
    worker.attention_layers = lambda: {"layer": "its layer"}
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: calls.append("vllm") or "times")
    assert worker.compile_or_warm_up_model() == "times"
    assert calls == ["its layer", "vllm"]


def choosing_worker(monkeypatch: pytest.MonkeyPatch, wanted: str, made: tuple[int, ...]) -> Any:
    """Of two ranks whose GPUs reach each other's memory, before it chooses its exchange; without a runner and a family.

    Args:
        monkeypatch: the test's.
        wanted: the exchange.
        made: capacities.
    """
    monkeypatch.setattr(context, "routes", {})
    monkeypatch.setattr(context, "draft_routes", {})
    monkeypatch.setattr(context, "capacities", ())
    group = SimpleNamespace(cpu_group=0, device_group=0, rank_in_group=0)
    monkeypatch.setattr(gpu_worker, "get_dp_group", lambda: group)
    monkeypatch.setattr(gpu_worker, "reachable", lambda *_: "")
    monkeypatch.setattr(gpu_worker, "first_problem", lambda problem, _: problem)
    monkeypatch.setattr(gpu_worker, "capacities", lambda _, routed: made)
    worker: Any = object.__new__(NanoCPGPUWorker)
    worker.nanocp = SimpleNamespace(graph_capacities=None, exchange=wanted, ranks=2)
    worker.device, worker.global_rank, worker.vllm_config = torch.device("cpu"), 1, None
    return worker


@pytest.mark.parametrize(
    ("wanted", "unrouted", "taken"),
    [("auto", "", True), ("auto", "not measured", False), ("routed", "not measured", True), ("collective", "", False)],
)
def test_the_exchange_of_a_family(wanted: str, unrouted: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has measured is taken only where it is asked for; its memory is the family's."""
    asked: list[tuple[int, int]] = []

    def routes(capacity: int, ranks: int, rank: int, queries: int, allocate: Any) -> str:
        asked.append((capacity, queries))
        return f"routes of {capacity}"

    worker = choosing_worker(monkeypatch, wanted, (16, 64))
    worker.runner, worker.family = SimpleNamespace(drafts=None), SimpleNamespace(unrouted=unrouted, routes=routes)
    worker._choose_exchange()
    assert asked == ([(16, 1), (64, 1)] if taken else [])
    assert context.routes == ({16: "routes of 16", 64: "routes of 64"} if taken else {})


@pytest.mark.parametrize("queries", [2, 3])
def test_later_drafts_have_routes_of_their_own(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one draft a step there is no later forward."""
    monkeypatch.setattr(context, "queries", queries)
    worker = choosing_worker(monkeypatch, "routed", (16,))
    worker.runner = SimpleNamespace(drafts=object())
    worker.family = SimpleNamespace(unrouted="", routes=lambda *args: args[3])
    worker._choose_exchange()
    assert context.routes == {16: queries} and context.draft_routes == ({16: 1} if queries > 2 else {})


def test_memory_of_a_sharded_step_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """While vLLM measures, every layer of its dummy step takes it for a moment; afterwards, none. Tables of fixed size
    are made once, and stay."""
    worker: Any = object.__new__(NanoCPGPUWorker)
    heads = dict(get_head_size=lambda: 128, get_num_attention_heads=lambda _: 32, get_num_kv_heads=lambda _: 4)
    model = SimpleNamespace(dtype=torch.bfloat16, **heads)
    scheduler = SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=4)
    monkeypatch.setattr(context, "capacities", (3,))
    monkeypatch.setattr(context, "tables", {})
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    model.is_encoder_decoder = False
    worker.vllm_config = SimpleNamespace(
        model_config=model, scheduler_config=scheduler, compilation_config=graphs, lora_config=None
    )
    worker.nanocp = SimpleNamespace(degree_limit=2, ranks=2)
    worker.vllm_config.parallel_config, worker.device = None, torch.device("cpu")
    worker.family = GroupedQueryOnHopper(worker.vllm_config)
    impl, output = make_impl(Shape(32, 4, 128, torch.bfloat16, 16)), torch.ones((4, 32, 128))
    taken: list[int] = []
    empty = torch.empty

    def counted(size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(size, int):  # tables
            return empty(size, *args, **kwargs)
        taken.append(size)
        return empty(0)

    def dummy_step() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", counted)
            impl.forward(None, output, output, output, None, None, output)  # type: ignore[arg-type]
        assert not output.any()

    def measure(_: Any) -> int:
        dummy_step()
        if len(taken) > 1:
            raise RuntimeError("out of memory")
        return 7

    monkeypatch.setattr(Worker, "determine_available_memory", measure)
    assert worker.determine_available_memory() == 7
    # A copy of each query that goes, comes or stays, its float32 result; pieces of 8,192 queries and their rounded sum.
    row, query = 4 * 32 * 129, 2 * 32 * 128
    assert taken == [5 * 8192 * (row + query) + 8192 * (2 * row + query)]
    tables = dict(context.tables)
    assert list(tables) == [3] and tables[3].max_tokens == 4 and tables[3].num_ranks == 2
    with pytest.raises(RuntimeError):
        worker.determine_available_memory()
    dummy_step()
    assert len(taken) == 2 and context.tables == tables
    context.tables.clear()
    graphs.cudagraph_mode = CUDAGraphMode.NONE  # then no step has tables of fixed size, but with the routed exchange
    taken.clear()
    assert worker.determine_available_memory() == 7 and not context.tables
