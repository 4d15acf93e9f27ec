#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What scheduling costs when each rank's vLLM scheduler runs in a process of its own: real schedulers, no workers.

    python benchmarks/schedule_cost.py step --ranks 32 --requests 256 --sharded 2
    python benchmarks/schedule_cost.py burst --ranks 64 --burst 4096
    python benchmarks/schedule_cost.py child --requests 256
    python benchmarks/schedule_cost.py all --save benchmarks/results/schedule_cost.json

``step``: CPU time of the engine's process in ``schedule()`` and ``update_from_output()`` of steps in which all
requests decode, one step in flight, ``--sharded`` of each rank's requests spread over ranks. With ``--in-process``
all schedulers run in that process. ``burst``: CPU time of placing so many short requests that come at once, while
others decode. ``child``: what one rank's scheduler process does, beside a stock vLLM scheduler with the same
requests, in the same process, in turns. ``--profile`` prints where the engine's time goes, instead of measuring it.

Workers are virtual: parts are decoded and outputs are made between the timed calls, and given as workers give them.
Output goes by sockets to a process that drops it, as it goes to API servers. All times are CPU time (user and system)
of the process in question: two cores cannot run 64 processes at once. The schedulers' processes are forked, not
spawned as in an engine, so that 64 of them share the memory of what they have imported.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pickle
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from virtual_workers import WARM_UP, World, answer, cpu_ms, drop_output, make_requests, scheduler_args

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOUNDS_MS = {(8, 256): 1.0, (32, 256): 3.0, (64, 256): 6.0}  # a step of the engine's process
PLACEMENT_US, CHILD = 50.0, 1.1
ALL = [
    "child --steps 200",
    "burst --ranks 64 --requests 32",
    *(f"step --ranks {ranks} --steps 100" for ranks in (8, 32, 64)),
    "step --ranks 32 --steps 100 --moves",
    "step --ranks 8 --steps 100 --in-process",
    "step --ranks 32 --steps 100 --in-process",
]


def summary(values: list[float]) -> dict[str, float]:
    numbers = dict(median=statistics.median(values), mean=statistics.fmean(values), longest=max(values))
    return {name: round(value, 4) for name, value in numbers.items()}


def report(profile: cProfile.Profile) -> None:
    pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    pstats.Stats(profile).sort_stats("cumtime").print_stats(45)


def measure_step(args: argparse.Namespace, model: str, path: str) -> dict[str, Any]:
    world = World(args, model, path, args.requests)
    world.fill(args.ranks, args.requests - args.sharded, args.sharded)
    profile = cProfile.Profile(time.process_time) if args.profile else None
    times = []
    for _ in range(args.steps):
        times.append(world.step(profile))
        assert args.moves or world.scheduled == args.requests * args.ranks, "a request was left out"
    world.scheduler.shutdown()
    if profile is not None:
        report(profile)
        return {}
    schedule, message, update = (list(column) for column in zip(*times, strict=True))
    both = [a + b for a, b in zip(schedule, update, strict=True)]
    bound = None if args.in_process else BOUNDS_MS.get((args.ranks, args.requests))
    result: dict[str, Any] = dict(step_ms=summary(both), schedule_ms=summary(schedule), update_ms=summary(update))
    result |= dict(workers_message_ms=summary(message), moves=world.scheduler.mover.num_moves)
    if bound is not None:
        result |= dict(bound_ms=bound, median_to_bound=round(statistics.median(both) / bound, 3))
    return result | dict(raw_step_ms=[round(value, 3) for value in both])


def measure_burst(args: argparse.Namespace, model: str, path: str) -> dict[str, Any]:
    world = World(args, model, path, 256)
    world.fill(args.ranks, args.requests - args.sharded, args.sharded)
    before = [sum(world.step()[::2]) for _ in range(20)]
    placing = [0.0]
    original = world.scheduler.admission.step

    def timed() -> None:
        placing[0] += cpu_ms(original)[1]

    world.scheduler.admission.step = timed  # type: ignore[method-assign]
    profile = cProfile.Profile(time.process_time) if args.profile else None
    added = world.add(make_requests("burst", [40 + i % 100 for i in range(args.burst)]))
    steps: list[float] = []
    while world.scheduler.unplaced or not steps:
        schedule, _, update = world.step(profile)
        steps.append(schedule + update)
    after = [sum(world.step()[::2]) for _ in range(5)]
    world.scheduler.shutdown()
    if profile is not None:
        report(profile)
        return {}
    over = sum(steps) + sum(after) - (len(steps) + len(after)) * statistics.median(before)
    placement = 1e3 * placing[0] / args.burst
    return dict(
        placement_us=round(placement, 2),
        bound_us=PLACEMENT_US,
        to_bound=round(placement / PLACEMENT_US, 3),
        add_request_us=round(1e3 * added / args.burst, 2),
        all_but_decoding_us=round(1e3 * over / args.burst, 2),
        steps_to_place=len(steps),
        longest_step_ms=round(max(steps), 2),
        step_before_ms=summary(before),
        raw_step_ms=[round(value, 3) for value in (*steps, *after)],
    )


def timed_into(times: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        result, times[name] = cpu_ms(lambda: call(*args))
        return result

    return timed


class Stock:
    """vLLM's scheduler, one step in flight, and what its engine pickles."""

    def __init__(self, scheduler: Any, prompts: dict[str, int]) -> None:
        self.scheduler, self.prompts = scheduler, prompts
        self.scheduled: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self._flying: list[tuple[Any, bytes]] = []

    def schedule(self, at: dict[str, float]) -> None:
        output, at["stock_schedule"] = cpu_ms(self.scheduler.schedule)
        packed, at["stock_pickle"] = cpu_ms(lambda: pickle.dumps(output, -1))
        self.fly(output, pickle.loads(packed))

    def fly(self, step: Any, part: Any) -> None:
        self.scheduled = part.num_scheduled_tokens
        self._flying.append((step, pickle.dumps(answer(part, self._computed, self.prompts), -1)))

    def land(self) -> Any:
        return self._flying.pop(0) if len(self._flying) > 1 else None

    def update(self, at: dict[str, float]) -> None:
        if landed := self.land():
            step, data = landed
            output, at["stock_unpickle"] = cpu_ms(lambda: pickle.loads(data))
            _, at["stock_update"] = cpu_ms(lambda: self.scheduler.update_from_output(step, output))


class Child(Stock):
    """A rank's scheduler process, without the process: with messages, and what of it are vLLM's calls."""

    def __init__(self, server: Any, prompts: dict[str, int]) -> None:
        super().__init__(server.scheduler, prompts)
        self.server, self._inside = server, {"schedule": 0.0, "update_from_output": 0.0}
        for name in self._inside:
            setattr(self.scheduler, name, timed_into(self._inside, name, getattr(self.scheduler, name)))

    def schedule(self, at: dict[str, float]) -> None:
        from vllm_nanocp.sched.rank.wire import Answer, Scheduled

        message = pickle.dumps([("schedule", (False, None))], -1)
        frame, at["child_schedule_message"] = cpu_ms(lambda: self.server.obey(message))
        at["child_schedule"] = self._inside["schedule"]
        result = Scheduled._make(Answer.decode(frame).result)
        self.fly(result.serial, pickle.loads(result.payload))

    def update(self, at: dict[str, float]) -> None:
        if landed := self.land():
            message = pickle.dumps([("update", landed)], -1)
            _, at["child_update_message"] = cpu_ms(lambda: self.server.obey(message))
            at["child_update"] = self._inside["update_from_output"]
            _, at["child_send"] = cpu_ms(self.server.after)


def measure_child(args: argparse.Namespace, model: str, path: str) -> dict[str, Any]:
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_nanocp.sched.rank import rank_process
    from vllm_nanocp.sched.rank.rank_spec import RankSpec
    from vllm_nanocp.sched.rank.wire import pack

    kwargs = scheduler_args(args, model, args.requests)
    stock = AsyncScheduler(structured_output_manager=StructuredOutputManager(kwargs["vllm_config"]), **kwargs)
    server = rank_process.make_server(RankSpec(rank=0, include_finished_set=False, **kwargs))
    server.do_connect([path], 0)
    freeze_gc_heap()
    lengths = [40 + i % 100 for i in range(args.requests)]
    for request in make_requests("short", lengths):
        server.do_enter(pack(request), 0, 0)
    for request in make_requests("short", lengths):
        stock.add_request(request)
    prompts = {f"short-{i}": length for i, length in enumerate(lengths)}
    sides = (Stock(stock, prompts), Child(server, prompts))
    its: list[dict[str, float]] = []
    for number in range(WARM_UP + args.steps):
        order = sides if number % 2 else sides[::-1]  # who comes first finds the caches of the machine colder
        at: dict[str, float] = {}
        for side in order:
            side.schedule(at)
        for side in order:
            side.update(at)
        assert number < WARM_UP or sides[0].scheduled == sides[1].scheduled, "they do not do the same"
        its.append(at)
    its = its[WARM_UP:]
    ms = {name: statistics.median(at[name] for at in its) for name in its[0]}
    own, stock_own = (ms[f"{who}_schedule"] + ms[f"{who}_update"] for who in ("child", "stock"))
    whole = ms["child_schedule_message"] + ms["child_update_message"]
    stock_whole = stock_own + ms["stock_pickle"] + ms["stock_unpickle"]
    return dict(
        median_ms={name: round(value, 4) for name, value in ms.items()},
        bound=CHILD,
        ratio=round(own / stock_own, 3),
        ratio_schedule=round(ms["child_schedule"] / ms["stock_schedule"], 3),
        ratio_update=round(ms["child_update"] / ms["stock_update"], 3),
        ratio_with_messages_and_pickling=round(whole / stock_whole, 3),
        ratio_with_messages_to_stock_without=round(whole / stock_own, 3),
    )


def measure_all(save: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; shared with other work"
    runs: list[dict[str, Any]] = []
    for line in ALL:
        print(line, flush=True)
        command = [sys.executable, os.path.abspath(__file__), *line.split()]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        with open(save, "w") as file:
            json.dump(dict(machine=machine, commit=commit, time="CPU time of the process", runs=runs), file, indent=1)
            file.write("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "burst", "child", "all"))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--requests", type=int, default=256, help="that decode on each rank")
    parser.add_argument("--sharded", type=int, default=2, help="of each rank's requests")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--burst", type=int, default=4096, help="short requests that come at once")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--moves", action="store_true", help="let homes move")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save", default=os.path.join(ROOT, "benchmarks", "results", "schedule_cost.json"))
    args = parser.parse_args()
    if args.what == "all":
        return measure_all(args.save)
    sys.path.insert(0, ROOT)
    import vllm

    from tests.tiny_models import make_qwen3_moe

    with tempfile.TemporaryDirectory() as folder:
        path = f"ipc://{folder}/output"
        multiprocessing.get_context("fork").Process(target=drop_output, args=(path,), daemon=True).start()
        measure = {"step": measure_step, "burst": measure_burst, "child": measure_child}[args.what]
        result = measure(args, str(make_qwen3_moe(folder)), path)
    versions = dict(vllm=vllm.__version__, python=platform.python_version())
    print(
        json.dumps(
            dict(command=" ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]), **versions, **result)
        )
    )


if __name__ == "__main__":
    main()
