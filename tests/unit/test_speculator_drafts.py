# SPDX-License-Identifier: Apache-2.0
"""Draft models beside V2's runner over ranks: vLLM's own ``propose``, with what it runs on GPUs written once more for
CPU. Every wait has a time limit."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as module

from tests.unit.processes import run_ranks
from tests.unit.test_model_drafts import BLOCK, MOST, random_plan
from vllm_nanocp.attention.context import context
from vllm_nanocp.plan import IDLE, Batch, StepPlan, idle_batch
from vllm_nanocp.worker.dp_agreement import agree, capacity_of
from vllm_nanocp.worker.rank_step import ShardTable, make_step
from vllm_nanocp.worker.sharded_graphs import ShardedDescriptor
from vllm_nanocp.worker.speculator_drafts import SpeculatorDrafts

RANKS = 3
STEPS = 18
PADDED = 4  # what graphs pad the number of requests to, as multiples
MOST_REQS = 16
PIECES = 40  # tokens that there are graphs of what is around attention for


# -- what vLLM has Triton kernels for ------------------------------------------------------------------------------


def prepare_prefill_inputs(
    last: torch.Tensor, step: torch.Tensor, buffers: Any, batch: Any, sampled: torch.Tensor, rejected: torch.Tensor,
    last_sampled: torch.Tensor, next_prefill: torch.Tensor, most: int,
) -> None:  # fmt: skip
    step.zero_()
    for i in range(batch.num_reqs):
        begin, end = batch.query_start_loc[i : i + 2].tolist()
        end -= int(rejected[i])
        at = int(batch.idx_mapping[i])
        buffers.input_ids[begin : end - 1] = batch.input_ids[begin + 1 : end]
        buffers.input_ids[end - 1] = last_sampled[at, 0] if sampled[i] else next_prefill[0, at]
        buffers.positions[begin:end] = batch.positions[begin:end]
        last[i] = end - 1


def prepare_decode_inputs(
    drafts: torch.Tensor, seq_lens: torch.Tensor, rejected: torch.Tensor, buffers: Any, sources: torch.Tensor,
    most_tokens: int, most_reqs: int, advance_draft_positions: bool,
) -> None:  # fmt: skip
    n = len(drafts)
    buffers.query_start_loc[:] = torch.arange(most_reqs + 1).clamp(max=n)
    buffers.input_ids[:n] = drafts
    buffers.positions[:n] = (buffers.positions[:n] + 1).clamp(max=most_tokens - 1)
    buffers.seq_lens.zero_()
    buffers.seq_lens[:n] = (seq_lens[:n] - rejected[:n] + 1).clamp(max=most_tokens)


def update_draft_inputs(
    drafts: torch.Tensor, step: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, into: torch.Tensor, buffers: Any,
    sources: torch.Tensor, count: int, most_tokens: int, steps: int, advance_draft_positions: bool,
) -> None:  # fmt: skip
    out[:count, int(step)] = drafts
    if step < steps - 1:
        buffers.input_ids[:count] = drafts
        into[:count] = hidden[:count]
        buffers.positions[:count] = (buffers.positions[:count] + 1).clamp(max=most_tokens - 1)
        buffers.seq_lens[:count] = (buffers.seq_lens[:count] + 1).clamp(max=most_tokens)


class Tables:
    """In the place of vLLM's ``BlockTables``: row i's block j is ``100 * i + j``; behind those it has, another's."""

    def __init__(self, blocks: list[int]) -> None:
        self.block_sizes_tensor = torch.tensor([BLOCK], dtype=torch.int32)
        self.num_blocks = SimpleNamespace(gpu=torch.tensor([blocks], dtype=torch.int32))
        self.input_block_tables: list[torch.Tensor] = []
        self.cp_size = 1
        self.slot_mappings = torch.zeros(1, 512, dtype=torch.int64)

    def compute_slot_mappings(
        self, idx_mapping: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor, padded: int
    ) -> torch.Tensor:
        self.slot_mappings.fill_(-1)
        for i, at in enumerate(idx_mapping.tolist()):
            if at >= 0:
                part = slice(*starts[i : i + 2].tolist())
                block = 100 * at + positions[part] // BLOCK
                self.slot_mappings[0, part] = block * BLOCK + positions[part] % BLOCK
        return self.slot_mappings[:, :padded]


# -- a rank's runner -----------------------------------------------------------------------------------------------


class Graphs:
    """In the place of a manager of graphs: one for each number of requests that is a multiple, with shards for each of
    some capacities."""

    capacities = (2, 64)

    def __init__(self, queries: int, replay: Any = None, captured: bool = True) -> None:
        self.sharded: list[Any] = []
        self.decode_query_len, self.run_fullgraph, self.captured = queries, replay, captured

    def dispatch(self, num_reqs: int, num_tokens: int, uniform: int | None, *args: Any, **kwargs: Any) -> Any:
        most = -(-num_tokens // (PADDED * self.decode_query_len)) * PADDED
        if self.captured and uniform is None and self.decode_query_len > 1 and num_tokens <= PIECES:
            return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, -(-num_tokens // PADDED) * PADDED, None)
        if not self.captured or uniform != self.decode_query_len or most > MOST_REQS:
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, most * uniform, most, uniform)

    def sharded_graph(self, num_tokens: int, visits: int) -> Any:
        desc = self.dispatch(0, num_tokens, self.decode_query_len)
        if desc.cg_mode == CUDAGraphMode.NONE:
            return None
        return ShardedDescriptor(**vars(desc), capacity=min(c for c in self.capacities if c >= visits))

    def run_pw_graph(self, model: Any, inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    def specialize_spec_tokens(self, desc: Any, most: int) -> Any:
        return desc


class Rank:
    """A rank with vLLM's speculator; its forwards are ``forward``'s.

    Args:
        rank, size: this one of how many.
        forward: (metadata, number of tokens, of all ranks, whether from a graph).
        captured: whether decodes have graphs.
        blocks: of each request that there may be.
    """

    def __init__(self, rank: int, size: int, forward: Any, captured: bool, blocks: list[int]) -> None:
        self.forward, self.plan, self.speculator = forward, StepPlan(), object.__new__(EagleSpeculator)
        buffers = SimpleNamespace(
            input_ids=torch.zeros(512, dtype=torch.int32), positions=torch.zeros(512, dtype=torch.int64),
            seq_lens=torch.zeros(MOST_REQS, dtype=torch.int32),
            query_start_loc=torch.zeros(MOST_REQS + 1, dtype=torch.int32),
        )  # fmt: skip
        values: dict[str, Any] = dict(
            dp_rank=rank, dp_size=size, device=torch.device("cpu"), method="eagle", pcp_manager=None, eplb_state=None,
            max_num_reqs=MOST_REQS, max_model_len=1024, num_speculative_steps=MOST, input_buffers=buffers,
            hidden_states=torch.zeros(512, 4), draft_tokens=torch.zeros(MOST_REQS, MOST, dtype=torch.int64),
            current_draft_step=torch.tensor(0), last_token_indices=torch.zeros(MOST_REQS, dtype=torch.int64),
            sample_src_positions=torch.zeros(MOST_REQS, dtype=torch.int64), temperature=torch.zeros(64),
            idx_mapping=torch.zeros(MOST_REQS, dtype=torch.int64), seeds=torch.zeros(64), draft_logits=None,
            arange_np=np.arange(MOST_REQS + 1, dtype=np.int32), supports_mm_inputs=False,
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024)),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])]),
            supports_decode_metadata_update=True, attn_groups=[], sample_draft=lambda hidden, *_: hidden[:, 0].long(),
            model=lambda **inputs: inputs["hidden_states"] + 1,
            prefill_cudagraph_manager=Graphs(1 + MOST, self.replayed, captured),
            decode_cudagraph_manager=Graphs(1, self.replayed, captured),
            set_attn=lambda state, config, tables, *_: setattr(self.speculator, "block_tables", tables),
            _build_attn_metadata=self.build,
        )  # fmt: skip
        self.speculator.__dict__.update(values)
        states = SimpleNamespace(
            req_id_to_index={str(i): i for i in range(len(blocks))}, last_sampled_tokens=torch.full((64, 1), 7),
            next_prefill_tokens=torch.full((1, 64), 8, dtype=torch.int32),
        )  # fmt: skip
        self.runner = SimpleNamespace(speculator=self.speculator, req_states=states)
        self.drafts = SpeculatorDrafts(self.runner, lambda: self.plan)
        self.speculator.set_attn(None, None, Tables(blocks))
        self.target = Graphs(1 + MOST, captured=captured)
        self.rank, self.builds, self.pieces = rank, 0, 0

    def build(self, step: int, **kwargs: Any) -> Any:
        """Metadata of a later forward: what a builder sees."""
        assert context.draft_index == step > 0
        self.builds += 1
        return {"layer": (context.draft_step, self.speculator.input_buffers.seq_lens.tolist())}

    @contextmanager
    def entered(self, metadata: Any, config: Any, **kwargs: Any) -> Iterator[None]:
        """In the place of vLLM's ``set_forward_context``."""
        pieces = kwargs["cudagraph_runtime_mode"] == CUDAGraphMode.PIECEWISE
        assert metadata is not None or not pieces
        self.pieces += pieces and context.step is not None
        self.forward(metadata, kwargs["num_tokens"], kwargs["num_tokens_across_dp"], kwargs["slot_mapping"])
        yield

    def replayed(self, desc: Any) -> None:
        """The graph's tables were filled for a step of its capacity."""
        first = desc.uniform_token_count == 1 + MOST
        step = context.step if first else context.draft_step
        assert capacity_of(desc) == (0 if step is None else step.capacity) and (first or step is None or self.builds)
        sizes = torch.full((self.speculator.dp_size,), desc.num_tokens)
        self.forward({"layer": (step, None)}, desc.num_tokens, sizes, None, graph=True)

    def propose(self, lengths: list[int], queries: list[int], rejected: list[int], dummy: bool = False) -> Any:
        """Drafts for requests of so many tokens, of which the last ones are the step's queries."""
        count, starts = len(lengths), torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32)
        visits = None if context.step is None else self.plan.most_visits(self.speculator.dp_size, 1 + MOST)
        desc, state = agree(self.target, self.plan.batches, self.rank, context.step is not None, visits)  # type: ignore[arg-type]
        if context.step is not None and capacity_of(desc):
            context.step.capacity, context.step.captured = capacity_of(desc), True
        if dummy:  # as vLLM pads it
            count = desc.num_reqs or 1
            lengths, queries, rejected = [1 + MOST] * count, [1 + MOST] * count, [0] * count
            starts = torch.arange(count + 1, dtype=torch.int32) * (1 + MOST)
        total = sum(queries)
        batch = SimpleNamespace(
            num_reqs=count, num_tokens=total, num_tokens_after_padding=max(total, desc.num_tokens),
            num_scheduled_tokens=np.array(queries), seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32), idx_mapping=torch.arange(count), query_start_loc=starts,
            decode_graph_eligible=all(n == 1 + MOST for n in queries), req_ids=[str(i) for i in range(count)],
            input_ids=torch.arange(total, dtype=torch.int32),
            positions=torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)]),
        )  # fmt: skip
        if not dummy:
            self.drafts.note_batch(batch)
        padded, states = batch.num_tokens_after_padding, self.runner.req_states
        return self.speculator.propose(
            batch, {"layer": (context.step, lengths)}, {"layer": torch.arange(padded)}, torch.zeros(padded, 4), None,
            torch.ones(count, dtype=torch.int32), torch.tensor(rejected, dtype=torch.int32),
            states.last_sampled_tokens, states.next_prefill_tokens, torch.zeros(64), torch.zeros(64),
            num_speculative_tokens=None if dummy else MOST, dp_sync_state=state, dummy_run=dummy,
        )  # fmt: skip


def use_references() -> None:
    for kernel in (prepare_prefill_inputs, prepare_decode_inputs, update_draft_inputs):
        setattr(module, kernel.__name__, kernel)


class Compared:
    """A forward: the ranks compare what they are about to exchange."""

    def __init__(self, rank: int, size: int) -> None:
        self.size, self.log = size, []

    def __call__(self, metadata: Any, num_tokens: int, across: torch.Tensor, slots: Any, graph: bool = False) -> None:
        step = None if metadata is None else metadata["layer"][0]
        counts = None if step is None else (step.send_counts, step.recv_counts)
        assert counts is not None or context.step is None
        everyone: list[Any] = [None] * self.size
        mine = (num_tokens, across.tolist(), graph and step and step.capacity, counts)
        dist.all_gather_object(everyone, mine)
        sizes = [found[0] for found in everyone]
        assert all(found[1] == sizes for found in everyone), everyone
        assert len({found[2] for found in everyone}) == len({found[3] is None for found in everyone}) == 1, everyone
        if counts is not None:
            for sender in range(self.size):
                for receiver in range(self.size):
                    assert everyone[sender][3][0][receiver] == everyone[receiver][3][1][sender], everyone
        self.log.append((sizes, graph, counts and sum(counts[0])))


def some_plan(dice: Random, size: int) -> StepPlan:
    """In half of the steps each rank decodes with all its drafts, or has no tokens."""
    plan = random_plan(dice, size)
    if dice.random() < 0.5:
        plan.batches = [
            Batch(b.num_reqs, b.num_reqs * (1 + MOST), 1 + MOST) if b is not IDLE else b for b in plan.batches
        ]
        plan.rows = [replace(row, num_queries=1 + MOST) for row in plan.rows]
    plan.batches = [idle_batch(1 + MOST) if b is IDLE else b for b in plan.batches]
    return plan


def same_forwards(rank: int, size: int, seeds: range, captured: bool, routed: bool) -> list[Any]:
    """One rank's steps: it drafts, or has no tokens. What each forward saw. With ``routed`` later forwards have
    tables of fixed size."""
    use_references()
    forward = Compared(rank, size)
    me = Rank(rank, size, forward, captured, [40] * 64)
    module.set_forward_context = me.entered  # type: ignore[assignment]
    shards = ShardTable(rank, torch.device("cpu"))
    idle, replayed = idle_batch(1 + MOST), 0
    for seed in seeds:
        me.plan = plan = some_plan(Random(seed), size)
        shards.update(plan)
        context.step = make_step(plan, shards, size, int)
        context.draft_step = make_step(plan, shards, size, int, queries=1)
        visits = plan.most_visits(size, None)
        if routed and context.draft_step is not None and visits is not None:
            context.draft_step.capacity = min(c for c in Graphs.capacities if c >= visits)
        mine, before, me.builds = plan.batches[rank], len(forward.log), 0
        if mine == idle:
            me.drafts.put_off(lambda: me.propose([], [], [], dummy=True))
            assert len(forward.log) == before  # not before the others draft
            me.drafts.run_idle()
        else:
            queries = [mine.queries] * mine.num_reqs if mine.queries else [1] * (mine.num_reqs - 1)
            queries += [mine.num_tokens - sum(queries)] * (not mine.queries)
            # The last one is at the end of what any request may be.
            lengths = [100] * (mine.num_reqs - 1) + [1024]
            found = me.propose(lengths, queries, [min(1, n - 1) for n in queries])
            assert found.shape == (mine.num_reqs, MOST)
        assert me.speculator.supports_decode_metadata_update and not context.draft_index
        replayed += sum(graph for _, graph, count in forward.log[before:] if count is not None)
        assert context.step is None or me.builds == MOST - 1
    assert me.drafts.num_captured == replayed
    assert (me.pieces > 2) == captured  # of sharded steps with a prompt's chunk
    return forward.log


@pytest.mark.parametrize(("captured", "routed"), [(False, False), (True, False), (True, True)])
def test_ranks_run_the_same_forwards(captured: bool, routed: bool) -> None:
    """Busy or idle, with rows that visit or none, at the end of a request: as many forwards, of the sizes that the
    others count on; from graphs where all are, with rows that visit only from those that know shards, of the step's
    capacity; what one sends the other expects."""
    logs = run_ranks(RANKS, same_forwards, range(STEPS), captured, routed, seconds=60)
    for log in logs:
        assert [entry[:2] for entry in log] == [entry[:2] for entry in logs[0]]
    # vLLM's graph of later forwards has all of them.
    assert len(logs[0]) == STEPS * MOST if not captured else STEPS < len(logs[0]) < STEPS * MOST
    assert any(graph for _, graph, _ in logs[0]) == captured
    first = [graph for _, graph, count in logs[0] if count is not None]  # sharded
    assert (sum(first) > 3) == captured and (sum(first) > len(first) / 3) == routed, (sum(first), len(first))
    sent = [count for log in logs for _, _, count in log]
    assert sum(bool(count) for count in sent) > STEPS and sum(count is None for count in sent) > STEPS


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """Makes one rank whose requests have so many blocks; and what its forwards see."""
    for kernel in (prepare_prefill_inputs, prepare_decode_inputs, update_draft_inputs):
        monkeypatch.setattr(module, kernel.__name__, kernel)
    monkeypatch.setattr(module, "dispatch_cg_and_sync_dp", module.dispatch_cg_and_sync_dp)
    seen: list[Any] = []

    def make(blocks: list[int]) -> Rank:
        def forward(metadata: Any, num_tokens: int, across: Any, slots: Any, graph: bool = False) -> None:
            layer = slots["layer"]
            layer = layer[0] if layer.dim() > 1 else layer
            seen.append((layer.tolist(), metadata["layer"][1], me.speculator.input_buffers.input_ids.tolist()))

        me = Rank(0, 1, forward, False, blocks)
        monkeypatch.setattr(module, "set_forward_context", me.entered)
        context.step = context.draft_step = SimpleNamespace(capacity=0, captured=False)  # type: ignore[assignment]
        return me

    yield make, seen
    context.step = context.draft_step = None


def test_what_has_no_block_is_not_kept(alone: tuple[Any, list[Any]]) -> None:
    """A member ends with its run's last block, and nobody has blocks for drafts: what vLLM's table holds behind is
    another request's. Another one beside it has room."""
    make, seen = alone
    me = make([2, 3])
    me.plan.batches = [Batch(2, 4, 0)]
    me.propose([64, 70], [2, 2], [0, 0])
    first, second, third = seen
    assert first[:2] == ([0, 1, 2, 3], [64, 70])
    at = 102 * BLOCK  # of the second request's third block
    assert (second[0], second[1][:2]) == ([-1, at + 6], [64, 71])
    assert (third[0], third[1][:2]) == ([-1, at + 7], [64, 72])


def test_the_token_behind_a_run_is_known(alone: tuple[Any, list[Any]]) -> None:
    """A member's sample belongs to nobody. A member of another rank has no row here."""
    make, seen = alone
    me = make([2, 3])
    me.plan.batches = [Batch(2, 4, 0)]
    me.plan.next_tokens = {"1": 99, "elsewhere": 98}
    me.propose([64, 70], [2, 2], [0, 0])
    assert seen[0][2][:4] == [1, 7, 3, 99]


def test_a_graph_of_a_sharded_step_is_of_one_forward(alone: tuple[Any, list[Any]]) -> None:
    """vLLM's of later forwards is of all, whose lengths it goes on with itself; rows that visit are not in these."""
    make, seen = alone
    me = make([2])
    me.speculator.idx_mapping[:] = 0
    run = functools.partial(me.speculator._generate_fused_drafts, 1, 1, None, None, None, CUDAGraphMode.NONE, MOST)
    me.speculator._run_model = lambda *args: seen.append(args) or (torch.zeros(1, 4), torch.zeros(1, 4))
    run()
    assert len(seen) == 1
    context.step = context.draft_step = None
    run()
    assert len(seen) == 1 + MOST - 1
