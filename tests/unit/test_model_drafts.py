# SPDX-License-Identifier: Apache-2.0
"""Draft models over ranks: all run the same forwards, each a sharded step of its own. Every wait has a time limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode import llm_base_proposer
from vllm.v1.spec_decode.eagle import EagleProposer

from tests.unit.attention_steps import CPU_KERNEL, Kernel, RankSimulation, Row, Scenario, Shape, make_scenario
from tests.unit.flash_latent_steps import kernel_of
from tests.unit.flash_steps import flash_kernel
from tests.unit.latent_steps import cpu_kernel, latent_shape
from tests.unit.processes import run_ranks
from vllm_nanocp.attention.context import context
from vllm_nanocp.exchange import CollectiveExchange
from vllm_nanocp.plan import IDLE, Batch, Holder, PlanRow, StepPlan
from vllm_nanocp.worker import model_drafts
from vllm_nanocp.worker.model_drafts import ModelDrafts
from vllm_nanocp.worker.rank_step import ShardTable, make_step

RANKS = 3
MOST = 3
STEPS = 24
BLOCK = 32
# What a proposer may have and an EAGLE head has not.
OFF = (
    *("needs_extra_input_slots", "use_heterogeneous_vocab", "uses_mrope", "supports_mm_inputs", "parallel_drafting"),
    *("constant_draft_positions", "use_local_argmax_reduction", "_enable_probabilistic_draft_probs"),
    "_share_mtp_indices",
)
FLASH = [Shape(4, 2, 64, block_size=16), Shape(8, 2, 128, block_size=16)]
ROUTED = [Shape(2, 1, 64, torch.bfloat16, 16)]
LATENT = [latent_shape(4, 32, 32), latent_shape(3, 16, 96)]
FLASH_LATENT = [replace(shape, dtype=torch.bfloat16) for shape in LATENT]
SHAPES = [Shape(4, 2, 32), Shape(4, 4, 64), Shape(6, 2, 80, isa="vec16")]


# -- attention of the forwards after the first -------------------------------------------------------------------


def epoch_of(metadata: Any) -> int | None:
    """The number by which the exchange of a forward's first layer is known; None: it is not routed."""
    routed = getattr(getattr(metadata, "sharded", None), "routed", None)  # on CPU rows have none
    if routed is None:
        return None
    route = routed[1] if isinstance(routed, tuple) else routed.route
    return int(route.counts[0])


class LaterForward(RankSimulation):
    """A forward of a draft model after its first: one query of each row, at the last token that was right."""

    def __init__(self, scenario: Scenario, rank: int, exchange: CollectiveExchange, kernel: Kernel) -> None:
        super().__init__(scenario, rank, exchange, kernel)
        self.plan, dice = scenario.plan(), Random(scenario.seed)
        for index, row in enumerate(scenario.rows):
            whole = row.shard < len(scenario.shards[row.request]) - 1  # a member's
            right = row.num_queries if whole else dice.randint(1, row.num_queries)
            scenario.rows[index] = Row(row.request, row.shard, row.first + right - 1, 1)
        self.rows = [scenario.rows[i] for i in scenario.batches[rank]]

    def _check_epoch(self, metadata: Any, forward: int) -> None:
        """It grows from forward to forward: a flag of an earlier one would say that what is there has come."""
        epoch = epoch_of(metadata)
        assert epoch is None or forward == 1 or epoch > self.epoch
        self.epoch = epoch or 0

    def run(self) -> None:
        scenario, shape = self.scenario, self.scenario.shape
        builder, layer = self.kernel.builder(shape), self.kernel.layer(shape)
        shards = ShardTable(self.rank, self.kernel.device)
        shards.update(self.plan)
        batch = [str(i) for i in scenario.batches[self.rank]]
        context.exchange, context.queries = self.exchange, 1 + MOST
        context.step = make_step(self.plan, shards, scenario.num_ranks, batch.index)
        context.draft_step = make_step(self.plan, shards, scenario.num_ranks, batch.index, queries=1)
        if context.draft_step is not None and self.kernel.routes is not None:
            capacity = self.kernel.capacity
            context.draft_routes = {capacity: self.kernel.routes(shape, scenario.num_ranks, self.rank)}
            visits = self.plan.most_visits(scenario.num_ranks, None)
            context.draft_step.serial = scenario.seed
            context.draft_step.capacity = capacity if visits is not None and visits <= capacity else 0
            self.counts["routed"] += bool(context.draft_step.capacity)
        try:
            common, impl = self._common(), self.kernel.impl(shape)
            for forward in range(1, MOST):  # of the same layer, with other keys
                if scenario.seed % 2:
                    metadata = builder.build_for_drafting(common, forward)  # as V1's runner asks
                else:
                    context.draft_index = forward
                    metadata = builder.build(0, common)  # as V2's does
                self._check_epoch(metadata, forward)
                self._layer(impl, layer, forward, common, metadata)
        finally:
            context.step = context.draft_step = context.exchange = None
            context.queries, context.draft_index, context.draft_routes = 1, 0, {}


def later_forwards(
    rank: int, size: int, seeds: range, shapes: list[Shape], kernel: Callable[[], Kernel]
) -> tuple[float, Counter[str]]:
    """The largest error; what was computed, with summed squares of errors where there is a stock kernel."""
    exchange, used, worst, counts = CollectiveExchange(dist.group.WORLD), kernel(), 0.0, Counter[str]()
    for seed in seeds:
        scenario = make_scenario(shapes[seed % len(shapes)], seed, size, True, queries=1 + MOST)
        simulation = LaterForward(scenario, rank, exchange, used)
        simulation.run()
        worst = max(worst, *simulation.errors, 0.0)
        counts += simulation.counts
        counts["visiting"] += simulation.counts["sharded decode"] + simulation.counts["sharded prefill"]
    return worst, counts


def on_cpu() -> Kernel:
    return CPU_KERNEL


def flash() -> Kernel:
    return replace(flash_kernel("cpu", 0, 0, False, None, 1), queries=1)


class Replayed:
    """Runs a layer with the first metadata that was made of the same tables, as a graph does. The engine's own batch
    buffers are persistent, the test's are not."""

    def __init__(self) -> None:
        self.captured: dict[int, Any] = {}

    def __call__(self, impl: Any, layer: Any, *args: Any) -> None:
        *inputs, metadata, output = args
        rows = getattr(metadata, "sharded", None)
        if rows is not None and rows.routed is not None:
            first = self.captured.setdefault(rows.send.data_ptr(), metadata)
            batch = {name: getattr(metadata, name) for name in ("block_table", "query_start_loc")}
            metadata = replace(first, **batch)
        impl.forward(layer, *inputs, metadata, output)


def replayed_kernel(shared: str) -> Kernel:
    return replace(flash_kernel("cpu", 4, 12, True, shared, 1), forward=Replayed())


@pytest.mark.parametrize("latent", [False, True])
def test_later_forwards_over_routes(tmp_path: Path, latent: bool) -> None:
    """The same over memory that two processes share. Forwards repeat a layer, and none takes another's answers. They
    are padded, and run with what was there at the first one, as from a graph."""
    kernel = partial(replayed_kernel, str(tmp_path))
    if latent:
        kernel = partial(kernel_of, "cpu", 4, 12, shared=str(tmp_path), routed=True, graph=True)
    results = run_ranks(2, later_forwards, range(4), FLASH_LATENT if latent else ROUTED, kernel, seconds=100)
    for worst, counts in results:
        assert worst < (8e-2 if latent else 4e-2) and counts["routed"] >= 2, (worst, counts)
    assert sum(counts["visiting"] for _, counts in results) > 3


@pytest.mark.parametrize(
    ("kernel", "shapes", "seeds", "most"),
    [
        pytest.param(on_cpu, SHAPES, range(12), 4e-5, id="cpu"),
        pytest.param(flash, FLASH, range(6), 4e-5, id="flash"),
        pytest.param(cpu_kernel, LATENT, range(6), 4e-5, id="latent, cpu"),
        pytest.param(kernel_of, FLASH_LATENT, range(6), 8e-2, id="latent, flash"),
    ],
)
def test_later_forwards_are_full_attention(
    kernel: Callable[[], Kernel], shapes: list[Shape], seeds: range, most: float
) -> None:
    """However many drafts were right, over all shards, on idle ranks too; on CPU, and by the tables of GPUs."""
    for worst, counts in run_ranks(RANKS, later_forwards, seeds, shapes, kernel, seconds=100):
        assert worst < most and counts["visiting"] > len(seeds) / 3, (worst, counts)


# -- which forwards there are --------------------------------------------------------------------------------------


class Forwards:
    """In a draft model's place: in each forward the ranks compare what they are about to exchange."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.log = rank, size, []

    @contextmanager
    def entered(self, metadata: Any, config: Any, **kwargs: Any) -> Iterator[None]:
        """In the place of vLLM's ``set_forward_context``."""
        self.now = metadata, kwargs
        yield

    def __call__(self, input_ids: torch.Tensor, positions: Any, inputs_embeds: Any, hidden_states: Any) -> Any:
        metadata, kwargs = self.now
        step = None if metadata is None else metadata["layer"]
        counts = None if step is None else (step.send_counts, step.recv_counts)
        mine = (len(input_ids), kwargs["num_tokens_across_dp"].tolist(), counts)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        sizes = [found[0] for found in everyone]
        assert all(found[1] == sizes for found in everyone), everyone
        assert len({found[2] is None for found in everyone}) == 1, everyone
        if counts is not None:
            for sender in range(self.size):
                for receiver in range(self.size):
                    assert everyone[sender][2][0][receiver] == everyone[receiver][2][1][sender], everyone
        self.log.append((sizes, counts and sum(counts[0])))
        return hidden_states, hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.eye(8)[hidden_states[:, 0].long() % 8]


def make_proposer(rank: int, size: int) -> Any:
    """vLLM's, without the engine's configuration."""
    proposer: Any = object.__new__(EagleProposer)
    values: dict[str, Any] = dict(
        method="eagle",
        model=Forwards(rank, size),
        dp_rank=rank,
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(uses_mrope=False), parallel_config=SimpleNamespace(data_parallel_size=size)
        ),
        num_speculative_tokens=MOST,
        max_model_len=1024,
        kv_cache_gid=0,
        block_size=BLOCK,
        input_ids=torch.zeros(512, dtype=torch.int32),
        positions=torch.zeros(512, dtype=torch.int64),
        hidden_states=torch.zeros(512, 4),
        _slot_mapping_buffer=torch.zeros(512, dtype=torch.int64),
        _draft_attn_layer_names={"layer"},
        arange=torch.arange(513, dtype=torch.int32),
        token_arange_np=np.arange(512, dtype=np.int32),
        backup_next_token_ids=SimpleNamespace(
            np=np.zeros(64, dtype=np.int32), gpu=torch.zeros(64, dtype=torch.int32), copy_to_gpu=lambda n: None
        ),
        cudagraph_dispatcher=SimpleNamespace(
            dispatch=lambda n, valid_modes=None: (CUDAGraphMode.NONE, SimpleNamespace(num_tokens=n))
        ),
        draft_attn_groups=[
            SimpleNamespace(
                layer_names=["layer"],
                build_metadata_for_drafting=lambda common_attn_metadata, draft_index: (
                    context.draft_step if draft_index else context.step
                ),
            )
        ],
        eplb_state=None,
        allowed_attn_types=None,
        pass_hidden_states_to_model=True,
    )
    for name, value in (dict.fromkeys(OFF, False) | values).items():
        setattr(proposer, name, value)
    return proposer


class BusyRank:
    """A rank's batch, as V1's runner has it when it has sampled."""

    def __init__(self, rank: int, size: int, plan: list[StepPlan]) -> None:
        self.proposer = make_proposer(rank, size)
        self.runner = SimpleNamespace(
            drafter=self.proposer, device=torch.device("cpu"), num_spec_tokens=MOST,
            optimistic_seq_lens_cpu=torch.zeros(64, dtype=torch.int32),
        )  # fmt: skip
        self.drafts = ModelDrafts(self.runner, lambda: plan[0] if plan else None)

    def propose(self, lengths: list[int], queries: list[int], blocks: list[int], sampled: list[list[int]]) -> Any:
        """Drafts for requests of so many tokens, of which the last ones are the step's queries, with so many blocks."""
        count, total = len(lengths), sum(queries)
        starts = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32)
        self.runner.optimistic_seq_lens_cpu[:count] = torch.tensor(lengths)
        table = SimpleNamespace(num_blocks_per_row=np.array(blocks, dtype=np.int32), block_size=BLOCK)
        self.runner.input_batch = SimpleNamespace(block_table=[table])
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=count,
            num_actual_tokens=total,
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            block_table_tensor=torch.arange(count * 40, dtype=torch.int32).view(count, 40) + 1,
            slot_mapping=torch.arange(total),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        )
        positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)])
        state = SimpleNamespace(get_token_id=lambda at: at)
        batch = SimpleNamespace(
            num_reqs=count, req_ids=[str(i) for i in range(count)], vocab_size=512,
            num_tokens_no_spec=np.array(lengths), req_id_to_index={str(i): i for i in range(count)},
        )  # fmt: skip
        tokens, _ = self.proposer.prepare_next_token_ids_padded(
            torch.tensor(sampled), {str(i): state for i in range(count)}, batch,
            torch.tensor([not any(t >= 0 for t in made) for made in sampled]),
        )  # fmt: skip
        self.tokens = tokens.tolist()
        return self.proposer.propose(
            MOST, torch.zeros(total, dtype=torch.int32), positions, torch.zeros(total, 4), tokens, None, common,
            SimpleNamespace(all_greedy=True),
        )  # fmt: skip


def random_plan(dice: Random, size: int) -> StepPlan:
    """Rows at random homes; some ranks have no tokens."""
    plan = StepPlan(serial=1)
    for rank in range(size):
        requests = dice.choice([0, 1, 3]) if rank else dice.choice([1, 2])
        tokens = sum(dice.choice([1, 1 + MOST, 20]) for _ in range(requests))
        plan.batches.append(Batch(requests, tokens, 0) if requests else IDLE)
    homes = [rank for rank, batch in enumerate(plan.batches) if batch is not IDLE]
    for row in range(dice.choice([0, 1, 3])):
        home = dice.choice(homes)
        others = dice.sample([rank for rank in range(size) if rank != home], dice.randint(1, size - 1))
        holders = tuple(Holder(rank, f"{row}.{rank}", BLOCK) for rank in others)
        plan.rows.append(PlanRow(str(row), home, 1 + dice.randint(0, MOST), 1, 3, holders))
        for rank in others:
            plan.opened.setdefault(rank, []).append((f"{row}.{rank}", [1]))
    return plan


def same_forwards(rank: int, size: int, seeds: range) -> list[Any]:
    """One rank's steps: it drafts, or has no tokens. What each forward saw."""
    CpuPlatform.import_kernels()
    CpuPlatform.register_triton_kernel_overrides()
    plan: list[StepPlan] = [StepPlan()]
    busy = BusyRank(rank, size, plan)
    forwards = busy.proposer.model
    llm_base_proposer.set_forward_context = model_drafts.set_forward_context = forwards.entered  # type: ignore[assignment]
    shards = ShardTable(rank, torch.device("cpu"))
    for seed in seeds:
        plan[0] = random_plan(Random(seed), size)
        shards.update(plan[0])
        context.step = make_step(plan[0], shards, size, int)
        context.draft_step = make_step(plan[0], shards, size, int, queries=1)
        mine = plan[0].batches[rank]
        if mine is IDLE:
            busy.drafts.run_idle()
        else:
            queries = [1] * (mine.num_reqs - 1)
            queries.append(mine.num_tokens - len(queries))
            # The last one is at the end of what any request may be.
            lengths = [100] * (mine.num_reqs - 1) + [1024]
            assert busy.runner._input_fits_in_drafter(object())
            found = busy.propose(lengths, queries, [40] * mine.num_reqs, [[5] + [-1] * MOST] * mine.num_reqs)
            assert found.shape == (mine.num_reqs, MOST)
    return forwards.log


def test_ranks_run_the_same_forwards() -> None:
    """Busy or idle, with rows that visit or none, at the end of a request: as many forwards, of the sizes that the
    others count on, and what one sends the other expects."""
    logs = run_ranks(RANKS, same_forwards, range(STEPS), seconds=60)
    assert [len(log) for log in logs] == [STEPS * MOST] * RANKS
    assert [sizes for sizes, _ in logs[0]] == [sizes for sizes, _ in logs[1]]
    sent = [count for log in logs for _, count in log]
    assert sum(bool(count) for count in sent) > STEPS and sum(count is None for count in sent) > STEPS


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BusyRank, list[StepPlan], list[Any]]]:
    """One rank, whose forwards say at which slots they keep what, and how much each request sees."""
    CpuPlatform.import_kernels()
    CpuPlatform.register_triton_kernel_overrides()
    monkeypatch.setattr(llm_base_proposer, "coordinate_batch_across_dp", llm_base_proposer.coordinate_batch_across_dp)
    plans: list[StepPlan] = []
    busy, seen = BusyRank(0, 1, plans), []

    @contextmanager
    def entered(metadata: Any, config: Any, **kwargs: Any) -> Iterator[None]:
        seen.append((kwargs["slot_mapping"]["layer"].tolist(), metadata["layer"]))
        yield

    def build(common_attn_metadata: Any, draft_index: int) -> Any:
        return common_attn_metadata.seq_lens.tolist()

    busy.proposer.draft_attn_groups[0].build_metadata_for_drafting = build
    busy.proposer.model = lambda **kwargs: (kwargs["hidden_states"],) * 2
    busy.proposer._greedy_sample = lambda hidden: torch.zeros(len(hidden), dtype=torch.int64)
    busy.proposer._determine_batch_execution_and_padding = lambda n: (CUDAGraphMode.NONE, n, None)
    monkeypatch.setattr(llm_base_proposer, "set_forward_context", entered)
    yield busy, plans, seen


def test_what_has_no_block_is_not_kept(alone: tuple[BusyRank, list[StepPlan], list[Any]]) -> None:
    """A member ends with its run's last block, and nobody has blocks for drafts: what vLLM's table holds behind is
    another request's. Another one beside it has room."""
    busy, _, seen = alone
    busy.propose([64, 70], [2, 2], [2, 3], [[5, -1, -1, -1]] * 2)
    first, second, third = seen
    assert first == ([0, 1, 2, 3], [64, 70])
    at = (40 + 1 + 2) * BLOCK  # of the second request's third block
    assert second == ([-1, at + 6], [64, 71])
    assert third == ([-1, at + 7], [64, 72])


def test_what_is_behind_the_longest_request_is_kept_nowhere(
    alone: tuple[BusyRank, list[StepPlan], list[Any]],
) -> None:
    """However many drafts are left there: vLLM's kernel goes on at the first token, whose block others may share."""
    busy, _, seen = alone
    busy.propose([busy.proposer.max_model_len - 1, 70], [1, 1], [40, 40], [[5, -1, -1, -1]] * 2)
    assert [slots[0] == -1 for slots, _ in seen[1:]] == [False, True]
    seen.clear()
    busy.propose([busy.proposer.max_model_len, 70], [1, 1], [40, 40], [[5, -1, -1, -1]] * 2)
    at = (40 + 1 + 2) * BLOCK
    assert [slots for slots, _ in seen[1:]] == [[-1, at + 6], [-1, at + 7]]
    assert busy.proposer.positions[0] < busy.proposer.max_model_len


def test_what_follows_is_the_known_token(alone: tuple[BusyRank, list[StepPlan], list[Any]]) -> None:
    """Of a prompt's chunk it is no sample, nor the prompt's last token; of a member it is what the plan says."""
    busy, plans, _ = alone
    plans.append(StepPlan(next_tokens={"1": 77, "elsewhere": 78}, batches=[Batch(3, 6, 0)]))
    busy.propose([64, 64, 70], [2, 2, 2], [4, 4, 4], [[-1] * 4, [5, -1, -1, -1], [6, 8, -1, -1]])
    assert busy.tokens == [64, 77, 8]


def test_dummy_batches_do_not_draft(alone: tuple[BusyRank, list[StepPlan], list[Any]]) -> None:
    """Within ``execute_model`` nobody else drafts yet."""
    busy, _, _ = alone
    ran: list[str] = []
    busy.drafts._dummy_run = lambda *args: ran.append("draft")
    busy.drafts.put_off(lambda: (busy.proposer.dummy_run(1), ran.append("target")))
    assert ran == ["target"]
    busy.drafts.run_idle()
    assert ran == ["target", "draft"]
