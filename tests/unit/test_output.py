# SPDX-License-Identifier: Apache-2.0
"""The ranks' scheduler outputs and statistics, taken together."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.metrics.stats import KVCacheEvictionEvent, PrefixCacheStats, SchedulerStats

from vllm_nanocp.plan import IDLE, Batch, Holder, PlanRow, StepPlan, idle_batch
from vllm_nanocp.sched.rank.interface import Part
from vllm_nanocp.sched.rank.stats import merge_prefix_cache, merge_scheduler_stats
from vllm_nanocp.sched.step_output import batches_of, merge
from vllm_nanocp.step_messages import StepMessage


def new_request(name: str, tokens: int = 4) -> NewRequestData:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(range(tokens)),
        mm_features=[],
        sampling_params=SamplingParams(max_tokens=3),
        pooling_params=None,
        block_ids=([1, 2],),
        num_computed_tokens=0,
        lora_request=None,
    )


def rank_output(rank: int, new: int = 1, cached: int = 2, tokens: int = 4) -> SchedulerOutput:
    """A rank's output in which every name and number says which rank it is of."""
    news = [new_request(f"new{rank}.{i}", tokens) for i in range(new)]
    running = [f"old{rank}.{i}" for i in range(cached)]
    scheduled = {**{n.req_id: tokens for n in news}, **dict.fromkeys(running, 1)}
    return SchedulerOutput(
        scheduled_new_reqs=news,
        scheduled_cached_reqs=CachedRequestData(
            req_ids=running,
            resumed_req_ids={running[0]} if running else set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None if i else ([10 * rank],) for i in range(cached)],
            num_computed_tokens=[100 * rank + i for i in range(cached)],
            num_output_tokens=[7 * rank + i for i in range(cached)],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={f"new{rank}.0": [rank]} if new else {},
        finished_req_ids={f"done{rank}"},
        free_encoder_mm_hashes=[],
    )


def parts(outputs: Sequence[SchedulerOutput]) -> list[Part]:
    return [Part.of(output) for output in outputs]


PLAN = StepPlan(
    rows=[PlanRow("old1.0", 1, 1, 3, 17, (Holder(0, "old1.0#0.0", 48),))],
    batches=[Batch(3, 6, 0), Batch(3, 3, 1)],
    opened={0: [("old1.0#0.0", [5, 4, 3])]},
    closed=["gone#1.0"],
)


def test_the_union_is_what_one_engine_would_say() -> None:
    ranks = [rank_output(0), rank_output(1, new=0, cached=3), rank_output(2, new=2, cached=0, tokens=9)]
    out = merge(parts(ranks), PLAN)
    assert isinstance(out, SchedulerOutput)
    assert out.total_num_scheduled_tokens == (4 + 2) + 3 + 18 == sum(out.num_scheduled_tokens.values())
    assert out.num_scheduled_tokens == {k: v for r in ranks for k, v in r.num_scheduled_tokens.items()}
    assert len(out.num_scheduled_tokens) == 3 + 3 + 2
    assert [n.req_id for n in out.scheduled_new_reqs] == ["new0.0", "new2.0", "new2.1"]
    cached = out.scheduled_cached_reqs
    assert cached.req_ids == ["old0.0", "old0.1", "old1.0", "old1.1", "old1.2"]
    assert cached.resumed_req_ids == {"old0.0", "old1.0"}
    assert cached.new_block_ids == [([0],), None, ([10],), None, None]
    assert cached.num_computed_tokens == [0, 1, 100, 101, 102]
    assert cached.num_output_tokens == [0, 1, 7, 8, 9]
    assert out.finished_req_ids == {"done0", "done1", "done2"}
    assert out.scheduled_encoder_inputs == {"new0.0": [0], "new2.0": [2]}
    assert [part.payload for part in out.parts] == ranks and out.plan is PLAN


def test_the_ranks_outputs_stay_as_they_are() -> None:
    """The workers are given them after the union was made."""
    ranks = [rank_output(0), rank_output(1)]
    before = copy.deepcopy(ranks)
    merge(parts(ranks), PLAN)
    merge(parts(ranks), PLAN)
    for rank, was in zip(ranks, before, strict=True):
        for f in fields(SchedulerOutput):
            assert getattr(rank, f.name) == getattr(was, f.name), f.name


def test_two_unions_share_nothing() -> None:
    """``CachedRequestData.make_empty`` and the like must be fresh each step."""
    first, second = merge(parts([rank_output(0)]), StepPlan()), merge(parts([rank_output(0)]), StepPlan())
    assert first.scheduled_cached_reqs.req_ids is not second.scheduled_cached_reqs.req_ids
    assert first.scheduled_cached_reqs.resumed_req_ids == {"old0.0"}
    assert first.num_scheduled_tokens is not second.num_scheduled_tokens


@pytest.mark.parametrize("flag", ["has_structured_output_requests", "pending_structured_output_tokens"])
@pytest.mark.parametrize("where", [None, 0, 1])
def test_structured_output_anywhere_counts(flag: str, where: int | None) -> None:
    ranks = [rank_output(0), rank_output(1)]
    if where is not None:
        setattr(ranks[where], flag, True)
    assert getattr(merge(parts(ranks), PLAN), flag) is (where is not None)


def test_a_step_without_tokens() -> None:
    out = merge(parts([rank_output(0, 0, 0), rank_output(1, 0, 0)]), StepPlan())
    assert out.total_num_scheduled_tokens == 0 and not out.num_scheduled_tokens
    assert out.finished_req_ids == {"done0", "done1"}


def test_pickle_round_trip() -> None:
    """What the workers get: the plan, and the parts, of which each decodes its own."""
    ranks = [rank_output(0), rank_output(1, new=0)]
    back = pickle.loads(pickle.dumps(merge(parts(ranks), PLAN)))
    assert type(back) is StepMessage
    assert back.plan == PLAN
    assert [back.part(0), back.part(1)] == ranks


def test_the_message_carries_each_request_once() -> None:
    """The union, if it were sent too, would say everything of running requests twice, in each step."""
    ranks = [rank_output(0, cached=1000), rank_output(1, cached=1000)]
    alone = sum(len(pickle.dumps(rank)) for rank in ranks)
    assert len(pickle.dumps(merge(parts(ranks), PLAN))) < 1.1 * alone


# -- batches, as the other ranks know of them ------------------------------------------------------------------


def scheduled(
    new: list[tuple[int, int]] | None = None,
    cached: list[tuple[int, int]] | None = None,
    resumed: int = 0,
    drafts: Sequence[int] = (),
    new_drafts: int = 0,
) -> SchedulerOutput:
    """A rank's output from (computed before, scheduled now) of each request; the first cached ones are resumed, and
    have so many drafts, as has each new one."""
    out = SchedulerOutput.make_empty()
    for i, (computed, tokens) in enumerate(new or []):
        request = new_request(f"new{i}")
        request.num_computed_tokens = computed
        out.scheduled_new_reqs.append(request)
        out.num_scheduled_tokens[request.req_id] = tokens
    running = out.scheduled_cached_reqs = CachedRequestData.make_empty()
    for i, (computed, tokens) in enumerate(cached or []):
        running.req_ids.append(f"old{i}")
        running.num_computed_tokens.append(computed)
        out.num_scheduled_tokens[f"old{i}"] = tokens
    running.resumed_req_ids = set(running.req_ids[:resumed])
    spec = out.scheduled_spec_decode_tokens
    spec |= {f"old{i}": [-1] * count for i, count in enumerate(drafts)}
    spec |= {new.req_id: [-1] * new_drafts for new in out.scheduled_new_reqs if new_drafts}
    out.total_num_scheduled_tokens = sum(out.num_scheduled_tokens.values())
    return out


def test_no_tokens_anywhere_are_no_batches() -> None:
    assert batches_of(parts([scheduled(), scheduled()]), IDLE) == []
    assert batches_of([], IDLE) == []


def test_a_rank_without_tokens_runs_an_idle_batch() -> None:
    busy = scheduled(cached=[(40, 1), (7, 1)])
    assert batches_of(parts([scheduled(), busy, scheduled()]), idle_batch(4)) == [
        Batch(1, 4, 4),
        Batch(2, 2, 1),
        Batch(1, 4, 4),
    ]


@pytest.mark.parametrize(
    ("part", "batch"),
    [
        (scheduled(cached=[(1, 1)]), Batch(1, 1, 1)),
        (scheduled(cached=[(31, 1), (32, 1), (9000, 1)]), Batch(3, 3, 1)),
        # A chunk of a prompt beside tokens that decode, and a last chunk of two tokens.
        (scheduled(cached=[(31, 1), (512, 512)]), Batch(2, 513, 0)),
        (scheduled(cached=[(31, 2)]), Batch(1, 2, 0)),
        # New ones: a prompt, a prompt of one token, one of which all but the last token was cached.
        (scheduled(new=[(0, 12)]), Batch(1, 12, 0)),
        (scheduled(new=[(0, 1)]), Batch(1, 1, 0)),
        (scheduled(new=[(64, 1)]), Batch(1, 1, 1)),
        (scheduled(new=[(64, 1), (0, 1)], cached=[(5, 1)]), Batch(3, 3, 0)),
        (scheduled(new=[(64, 1)], cached=[(5, 1)]), Batch(2, 2, 1)),
        # Resumed after a preemption: from the start, from a cached prefix, and with a last token to go.
        (scheduled(cached=[(0, 40), (5, 1)], resumed=1), Batch(2, 41, 0)),
        (scheduled(cached=[(0, 1)], resumed=1), Batch(1, 1, 0)),
        (scheduled(cached=[(32, 8)], resumed=1), Batch(1, 8, 0)),
        (scheduled(cached=[(32, 1), (5, 1)], resumed=1), Batch(2, 2, 1)),
        # With drafts: as many each, fewer of one, beside others that have none, a new one, several known tokens, a
        # prompt of one token.
        (scheduled(cached=[(31, 4), (5, 4)], drafts=[3, 3]), Batch(2, 8, 4)),
        (scheduled(cached=[(31, 4), (5, 3)], drafts=[3, 2]), Batch(2, 7, 0)),
        (scheduled(cached=[(31, 4), (5, 1)], drafts=[3]), Batch(2, 5, 0)),
        (scheduled(new=[(64, 2)], cached=[(5, 2)], drafts=[1], new_drafts=1), Batch(2, 4, 2)),
        (scheduled(cached=[(31, 4), (5, 4)], drafts=[3, 2]), Batch(2, 8, 0)),
        (scheduled(cached=[(31, 4), (0, 4)], drafts=[3, 3], resumed=2), Batch(2, 8, 0)),
    ],
)
def test_what_is_a_decode_batch(part: SchedulerOutput, batch: Batch) -> None:
    """One token each beside its drafts, and others before it: what vLLM's runners find of their own batch."""
    assert batches_of(parts([part, scheduled()]), IDLE) == [batch, IDLE]


# -- statistics ------------------------------------------------------------------------------------------------


def stats(rank: int, **values: Any) -> SchedulerStats:
    made = SchedulerStats(
        num_running_reqs=1 + rank,
        num_waiting_reqs=10 + rank,
        num_skipped_waiting_reqs=100 + rank,
        kv_cache_usage=0.25 * rank,
        prefix_cache_stats=PrefixCacheStats(requests=1 + rank, queries=10 + rank, hits=5 + rank),
        kv_cache_eviction_events=[KVCacheEvictionEvent(1.0 + rank, 2.0, (3.0,))],
        waiting_lora_adapters={"both": 1, f"w{rank}": 2},
        running_lora_adapters={"both": 3, f"r{rank}": 4},
    )
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_scheduler_stats_are_sums_and_a_mean() -> None:
    merged = merge_scheduler_stats([stats(0), stats(1), stats(2)], num_waiting=7)
    assert merged.num_running_reqs == 1 + 2 + 3
    assert merged.num_waiting_reqs == 10 + 11 + 12 + 7, "requests that wait for a placement wait too"
    assert merged.num_skipped_waiting_reqs == 303
    assert merged.kv_cache_usage == pytest.approx(0.25)
    assert (merged.prefix_cache_stats.requests, merged.prefix_cache_stats.queries) == (6, 33)
    assert merged.prefix_cache_stats.hits == 18
    assert [event.lifetime_seconds for event in merged.kv_cache_eviction_events] == [1.0, 2.0, 3.0]
    assert merged.waiting_lora_adapters == {"both": 3, "w0": 2, "w1": 2, "w2": 2}
    assert merged.running_lora_adapters == {"both": 9, "r0": 4, "r1": 4, "r2": 4}
    assert merged.cudagraph_stats is None and merged.perf_stats is None


def test_statistics_that_one_rank_has_are_kept() -> None:
    graph, perf = object(), object()
    merged = merge_scheduler_stats([stats(0), stats(1, cudagraph_stats=graph), stats(2, perf_stats=perf)], 0)
    assert merged.cudagraph_stats is graph and merged.perf_stats is perf


def test_the_parts_statistics_stay_as_they_are() -> None:
    parts = [stats(0), stats(1)]
    before = copy.deepcopy(parts)
    merge_scheduler_stats(parts, 3)
    assert parts == before


@pytest.mark.parametrize(
    "name",
    ["requests", "queries", "hits", "preempted_requests", "preempted_queries", "preempted_hits"],
)
def test_prefix_cache_counters_add_up(name: str) -> None:
    parts = [PrefixCacheStats(**{name: 3}), PrefixCacheStats(), PrefixCacheStats(**{name: 4})]
    merged = merge_prefix_cache(parts)
    assert merged == PrefixCacheStats(**{name: 7})


@pytest.mark.parametrize("where", [None, 0, 1])
def test_a_reset_anywhere_is_a_reset(where: int | None) -> None:
    parts = [PrefixCacheStats(reset=rank == where) for rank in range(2)]
    assert merge_prefix_cache(parts).reset is (where is not None)
