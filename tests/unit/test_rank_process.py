# SPDX-License-Identifier: Apache-2.0
"""Processes of the ranks' schedulers: how they start, how they end, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.core import EngineCore

from vllm_nanocp.errors import NanoCPError
from vllm_nanocp.executor import failed_start
from vllm_nanocp.sched.rank import orphans, rank_process

from . import loopback, rank_forks
from .world_shapes import Shape, vllm_config  # noqa: F401

LIMIT_S = 10.0


def wait_until(what: str, done: Callable[[], Any], limit: float = LIMIT_S) -> None:
    end = time.monotonic() + limit
    while not done():
        assert time.monotonic() < end, f"not within {limit:.0f} s: {what}"
        time.sleep(0.02)


def handles() -> set[str]:
    """What this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(name + os.readlink(f"/proc/self/fd/{name}"))
    return found


class Started:
    """All processes that were started."""

    def __init__(self, start: Callable[[Any], Any]) -> None:
        self.start, self.all = start, []  # type: ignore[var-annotated]

    def __call__(self, theirs: Any) -> Any:
        self.all.append(self.start(theirs))
        return self.all[-1]

    def left(self) -> list[int]:
        return [process.pid for process in self.all if process.poll() is None]


@pytest.fixture
def started(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:  # noqa: F811
    """Forked ones; at the end none of them is left, nor a handle."""
    with rank_forks.in_use(vllm_config, monkeypatch):
        before = handles()
        found = Started(rank_process.start)
        monkeypatch.setattr(rank_process, "start", found)
        yield found
        monkeypatch.undo()
        wait_until("no process is left", lambda: not found.left())
        wait_until("no handle is left", lambda: handles() <= before)
        assert not rank_process._started and not rank_process._ready


def make_scheduler(vllm_config: Any) -> Any:  # noqa: F811
    return Shape.draw(random.Random(1), 1).scheduler(vllm_config, True)


class Executor:
    """Of an engine that fails to start after its scheduler processes."""

    def __init__(self, *_: Any) -> None:
        rank_process.launch(3)
        raise RuntimeError("a worker has failed")


def test_an_engine_whose_workers_fail_leaves_nothing(vllm_config: Any, started: Started) -> None:  # noqa: F811
    failed_start.install()
    with pytest.raises(RuntimeError, match="a worker has failed"):
        EngineCore(vllm_config, Executor, False)  # type: ignore[arg-type]
    assert len(started.all) == 3
    assert not started.left() and not rank_process._ready
    make_scheduler(vllm_config).shutdown()


def test_a_scheduler_that_cannot_be_made_leaves_nothing(
    vllm_config: Any,  # noqa: F811
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do the others, which could."""

    sent: list[Any] = []
    dumps = rank_process.cloudpickle.dumps

    def break_the_second(spec: Any) -> bytes:
        sent.append(spec)
        data: bytes = dumps(spec if len(sent) != 2 else None)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(rank_process.cloudpickle, "dumps", break_the_second)
        with pytest.raises(NanoCPError, match="rank 1 could not start"):
            make_scheduler(vllm_config)
    assert len(started.all) > 1 and not started.left()
    make_scheduler(vllm_config).shutdown()


def test_who_forgets_its_processes_ends_them(started: Started) -> None:
    """An engine fails while its scheduler is made, and nobody has it."""
    rank_process.launch(2)
    rank_process._ready.clear()
    wait_until("they have ended", lambda: not started.left() and not rank_process._started)


def test_an_engine_takes_only_what_it_needs_of_another(started: Started) -> None:
    rank_process.launch(3)
    rank_process.launch(1)
    rank_process.reap()
    assert len(started.left()) == 1
    rank_process.launch(0)
    rank_process.reap()


class Told:
    """Who is told of a death."""

    def __init__(self) -> None:
        self.deaths = 0

    def note(self) -> None:
        self.deaths += 1


@pytest.mark.parametrize("handles_of_processes", [True, False])
def test_who_is_told_of_a_death(
    vllm_config: Any,  # noqa: F811
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    handles_of_processes: bool,
) -> None:
    """The engine whose process it was, and no other of this process; also where the system has no ``pidfd_open``."""
    monkeypatch.setattr(rank_process, "_POLL_S", 0.05)
    if not handles_of_processes:
        monkeypatch.delattr(os, "pidfd_open")
    first, second = Told(), Told()
    rank_process.launch(4, first.note)
    one = make_scheduler(vllm_config)
    rank_process.launch(4, second.note)
    other = make_scheduler(vllm_config)
    time.sleep(0.2)
    assert not first.deaths and not second.deaths
    one.ranks[-1].channel.process.kill()
    wait_until("it is told", lambda: first.deaths == 1)
    with pytest.raises(NanoCPError, match="has died"):
        one.schedule()
    one.shutdown()
    other.schedule()
    other.shutdown()
    time.sleep(0.2)
    assert (first.deaths, second.deaths) == (1, 0), "one that was told to end has not died"


def test_what_nobody_waits_for_fails(vllm_config: Any, started: Started) -> None:  # noqa: F811
    """An ending that cannot be sent, while no step comes whose answer could tell of it: the engine is told at once."""
    told = Told()
    rank_process.launch(4, told.note)
    scheduler = make_scheduler(vllm_config)
    no_such_client = 7
    scheduler.ranks[0].forward({no_such_client: [EngineCoreOutput("r", [], finish_reason=FinishReason.ABORT)]})
    wait_until("it is told", lambda: told.deaths == 1)
    with pytest.raises(NanoCPError, match="rank 0 has died"):
        scheduler.schedule()
    scheduler.shutdown()


@pytest.mark.parametrize("handles_of_processes", [True, False])
def test_a_process_ends_with_its_engine(monkeypatch: pytest.MonkeyPatch, handles_of_processes: bool) -> None:
    """Though another one has the engine's end of the pipe."""
    monkeypatch.setattr(orphans, "_POLL_S", 0.02)
    monkeypatch.setattr(orphans, "_GRACE_S", 0.02)
    if not handles_of_processes:
        monkeypatch.delattr(os, "pidfd_open")
    mine, theirs = os.pipe()
    engine = os.fork()
    if not engine:
        parent = os.getpid()
        if not os.fork():
            os.close(mine)
            orphans.watch(parent)
            time.sleep(2 * LIMIT_S)
            os.write(theirs, b"it lives")
        time.sleep(0.2)
        os._exit(0)
    os.close(theirs)
    assert os.waitpid(engine, 0)[1] == 0
    assert os.read(mine, 8) == b""
    os.close(mine)


def test_a_process_ends_with_its_engine_while_it_imports(tmp_path: Path) -> None:
    """As when a server is told to stop as it starts: seconds before there is a pipe to look at."""
    code = "import os, sys; from vllm_nanocp.sched.rank import rank_process as p; p.launch(1); "
    code += "print(p._ready[0].process.pid); sys.stdout.flush(); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, timeout=120)
    ended = time.monotonic()
    pid = int(done.stdout.split()[-1])
    wait_until("it has ended", lambda: not psutil.pid_exists(pid))
    print(f"after {time.monotonic() - ended:.1f} s")


REPORTER = """
import logging, os, signal

def register():
    import setproctitle, vllm.envs
    from vllm_nanocp.sched.rank.rank_server import RankServer

    def do_report(server):
        logging.getLogger("vllm.reporter").info("a line of the reporter")
        return dict(
            title=setproctitle.getproctitle(),
            cached=vllm.envs._is_envs_cache_enabled(),
            late=os.environ.get("VLLM_SET_LATE"),
            gone=os.environ.get("VLLM_GONE"),
            ignores=[signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)],
        )

    RankServer.do_report = do_report
"""


def install_reporter(folder: Path) -> None:
    """A plugin of vLLM's."""
    (folder / "reporter.py").write_text(REPORTER)
    (folder / "reporter-1.dist-info").mkdir()
    (folder / "reporter-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: reporter\nVersion: 1\n")
    (folder / "reporter-1.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nreporter = reporter:register\n"
    )


def test_a_process_is_prepared_as_those_of_vllm(
    vllm_config: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A fresh interpreter: plugins, environment, logs, title. And who signals all processes of a service, as Ctrl-C
    does, ends none of these, whenever it is."""
    install_reporter(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    log = tmp_path / "vllm.log"
    handler = {"class": "logging.FileHandler", "filename": str(log)}
    loggers = {"vllm": {"handlers": ["file"], "level": "INFO"}}
    (tmp_path / "log.json").write_text(json.dumps({"version": 1, "handlers": {"file": handler}, "loggers": loggers}))
    config = copy(vllm_config)
    config.logging_config = replace(config.logging_config, pylogging_config_file=str(tmp_path / "log.json"))
    monkeypatch.setenv("VLLM_GONE", "1")
    rank_process.launch(2)
    processes = [pipe.process for pipe in rank_process._ready]
    signals = (signal.SIGINT, signal.SIGTERM)
    for process in processes:
        for number in signals:
            os.kill(process.pid, number)
    monkeypatch.delenv("VLLM_GONE")
    monkeypatch.setenv("VLLM_SET_LATE", "1")
    shape = replace(Shape.draw(random.Random(1), 1), ranks=2, degree=2)
    monkeypatch.setattr(loopback, "in_use", True)
    scheduler = shape.scheduler(config, True)
    for process in processes:
        for number in signals:
            os.kill(process.pid, number)
    for number, rank in enumerate(scheduler.ranks):
        found = rank._call("report")
        assert found.pop("title").endswith(f"::RankScheduler_{number}")
        assert found == dict(cached=True, late="1", gone=None, ignores=[True, True])
    assert log.read_text().count("a line of the reporter") == 2
    scheduler.shutdown()
    assert [process.poll() for process in processes] == [0, 0]
    assert "Traceback" not in capfd.readouterr().err


class Interrupt:
    """Ctrl-C after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.old)


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_an_interrupt_in_the_middle_of_an_answer(
    vllm_config: Any,  # noqa: F811
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """No answer is taken for another's, and the engine ends at once, though a rank may say more than a pipe holds."""
    scheduler = make_scheduler(vllm_config)
    rank = scheduler.ranks[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    read, reads = rank.channel._read, []

    def read_some(at: int) -> int:
        reads.append(at)
        if len(reads) == 3:
            interrupt()
        count: int = read(at)
        return count

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        if when == "before":
            with Interrupt(0.2):
                rank._call("inspect", "dawdle", 0.5, 1 << 24)
        elif when == "within":
            patch.setattr(rank.channel, "_read", read_some)
            rank._call("inspect", "dawdle", 0.0, 1 << 24)
        else:  # it is read, and not taken in
            patch.setattr(rank, "_take", interrupt)
            rank._call("look")
    for again in range(2):
        with pytest.raises(NanoCPError, match="interrupted"):
            scheduler.schedule() if again else rank.refresh()
    begun = time.monotonic()
    scheduler.shutdown()
    assert time.monotonic() - begun < rank_process._GRACE_S
