# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding over ranks: random worlds whose drafts are right or wrong by chance."""

from __future__ import annotations

import os
from collections import Counter
from copy import copy
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_nanocp.executor.multiproc import OneWorld, RankGather
from vllm_nanocp.placement.cost import CostModel
from vllm_nanocp.plan import StepPlan
from vllm_nanocp.sched.rank.drafts import DraftDoors
from vllm_nanocp.sched.rank.interface import Part
from vllm_nanocp.sched.rank.rank_server import RankServer
from vllm_nanocp.sched.rank.remote_rank import RemoteRank
from vllm_nanocp.sched.rank.stats import merge_scheduler_stats
from vllm_nanocp.sched.scheduler import NanoCPScheduler
from vllm_nanocp.sched.step_output import merge
from vllm_nanocp.worker.worker import OneRank

from .scheduler_world import Truth, payloads
from .test_sessions import SessionWorld
from .world_shapes import Ask, vllm_config
from .worlds import World, run_worlds

__all__ = ["vllm_config"]

# Worlds of each test; more of them look further, as does another first one (``NANOCP_FIRST_WORLD``).
WORLDS = int(os.environ.get("NANOCP_DRAFT_WORLDS", "6"))
WRONG = 5  # a token that no request makes


def with_drafts(vllm_config: Any, most: int) -> Any:
    """A configuration of an engine that speculates, with so many drafts a step."""
    config = copy(vllm_config)
    config.speculative_config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=most,
        prompt_lookup_max=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    return config


class DraftedWorld(World):
    """Requests are decoded with drafts: up to 1 or 3, all, most, some or none of them right."""

    def __init__(self, vllm_config: Any, seed: int, version: int, asynchronous: bool) -> None:
        self.dice = Random(seed)
        self.most = self.dice.choice([1, 3])
        self.right = self.dice.choice([0.0, 0.5, 0.9, 1.0])
        self.lazy = self.dice.choice([0.0, 0.3])
        self.queries, self.asynchronous = 1 + self.most, asynchronous
        super().__init__(self.with_drafts(vllm_config, self.most), seed, version, asynchronous)

    with_drafts = staticmethod(with_drafts)

    def draft(self, truth: Truth, first: int) -> list[int]:
        count = self.most if self.dice.random() >= self.lazy else self.dice.randint(0, self.most)
        right = truth.tokens[first : truth.num_prompt + len(truth.outputs)]
        right += [WRONG] * (count - len(right))
        return [token if self.dice.random() < self.right else WRONG for token in right[:count]]

    def launched(self, output: Any) -> None:
        if self.asynchronous and output.total_num_scheduled_tokens:
            self.device.propose(output, self.draft)  # stays there

    def after(self, output: Any) -> None:
        if output.total_num_scheduled_tokens and not self.asynchronous:
            self.scheduler.update_draft_token_ids(self.device.propose(output, self.draft))

    def run(self) -> Counter[str]:
        told: Counter[str] = Counter()

        def drafted(requests: int, drafts: int, accepted: int) -> None:
            told.update(told_sharded=requests, told_verified=drafts, told_accepted=accepted)

        self.scheduler.collector.drafted = drafted  # type: ignore[method-assign]
        return super().run() + self.device.drafts + told


class DraftedByModel(DraftedWorld):
    """The same with drafts of an EAGLE head, which vLLM would take blocks for, and drop cached ones."""

    def __init__(self, vllm_config: Any, seed: int, version: int, asynchronous: bool) -> None:
        self.told = 0
        super().__init__(vllm_config, seed, version, asynchronous)

    @staticmethod
    def with_drafts(vllm_config: Any, most: int) -> Any:
        config = with_drafts(vllm_config, most)
        object.__setattr__(config.speculative_config, "method", "eagle3")
        object.__setattr__(config.speculative_config, "disable_eagle_block_drop", True)
        return config

    def launched(self, output: Any) -> None:
        super().launched(output)
        ends: dict[str, int] = {}
        for runner, part in zip(self.device.runners, payloads(output), strict=True):
            cached = part.scheduled_cached_reqs
            starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            starts |= {new.req_id: new.num_computed_tokens for new in part.scheduled_new_reqs}
            for req_id, count in part.num_scheduled_tokens.items():
                known, end = runner.known.get(req_id), starts[req_id] + count
                if "#" in req_id and known is not None and end == known.num_prompt:
                    ends[req_id] = known.truth.tokens[end]
        assert output.plan.next_tokens == ends
        self.told += len(ends)

    def run(self) -> Counter[str]:
        return super().run() + Counter(told=self.told)


class Tight(DraftedWorld):
    """One request, all of whose drafts are right, that just fills its rank."""

    def draw(self) -> list[Ask]:
        self.right, self.lazy, shape = 1.0, 0.0, self.shape
        hasher = get_request_block_hasher(shape.block_size, sha256) if shape.caching else None
        truth = Truth(0, [10] * (shape.blocks * shape.block_size - 42), 42, 0 if shape.caching else 1, stops=False)
        # With prompt logprobs it cannot be sharded.
        params = SamplingParams(temperature=0.0, max_tokens=42, prompt_logprobs=1)
        prompt = truth.tokens[: truth.num_prompt]
        return [Ask(Request("r0", prompt, params, None, arrival_time=0.0, block_hasher=hasher), truth, 1, None)]

    def reset(self) -> None:
        pass


class DraftedSessions(DraftedWorld, SessionWorld):
    """The same with sessions."""


@pytest.mark.parametrize(("version", "asynchronous"), [(1, False), (2, False), (2, True)], ids=["v1", "v2", "v2-async"])
def test_worlds(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, version: int, asynchronous: bool) -> None:
    """Every other one has its schedulers behind messages."""
    worlds = WORLDS // version
    counts = run_worlds(DraftedWorld, vllm_config, version, asynchronous, worlds, monkeypatch)
    assert counts["verified"] > counts["accepted"] > 1000 // 2**version, counts
    assert min(counts[kind] for kind in ("moves", "spills", "sharded")) > 3, counts
    # V2's runner keeps drafts in its memory, so none go along to another rank's.
    assert min(counts[kind] for kind in ("moved", "behind_others")) > 3 if version == 1 else not counts["moved"], counts
    assert counts["preemptions"] and counts["aborts"] and counts["resets"] and counts["pauses"], counts
    # But for what is in flight when a request ends or is taken back.
    for told, happened in (("told_sharded", "sharded"), ("told_verified", "sharded_verified")):
        assert 0.9 * counts[happened] <= counts[told] <= counts[happened], counts
    assert 0.9 * counts["sharded_accepted"] <= counts["told_accepted"] <= counts["sharded_accepted"], counts


def test_worlds_with_a_draft_model(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members' workers are told what follows their run, and nobody takes blocks for what is not verified yet."""
    counts = run_worlds(DraftedByModel, vllm_config, 1, False, WORLDS // 2, monkeypatch)
    assert counts["verified"] > counts["accepted"] > 250 and counts["told"] > 20, counts
    assert counts["moves"] + counts["spills"] > 3 and counts["preemptions"], counts


@pytest.mark.parametrize(("version", "asynchronous"), [(1, False), (2, True)], ids=["v1", "v2-async"])
def test_sessions(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, version: int, asynchronous: bool) -> None:
    """One that has made its tokens goes on from all of them but the last, whatever drafts were behind it."""
    frontiers: Counter[int] = Counter()
    stop = Scheduler._handle_stopped_request

    def stopped(scheduler: Any, request: Request) -> bool:
        holds, finished = request.num_computed_tokens > 0, stop(scheduler, request)
        if holds and request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            frontiers[request.num_computed_tokens - request.num_tokens] += 1
        return finished

    monkeypatch.setattr(Scheduler, "_handle_stopped_request", stopped)
    counts = run_worlds(DraftedSessions, vllm_config, version, asynchronous, WORLDS // 2, monkeypatch)
    assert counts["accepted"] > 100, counts
    assert frontiers.keys() == {-1}, frontiers


def test_nobody_is_preempted_for_drafts(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = run_worlds(Tight, vllm_config, 1, False, 3, monkeypatch)
    assert counts["preemptions"] == 0 and counts["accepted"] > 3 * 20, counts


def test_steps_with_drafts_are_learned_from(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what moves and "auto" go by would stay what it was assumed to be before anything was measured."""
    counts: Counter[str] = Counter()
    observe = CostModel.observe

    def counted(model: CostModel, *args: Any) -> bool:
        counts["learned"] += 1
        return observe(model, *args)

    class Eager(DraftedWorld):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.lazy = 0.0
            self.scheduler.mover.learns = True

        def after(self, output: Any) -> None:
            drafted = any(part.scheduled_spec_decode_tokens for part in payloads(output))
            counts["drafted"] += drafted and not any(part.prompt_tokens for part in output.parts)
            super().after(output)

    monkeypatch.setattr(CostModel, "observe", counted)
    run_worlds(Eager, vllm_config, 1, False, 2, monkeypatch)
    assert counts["learned"] >= counts["drafted"] > 20, counts


def test_statistics_of_all_ranks() -> None:
    """Ranks that drafted nothing in a step have none."""
    parts = [SchedulerStats() for _ in range(3)]
    for part, drafts in ((parts[0], [(3, 1), (2, 2)]), (parts[2], [(3, 3)])):
        part.spec_decoding_stats = SpecDecodingStats.new(3)
        for drafted, accepted in drafts:
            part.spec_decoding_stats.observe_draft(drafted, accepted)
    one_engine = SpecDecodingStats.new(3)
    for drafted, accepted in [(3, 1), (2, 2), (3, 3)]:
        one_engine.observe_draft(drafted, accepted)
    assert merge_scheduler_stats(parts, 0).spec_decoding_stats == one_engine
    assert merge_scheduler_stats(parts[1:2], 0).spec_decoding_stats is None


def test_drafts_come_from_the_first_worker_of_a_rank_with_tokens() -> None:
    fresh, stale = DraftTokenIds(["a"], [[1, 2]]), DraftTokenIds(["b"], [[3]])

    class Runs:
        def __init__(self, drafts: DraftTokenIds, tp_rank: int, idle: bool) -> None:
            self.drafts, self.tp_rank, self._idle = drafts, tp_rank, idle

        def take_draft_token_ids(self) -> DraftTokenIds:
            return self.drafts

    worker = type("Worker", (OneRank, Runs), {"__init__": Runs.__init__})
    workers = [worker(fresh, 0, False), worker(fresh, 1, False), worker(stale, 0, True), worker(stale, 1, True)]
    executor = SimpleNamespace(
        rank_gather=RankGather(2), collective_rpc=lambda name, timeout: [getattr(one, name)() for one in workers]
    )
    assert OneWorld.take_draft_token_ids(executor) == [fresh, None]  # type: ignore[arg-type]


def test_grammars_hear_of_drafts_that_were_scheduled_unknown() -> None:
    """With async scheduling a step is scheduled with placeholders; where the bitmask is made, they are filled in."""
    heard: list[Any] = []
    drafts = [DraftTokenIds(["a"], [[1, 2]]), DraftTokenIds(["b"], [[3]]), None]
    outputs = [SchedulerOutput.make_empty() for _ in drafts]
    outputs[0].has_structured_output_requests = outputs[2].has_structured_output_requests = True
    vllms = SimpleNamespace(update_draft_token_ids_in_output=lambda *args: heard.append(args))
    server = SimpleNamespace(scheduler=vllms, _step=lambda serial: outputs[serial])
    near = SimpleNamespace(_tell=lambda name, *args: getattr(RankServer, f"do_{name}")(server, *args))
    parts = [Part.of(output) for output in outputs]
    for number, part in enumerate(parts):
        part.serial = number
    for rank in (
        SimpleNamespace(tell_drafts=partial(DraftDoors.tell_drafts, vllms)),
        SimpleNamespace(tell_drafts=partial(RemoteRank.tell_drafts, near)),  # type: ignore[arg-type]
    ):
        scheduler = SimpleNamespace(ranks=[rank] * 3)
        NanoCPScheduler.update_draft_token_ids_in_output(scheduler, drafts, merge(parts, StepPlan()))  # type: ignore[arg-type]
        assert heard == [(drafts[0], outputs[0])]
        heard.clear()
