# SPDX-License-Identifier: Apache-2.0
"""Who may overtake whom: the policy by properties, and the scheduler's queue in small worlds."""

from __future__ import annotations

import random
from collections import Counter
from itertools import accumulate, count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_nanocp.placement import RankLoad, Want, place
from vllm_nanocp.placement.queue import PATIENCE, STARTING_S, STARTS, WINDOW, Blocked, ranks_for

from . import loopback
from .scheduler_world import Device, Truth
from .test_adapters import adapter, with_adapters
from .test_scheduler_world import Shape, vllm_config  # noqa: F401

# -- policy -----------------------------------------------------------------------------------------------------------


@st.composite
def wants(draw: st.DrawFn, ranks: int) -> Want:
    limit = draw(st.integers(1, ranks))
    home = draw(st.one_of(st.none(), st.integers(0, ranks - 1)))
    return Want(draw(st.integers(1, 120)), draw(st.integers(1, limit)), limit, home)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Want, list[int], list[int], set[int]]:
    """What a request needs, room and blocks of each rank, and ranks that are closed."""
    ranks = draw(st.integers(1, 6))
    totals = draw(st.lists(st.integers(1, 60), min_size=ranks, max_size=ranks))
    room = [draw(st.integers(0, total)) for total in totals]
    return draw(wants(ranks)), room, totals, draw(st.sets(st.integers(0, ranks - 1)))


@given(situations())
def test_ranks_for_those_that_are_due(situation: tuple[Want, list[int], list[int], set[int]]) -> None:
    """They can hold it once they are empty, nobody else has them, and there are no fewer that could."""
    want, room, totals, closed = situation
    ranks = ranks_for(want, room, totals, closed)
    if not ranks:
        able = sorted((totals[r] for r in range(len(room)) if r not in closed), reverse=True)
        assert len(able) < want.start or want.home in closed or want.home is not None or sum(able[: want.limit]) < 9999
        return
    assert len(set(ranks)) == len(ranks) <= want.limit and not closed & set(ranks)
    assert sum(totals[rank] for rank in ranks) >= want.blocks and want.home in (None, ranks[0])
    fewer = ranks[:-1]
    assert len(ranks) == want.start or sum(totals[rank] for rank in fewer) < want.blocks


@given(st.data())
def test_what_may_not_fit_is_not_placed(data: st.DataObject) -> None:
    """``may_fit`` spares placement only what it would refuse."""
    ranks, segment, tokens = data.draw(st.integers(1, 5)), 320, data.draw(st.integers(1, 1500))
    limit, headroom = data.draw(st.integers(1, ranks)), data.draw(st.integers(0, 1))
    home = data.draw(st.one_of(st.none(), st.integers(0, ranks - 1)))
    loads = [
        RankLoad(free, data.draw(st.integers(1, 60)), 0, data.draw(st.integers(0, 2)))
        for free in data.draw(st.lists(st.integers(0, 60), min_size=ranks, max_size=ranks))
    ]
    rules: dict[str, Any] = dict(segment_size=segment, max_degree=limit, home=home, headroom_blocks=headroom)
    found = place(tokens, 16, loads, **rules)
    room = [load.free_blocks if load.slots else 0 for load in loads]
    start = max(1, min(limit, -(-tokens // segment)))
    blocked = Blocked(Want(-(-tokens // 16) + headroom, start, limit, home), urgent=False, room=[-1] * ranks)
    richest = list(accumulate(sorted(room, reverse=True)))
    assert found is None or blocked.may_fit(room, richest, max(load.total_blocks for load in loads))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_nobody_is_starved(seed: int) -> None:
    """Ranks without a scheduler, filled by small requests without end: each large one starts before long."""
    dice = random.Random(seed)
    ranks, total = dice.randint(1, 4), 40
    running: list[tuple[int, list[int]]] = []  # when it ends, and its blocks on each rank
    queue: list[tuple[str, Want, Blocked]] = []
    waits: Counter[str] = Counter()
    longest = 12
    for now in range(600):
        running = [held for held in running if held[0] > now]
        for number in range(3 * ranks):
            large = now < 150 and dice.random() < 0.02
            limit = dice.randint(1, ranks) if large else 1
            blocks = dice.randint(20, 38 * limit) if large else dice.randint(1, 8)
            start = -(-blocks // 39)
            want = Want(blocks, start, limit)
            queue.append((f"{'large' if large else 'small'} {now} {number}", want, Blocked(want, False)))
        del queue[40:]
        closed: set[int] = set()
        passed: list[tuple[str, Want, Blocked]] = []
        for entry in queue:
            name, want, blocked = entry
            free = [total - sum(held[rank] for _, held in running) for rank in range(ranks)]
            room = [0 if rank in closed else free[rank] for rank in range(ranks)]
            richest = sorted(range(ranks), key=lambda r: -room[r])[: want.limit]
            if len(passed) < WINDOW and sum(room[r] for r in richest) >= want.blocks:
                held, left = [0] * ranks, want.blocks
                for rank in richest:
                    held[rank] = min(left, room[rank])
                    left -= held[rank]
                running.append((now + dice.randint(1, longest), held))
                for _, _, other in passed:
                    other.overtaken += want.blocks
                continue
            waits[name] += 1
            passed.append(entry)
            if blocked.due:
                if not blocked.ranks or closed & set(blocked.ranks):
                    blocked.ranks = ranks_for(want, free, [total] * ranks, closed)
                closed.update(blocked.ranks)
        queue = passed
    large = {name: steps for name, steps in waits.items() if name.startswith("large")}
    assert not any(name.startswith("large") for name, _, _ in queue), (large, queue)


# -- the scheduler ----------------------------------------------------------------------------------------------------


class Queue:
    """Ranks with a scheduler, and the step in which each request is answered first."""

    def __init__(self, config: Any, **sizes: Any) -> None:
        base = dict(seed=0, ranks=2, block_size=16, blocks=40, max_reqs=64, budget=512, segment=4096, degree=2)
        base |= dict(moves=False, caching=False, priorities=False, chunk=0, reserve=0)
        self.shape = Shape(**{**base, **sizes})  # type: ignore[arg-type]
        self.scheduler = self.shape.scheduler(config, False)
        self.truths: dict[str, Any] = {}
        shape = self.shape
        self.device = Device(
            self.truths, shape.ranks, shape.blocks + 1, 16, shape.max_reqs, shape.degree, 1, asynchronous=False
        )
        self.first: dict[str, int] = {}
        self.num_tokens: Counter[str] = Counter()
        self.steps = 0

    def add(self, name: str, length: int, outputs: int, priority: int = 0, lora: int = 0, **params: Any) -> None:
        number = len(self.truths)
        truth = Truth(number, [10 + number % 200] * length, outputs, salt=1 + number, stops=False)
        self.truths[name] = truth
        request = Request(
            name,
            list(truth.tokens[:length]),
            SamplingParams(max_tokens=outputs, ignore_eos=True, **params),
            None,
            arrival_time=float(number),
            priority=priority,
            lora_request=adapter(lora) if lora else None,
        )
        self.scheduler.add_request(request)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.steps += 1
            output = self.scheduler.schedule()
            for outputs in self.scheduler.update_from_output(output, self.device.execute(output)).values():
                for answer in outputs.outputs:
                    self.first.setdefault(answer.request_id, self.steps)
                    self.num_tokens[answer.request_id] += len(answer.new_token_ids)

    def end(self) -> None:
        """Serve all that is left."""
        while self.scheduler.has_requests():
            self.step()
            assert self.steps < 5000, "somebody waits for ever"
        assert self.scheduler.free_blocks() == [self.shape.blocks] * self.shape.ranks
        assert not self.scheduler.admission.leftovers() and not self.scheduler.unplaced


@pytest.mark.parametrize("apart", [False, True])
def test_one_that_waits_at_a_rank_goes_where_there_is_room(
    vllm_config: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """What runs at its rank may take ever so long, and another rank is empty meanwhile."""
    loopback.use(monkeypatch, apart)
    queue = Queue(vllm_config)
    for name, outputs in (("goes on", 200), ("ends", 5)):
        queue.add(name, 400, outputs)
    queue.step(2)
    queue.add("waits", 400, 3)
    queue.step()
    assert not queue.scheduler.unplaced and queue.scheduler.rank_of["waits"] == queue.scheduler.rank_of["goes on"]
    queue.step(5)
    assert queue.scheduler.rank_of.get("waits") != queue.scheduler.rank_of["goes on"]
    assert queue.first["waits"] <= 8
    queue.end()


def test_one_that_waits_at_a_rank_does_not_come_behind_others(vllm_config: Any) -> None:  # noqa: F811
    """Room elsewhere is kept for one that is more important, long, and in the queue: it would have no place at all."""
    queue = Queue(vllm_config, priorities=True, segment=256)
    for name, outputs in (("one", 200), ("ends", 5), ("two", 200), ("three", 200)):
        queue.add(name, 250, outputs, priority=1)
    queue.step(2)
    queue.add("waits", 240, 3, priority=5)
    queue.step()
    at = queue.scheduler.rank_of["waits"]
    queue.add("long", 900, 3)
    for _ in range(12):
        queue.step()
        assert queue.scheduler.rank_of["waits"] == at and "long" in queue.scheduler.unplaced
    assert any(blocks >= 16 for blocks in queue.scheduler.free_blocks()), "there is room"
    queue.end()


def test_no_more_come_back_than_there_is_room_for(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Each that comes back is told to its rank, and to the next one."""
    queue = Queue(vllm_config, ranks=4)
    for n in range(4):
        queue.add(f"r{n}", 400, 200 if n else 5)
    queue.step(2)
    back: list[str] = []
    for number, rank in enumerate(queue.scheduler.ranks):
        withdraw = rank.withdraw
        monkeypatch.setattr(rank, "withdraw", lambda name, does=withdraw: (back.append(name), does(name))[1])
        if number:
            queue.add(f"w{number}", 300, 3)
    queue.step(6)
    assert "r0" not in queue.scheduler.requests and len(back) == 1
    queue.end()


@pytest.mark.parametrize(
    ("length", "sizes"),
    [(500, {}), (900, dict(segment=256)), (900, dict(segment=256, moves=True))],
    ids=["short", "sharded", "moves"],
)
def test_a_small_request_behind_one_without_room_starts_at_once(
    vllm_config: Any,  # noqa: F811
    length: int,
    sizes: dict[str, Any],
) -> None:
    queue = Queue(vllm_config, **sizes)
    for rank in range(queue.shape.ranks):
        queue.add(f"running {rank}", 230, 150)
    queue.step(3)
    assert len(queue.first) == queue.shape.ranks
    queue.add("large", length, 5)
    queue.add("small", 40, 5)
    queue.step()
    assert queue.first["small"] == queue.steps and "large" not in queue.first
    queue.end()
    assert "large" in queue.first


@pytest.mark.parametrize("sizes", [{}, dict(segment=128), dict(moves=True)], ids=["short", "sharded", "moves"])
@pytest.mark.parametrize("length", [560, 1000])
def test_a_large_request_is_not_starved(vllm_config: Any, length: int, sizes: dict[str, Any]) -> None:  # noqa: F811
    """Small ones fill the ranks all the time; it starts once they have taken so many times its room."""
    queue = Queue(vllm_config, **sizes)
    for step in range(2000):
        for i in range(2):
            queue.add(f"small {step} {i}", 60, 12)
        if step == 20:
            queue.add("large", length, 3)
        queue.step()
        if "large" in queue.first:
            break
    # One that stays on a rank may wait there instead, before all others, as soon as nobody behind it fits.
    assert queue.scheduler.admission.num_overtakings > 0 or length < 600
    taken = (PATIENCE + 1) * -(-length // 16) // 5  # small ones, of five blocks each, before it is due
    assert queue.first["large"] < 20 + taken + 80, queue.first["large"]
    queue.end()


def test_room_is_not_given_to_less_important_requests(vllm_config: Any) -> None:  # noqa: F811
    """One waits for room on both ranks; those that are equally important start meanwhile."""
    answered = {}
    for less in (True, False):
        queue = Queue(vllm_config, priorities=True, segment=512)
        for rank in range(2):
            queue.add(f"running {rank}", 400, 60, priority=1)
        queue.step(2)
        queue.add("important", 900, 5, priority=1)
        for i in range(4):
            queue.add(f"other {i}", 40, 5, priority=1 + less)
        queue.step(30)
        answered[less] = sum(name.startswith("other") for name in queue.first)
        queue.end()
        assert not less or queue.first["important"] <= 2 + min(queue.first[f"other {i}"] for i in range(4))
    assert answered == {True: 0, False: 4}


def test_less_important_requests_start_on_other_ranks(vllm_config: Any) -> None:  # noqa: F811
    """As with stock's ranks, each of which has a queue of its own."""
    queue = Queue(vllm_config, priorities=True)
    for rank in range(2):
        queue.add(f"running {rank}", 400, 100)
    queue.step(2)
    queue.add("important", 500, 5, priority=1)
    queue.add("other", 40, 5, priority=2)
    queue.step()
    assert "other" in queue.first and "important" not in queue.first
    queue.end()


@pytest.mark.parametrize("priorities", [False, True])
@pytest.mark.parametrize("waiting", [WINDOW * 2, 2000])
def test_a_step_looks_at_so_many_requests(vllm_config: Any, waiting: int, priorities: bool) -> None:  # noqa: F811
    """However many wait: for room, or for a slot of their adapter."""
    queue = Queue(with_adapters(vllm_config, 1), priorities=priorities, max_reqs=8)
    scheduler = queue.scheduler
    for rank in range(2):
        queue.add(f"running {rank}", 560, 60, lora=1)
    queue.step(3)
    for i in range(waiting):
        queue.add(f"r{i}", 100, 5, lora=i % 2 * 2)
    queue.step(waiting // WINDOW)  # all that can wait for a slot have been put aside
    looked = Counter[str]()
    peek, pop = scheduler.waiting.peek_request, scheduler.waiting.pop_request

    def count(name: str, method: Any) -> Any:
        def counted() -> Any:
            looked[name] += 1
            return method()

        return counted

    for name, method in (("peek_request", peek), ("pop_request", pop)):
        setattr(scheduler.waiting, name, count(name, method))
    find = scheduler.prefixes.find
    scheduler.prefixes.find = lambda request: looked.update(["find"]) or find(request)  # type: ignore[method-assign]
    queue.step(4)
    assert looked["peek_request"] <= 4 * (WINDOW + 2) and looked["pop_request"] <= 4 * (WINDOW + 2), looked
    assert looked["find"] <= 4 * 9, looked
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    queue.end()


def test_those_that_waited_for_a_slot_keep_their_place(vllm_config: Any) -> None:  # noqa: F811
    """They come before those that came later, and behind those that came before."""
    queue = Queue(with_adapters(vllm_config, 1), max_reqs=2)
    for rank in range(2):
        queue.add(f"first {rank}", 40, 6, lora=1)
    for rank in range(2):
        queue.add(f"second {rank}", 40, 40)
    queue.step()
    for i in range(6):
        queue.add(f"r{i}", 40, 3, lora=2 if i % 2 else 0)
    queue.end()
    order = sorted((f"r{i}" for i in range(6)), key=lambda name: queue.first[name])
    assert order == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize("apart", [False, True])
def test_a_burst_starts_over_several_steps(
    vllm_config: Any,  # noqa: F811
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each step so many start, in their order, when there is no time for more; those that run decode in all of them;
    and nothing is lost."""
    loopback.use(monkeypatch, apart)
    queue = Queue(vllm_config, max_reqs=200, blocks=1600, budget=4096)
    queue.scheduler.admission.clock = count(step=STARTING_S).__next__
    for rank in range(2):
        queue.add(f"running {rank}", 40, 60)
    queue.step(3)
    burst = [f"r{i}" for i in range(3 * STARTS + 5)]
    for name in burst:
        queue.add(name, 20, 3)
    for waiting in (2 * STARTS + 5, STARTS + 5, 5, 0):
        before = queue.num_tokens["running 0"], queue.num_tokens["running 1"]
        queue.step()
        assert len(queue.scheduler.unplaced) == waiting
        assert (queue.num_tokens["running 0"], queue.num_tokens["running 1"]) == tuple(n + 1 for n in before)
    order = sorted(burst, key=lambda name: queue.first[name])
    queue.end()
    assert order == burst and all(queue.num_tokens[name] == 3 for name in burst)


@pytest.mark.parametrize("apart", [False, True])
def test_a_burst_starts_at_once_while_there_is_time(
    vllm_config: Any,  # noqa: F811
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many start in a step as in stock vLLM's ranks, which start all, until a bounded time has gone by."""
    loopback.use(monkeypatch, apart)
    queue = Queue(vllm_config, max_reqs=300, blocks=2400, budget=8192)
    queue.scheduler.admission.clock = count(step=STARTING_S / 256.5).__next__
    for i in range(256 + 100):
        queue.add(f"r{i}", 20, 3)
    queue.step()
    assert len(queue.scheduler.unplaced) == 100, "others wait"
    queue.step()
    assert not queue.scheduler.unplaced
    queue.end()
    assert all(queue.num_tokens[f"r{i}"] == 3 for i in range(356))


def test_short_outputs_leave_no_rank_empty(vllm_config: Any) -> None:  # noqa: F811
    """As many start as end: with one token each, the number grows while others wait."""
    queue = Queue(vllm_config, max_reqs=200, blocks=1600, budget=4096)
    queue.scheduler.admission.clock = count(step=STARTING_S).__next__
    for i in range(8 * STARTS):
        queue.add(f"r{i}", 20, 1)
    queue.end()
    assert queue.steps <= 6


def test_one_that_has_blocks_keeps_none_from_waiting_at_its_rank(vllm_config: Any) -> None:  # noqa: F811
    """The numbers of a rank, kept while a member enters that goes on there, are those that one would find."""
    rank: Any = Queue(vllm_config).scheduler.ranks[0]
    for name, computed in (("second run", 16), ("first run", 0)):
        rank.adopt_cached(name, [])
        rank.allocate(name, 3)
        request = Request(name, [1] * 40, SamplingParams(max_tokens=1), None)
        request.num_computed_tokens = computed
        assert rank.view.nobody_waits
        rank.enter(request)
        assert rank.view == rank.take_view()
