# SPDX-License-Identifier: Apache-2.0
"""EngineCore's loop around the scheduler and ranks without work: random loads, aborts, resets and pauses."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from vllm_nanocp.sched import home_moves
from vllm_nanocp.sched import scheduler as scheduler_module
from vllm_nanocp.sched.rank.rank_view import RankView

from . import loopback, rank_forks, rank_insides
from .event_index import Index
from .scheduler_world import Device
from .world_runners import GARBAGE, WorldError
from .world_shapes import MODES, Ask, Shape, draw_asks, no_adapter

MAX_STEPS = 4000
# Whether all worlds have their schedulers in processes; and the seed of the first one, to look elsewhere.
ALL_PROCESSES = os.environ.get("NANOCP_WORLD_PROCESSES", "0") == "1"
FIRST_WORLD = int(os.environ.get("NANOCP_FIRST_WORLD", "0"))


class Events:
    """A router that follows a rank's KV events, in the order in which they are published."""

    def __init__(self, number: int, rank: Any, block_size: int) -> None:
        self.rank, self.index = rank, Index(number, block_size)
        rank_insides.keep_events(rank)

    def check(self, requests: Iterable[Request]) -> bool:
        """It knows of each prompt what a request could use on this rank, and of nothing else.

        Returns:
            Whether the rank has blocks that it does not announce.
        """
        self.index.follow(rank_insides.take_events(self.rank))
        usable: set[Any] = set()
        for request in requests:
            has = rank_insides.cached_prefix(self.rank, request)
            hashes = [maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes[:has]]
            tokens = list(request.all_token_ids)[: len(request.block_hashes) * self.index.block_size]
            lora = request.lora_request
            found = self.index.match(tokens, None if lora is None else lora.lora_name)
            if found != hashes:
                raise WorldError(f"rank {self.index.rank}: {len(found)} blocks of {request.request_id}, it has {has}")
            usable.update(hashes)
        # Behind messages the copies of requests here have not all tokens that were made.
        if usable != self.index.nodes.keys() and not loopback.in_use:
            raise WorldError(f"rank {self.index.rank}: announces what no request can use")
        return rank_insides.num_cached_blocks(self.rank) > len(usable)


def same(whose: str, kept: RankView, has: RankView) -> None:
    """What is kept of a rank is what one would find now, in every number."""
    for one in fields(RankView):
        mine, right = getattr(kept, one.name), getattr(has, one.name)
        if mine != right or type(mine) is not type(right):
            raise WorldError(f"{whose}: {one.name} is kept as {mine!r}, it is {right!r}")


class World:
    """EngineCore's loop around the scheduler and ranks without work."""

    # Tokens that a request is decoded with, drafts included.
    queries = 1
    # What vLLM and the plugin log below it belongs to these worlds.
    log_level = logging.ERROR

    def __init__(self, vllm_config: Any, seed: int, version: int, asynchronous: bool) -> None:
        self.rng = random.Random(seed)
        self.shape = shape = Shape.draw(self.rng, seed)
        self.scheduler = shape.scheduler(vllm_config, asynchronous)
        self.check_each_load()
        self.events = [Events(i, rank, shape.block_size) for i, rank in enumerate(self.scheduler.ranks)]
        self.asks = {ask.request.request_id: ask for ask in self.draw()}
        truths = {name: ask.truth for name, ask in self.asks.items()}
        self.device = Device(
            truths,
            shape.ranks,
            shape.blocks + 1,
            shape.block_size,
            shape.max_reqs,
            shape.degree,
            version,
            asynchronous,
            self.queries,
        )
        self.depth = 2 if asynchronous else 1
        self.flying: deque[tuple[Any, Any]] = deque()
        self.answers: dict[str, list[int]] = {name: [] for name in self.asks}
        self.ended: set[str] = set()
        self.now = 0
        self.counts: Counter[str] = Counter()
        self.clock = 0.0

    def draw(self) -> list[Ask]:
        return draw_asks(self.rng, self.shape, self.draw_adapter)

    def draw_adapter(self) -> LoRARequest | None:
        return no_adapter()

    def arrivals(self) -> list[tuple[int, Request]]:
        """What comes, and when, in this order."""
        return [(ask.comes, ask.request) for ask in self.asks.values()]

    def monotonic(self) -> float:
        """The scheduler's clock: a step takes what the dice say, so that worlds are the same each time."""
        return self.clock

    def run(self) -> Counter[str]:
        coming = deque(self.arrivals())
        paused_until = 0
        while coming or self.flying or self.scheduler.has_requests() or paused_until:
            self.now += 1
            if self.now > MAX_STEPS:
                self.starved()
            while coming and coming[0][0] <= self.now:
                self.arrive(coming.popleft()[1])
            paused_until = self.pause(paused_until)
            self.reset()
            self.abort(self.rng.random() < 0.5)
            self.step()
            if self.now % 16 == 0:
                self.check_events()
        self.check_nothing_left()
        self.check_events()
        scheduler, device = self.scheduler, self.device
        self.counts += Counter(
            steps=scheduler.num_steps,
            moves=scheduler.mover.num_moves,
            spills=scheduler.mover.num_spills,
            preemptions=scheduler.num_preemptions,
            set_aside=scheduler.prefixes.num_set_aside,
            rows=device.num_rows,
            together=device.num_together,
            arrivals=device.num_arrivals,
            generators=device.num_generators,
        )
        return self.counts

    # -- what happens ------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def step(self) -> None:
        """As ``EngineCore.step`` and ``step_with_batch_queue`` do."""
        self.clock += self.rng.uniform(0.004, 0.01)
        self.check_requests()
        if self.scheduler.has_requests():
            self.check_loads()
            output = self.scheduler.schedule()
            self.check_loads()
            self.flying.append((output, self.device.execute(output)))
            self.launched(output)
            executed = output.total_num_scheduled_tokens > 0
            if len(self.flying) < self.depth and (executed or self.scheduler.has_requests()):
                return
        elif not self.flying:
            return
        output, answers = self.flying.popleft()
        self.abort(self.rng.random() < 0.5)
        self.deliver(self.scheduler.update_from_output(output, answers))
        self.check_loads()
        self.after(output)

    def launched(self, output: Any) -> None:
        """When the ranks have a step, and nobody knows its output yet."""

    def after(self, output: Any) -> None:
        """When a step's output has been taken in."""

    def deliver(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What leaves by the engine comes to the clients."""
        for some in outputs.values():
            for answer in some.outputs:
                self.take(answer.request_id, answer.new_token_ids, answer.finish_reason)

    def take(self, name: str, tokens: list[int], finish: FinishReason | None) -> None:
        if name not in self.asks or name in self.ended:
            raise WorldError(f"{name} has no client, but is answered {tokens}")
        wanted, answer = self.asks[name].truth.outputs, self.answers[name]
        answer += tokens
        if answer != wanted[: len(answer)] or GARBAGE in answer:
            raise WorldError(f"{name} is answered {answer} instead of {wanted}")
        if finish is not None:
            self.ended.add(name)
            if len(answer) != len(wanted):
                raise WorldError(f"{name} ends after {len(answer)} of {len(wanted)} tokens")

    def abort(self, now: bool) -> None:
        for name, ask in self.asks.items():
            if now and ask.leaves is not None and ask.comes <= ask.leaves <= self.now and name not in self.ended:
                ended = self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                if [request.request_id for request in ended] != [name]:
                    raise WorldError(f"{name} was to be aborted, but {ended} were")
                self.ended.add(name)
                self.counts["aborts"] += 1

    def reset(self) -> None:
        if self.rng.random() >= 0.02:
            return
        running = self.rng.random() < 0.5
        done = self.scheduler.reset_prefix_cache(reset_running_requests=running)
        self.counts["resets"] += 1
        if running and not done:
            raise WorldError("a reset with running requests did not free all blocks")
        if done:
            self.device.wipe()

    def pause(self, until: int) -> int:
        """Pause, or go on when it is time to."""
        if until:
            if self.now >= until:
                self.scheduler.set_pause_state(PauseState.UNPAUSED)
                return 0
        elif self.rng.random() < 0.01:
            self.counts["pauses"] += 1
            self.scheduler.set_pause_state(self.rng.choice([PauseState.PAUSED_ALL, PauseState.PAUSED_NEW]))
            return self.now + self.rng.randint(1, 30)
        return until

    def check_requests(self) -> None:
        """The scheduler has what has come and has not ended, wherever that is: vLLM's engine asks (from 0.33 on)."""
        for name, ask in self.asks.items():
            if (held := self.held(name, ask)) is not None and self.scheduler.has_request(name) != held:
                raise WorldError(f"{name} came at {ask.comes} of {self.now}; held: {not held} instead of {held}")

    def held(self, name: str, ask: Ask) -> bool | None:
        """Whether a request must be in the scheduler; None: it may be."""
        return ask.comes <= self.now and name not in self.ended

    def check_each_load(self) -> None:
        """Whenever loads are asked for, for each placement of a step too, those kept are what one would find then."""
        mover, ranks = self.scheduler.mover, self.scheduler.ranks
        kept_loads = mover.loads

        def loads() -> list[Any]:
            kept = kept_loads()
            fresh = [mover._load(rank.view, ahead) for rank, ahead in zip(ranks, mover._look_ahead(), strict=True)]
            if kept != fresh:
                raise WorldError(f"kept loads {kept} instead of {fresh}")
            return kept

        mover.loads = self.scheduler.placer._loads = loads  # type: ignore[method-assign]

    def check_loads(self) -> None:
        """What is kept of the ranks is what one would find now."""
        for number, rank in enumerate(self.scheduler.ranks):
            # Each time in every fourth world: in the others what is told may wait for what is asked.
            far = hasattr(rank, "channel") and (self.now % 4 == 0 or self.shape.seed % 4 == 1)
            known = self.known_and_true(rank) if far else None
            if not hasattr(rank, "channel") or hasattr(rank.channel, "server") or far:
                same(f"rank {number}", *rank_insides.views(rank))
            if known is not None:
                same(f"rank {number}, at its near end", *known)
        mover = self.scheduler.mover
        mover.loads()
        work = mover.work()
        shards = list(self.scheduler.members.shards_by_rank())
        self.scheduler.members.changes += 1  # nothing kept is right any more
        anew = mover.work(), list(self.scheduler.members.shards_by_rank())
        if (work, shards) != anew:
            raise WorldError(f"kept {work} and {shards} instead of {anew}")

    def known_and_true(self, rank: Any) -> tuple[RankView, RankView]:
        """What is known of a rank behind messages, and what it has once all that it was told is done; where less room
        is known, which is right, as it has it."""
        known = rank.view
        rank.refresh()
        has, rank.view = rank.view, known
        more_room = [("free_blocks", 1), ("slots", 1), ("coming", -1), ("kv_usage", -1)]
        as_has = {
            name: getattr(has, name)
            for name, sign in more_room
            if (getattr(has, name) - getattr(known, name)) * sign > 0
        }
        if known.adapters > has.adapters:  # only the rank knows whether others there have the one that one less needs
            as_has["adapters"] = has.adapters
        self.counts["less room known"] += bool(as_has)
        return replace(known, **as_has), has

    # -- the end -----------------------------------------------------------------------------------------------

    def check_events(self) -> None:
        for events in self.events:
            self.counts["withheld"] += events.check(ask.request for ask in self.asks.values())

    def starved(self) -> None:
        waiting = [name for name in self.asks if name not in self.ended]
        raise WorldError(f"after {self.now} steps {waiting} have not ended: {self.scheduler.get_request_counts()}")

    def check_nothing_left(self) -> None:
        scheduler, mover = self.scheduler, self.scheduler.mover
        missing = self.asks.keys() - self.ended
        if missing:
            raise WorldError(f"{missing} never ended")
        if scheduler.has_unfinished_requests() or scheduler.get_request_counts() != (0, 0):
            raise WorldError(f"all have ended, but {scheduler.get_request_counts()} run and wait")
        if scheduler.free_blocks() != [self.shape.blocks] * self.shape.ranks:
            raise WorldError(f"{scheduler.free_blocks()} of {self.shape.blocks} blocks are free")
        left = {
            "members": scheduler.members.leftovers(),
            "prefixes": scheduler.prefixes.leftovers(),
            "admission": scheduler.admission.leftovers(),
            "unplaced": scheduler.unplaced,
            "failures": scheduler.failures.leftovers(),
            "waiting": list(scheduler.waiting),
            "rank_of": scheduler.rank_of,
            "_preempted": scheduler._preempted,
            "leaving": mover.leaving,
            "_states": mover._states,
            "_last_move": mover._last_move,
            "_undone": mover._undone,
        }
        left |= {f"rank {i}": rank_insides.leftovers(rank) for i, rank in enumerate(scheduler.ranks)}
        found = {name: value for name, value in left.items() if value} | self.device.leftovers()
        if found:
            raise WorldError(f"left over: {found}")


def run_worlds(
    make: type[World],
    vllm_config: Any,
    version: int,
    asynchronous: bool,
    worlds: int,
    monkeypatch: pytest.MonkeyPatch,
    apart: bool | None = None,
    processes: bool = False,
) -> Counter[str]:
    """Run a kind of worlds, each from its seed on, and count what happened in them.

    Args:
        make: their kind.
        vllm_config: the fixture's.
        version: of the model runner.
        asynchronous: whether steps are scheduled before the output of those before is known.
        worlds: how many.
        monkeypatch: the test's.
        apart: whether the ranks' schedulers are behind messages; None: in every other world.
        processes: whether they are in processes (``rank_forks``), in each world; the environment variable
            ``NANOCP_WORLD_PROCESSES=1`` has all tests of worlds do so.

    Raises:
        AssertionError: a world went wrong; says which, in which step, and how.
    """
    if processes or ALL_PROCESSES:
        with rank_forks.in_use(vllm_config, monkeypatch):
            return _run(make, vllm_config, version, asynchronous, worlds, monkeypatch, lambda _: None)

    def place(seed: int) -> None:
        loopback.use(monkeypatch, bool(seed % 2) if apart is None else apart)

    return _run(make, vllm_config, version, asynchronous, worlds, monkeypatch, place)


def _run(
    make: type[World],
    vllm_config: Any,
    version: int,
    asynchronous: bool,
    worlds: int,
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[int], None],
) -> Counter[str]:
    """As ``run_worlds``; ``place`` says where the schedulers of a seed's world are to be."""
    # The platform has no V2 runner; the schedulers ask for nothing but this.
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(version - 1))
    counts: Counter[str] = Counter()
    for seed in range(FIRST_WORLD, FIRST_WORLD + worlds):
        place(seed)
        world = make(vllm_config, seed, version, asynchronous)
        for module in (scheduler_module, home_moves):
            monkeypatch.setattr(module, "time", world)
        try:
            counts += world.run()
        except Exception as error:
            raise AssertionError(f"world {seed}, step {world.now}, {world.shape}: {error!r}") from error
        finally:
            world.scheduler.shutdown()
    print(dict(counts))
    return counts


@dataclass(frozen=True)
class InMode:
    """Runs worlds in one mode.

    Attributes:
        version: of the model runner.
        asynchronous: whether steps are scheduled before the output of those before is known.
    """

    version: int
    asynchronous: bool
    _config: Any
    _monkeypatch: pytest.MonkeyPatch
    _caplog: pytest.LogCaptureFixture

    def run(self, make: type[World], worlds: int, **where: bool) -> Counter[str]:
        """As ``run_worlds``."""
        self._caplog.set_level(make.log_level, "vllm")
        return run_worlds(make, self._config, self.version, self.asynchronous, worlds, self._monkeypatch, **where)


@pytest.fixture(params=MODES, ids=["v1", "v1-async", "v2", "v2-async"])
def in_mode(
    request: pytest.FixtureRequest,
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> InMode:
    """A test of worlds runs in each mode. For modules that have ``vllm_config``."""
    return InMode(*request.param, vllm_config, monkeypatch, caplog)
