# SPDX-License-Identifier: Apache-2.0
"""Processes that run the ranks' schedulers.

They are children of the engine's process, each at the end of a pipe, and end when it is closed: when the engine has
ended, however. One that dies ends the engine. They are started before the workers load the model, so that what they
import is there when they are needed.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, Literal

from vllm.logger import init_logger

from ..errors import NanoCPError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from .rank_server import RankServer
    from .ranks import RankSpec
    from .remote_rank import Channel

logger = init_logger("vllm.nanocp.scheduler")

# Called, from a thread, when a process has died; the executor's.
on_death: Callable[[], None] | None = None

# Started, and not in use yet.
_ready: list[Pipe] = []
# Not fork: the engine has threads, and torch's of its own.
START_METHOD: Literal["spawn", "fork"] = "spawn"
# Sentinels of processes that were told to end.
_closed: set[int] = set()
# How long a process has to end by itself.
_GRACE_S = 2.0


class Pipe:
    """The engine's end of a pipe to a process. A ``Channel``."""

    def __init__(self, process: BaseProcess, end: Connection) -> None:
        self.process = process
        self._end = end

    def send(self, message: bytes) -> None:
        try:
            self._end.send_bytes(message)
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> bytes:
        try:
            return self._end.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._gone() from error

    def _gone(self) -> NanoCPError:
        self.process.join(_GRACE_S)
        return NanoCPError(f"nanocp: {self.process.name} has died (exit code {self.process.exitcode})")

    def close(self) -> None:
        """Let the process end."""
        _end(self.process, self._end)

    def reuse(self) -> None:
        """Let the process drop its scheduler, and wait to make another."""
        self.send(b"")
        _ready.append(self)


def launch(count: int) -> None:
    """Start processes that ``open_channels`` will use. They import vLLM and wait."""
    context = multiprocessing.get_context(START_METHOD)
    for _ in range(count - len(_ready)):
        mine, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs,), name="a rank's scheduler process", daemon=True)
        process.start()
        theirs.close()
        _ready.append(Pipe(process, mine))


def open_channels(specs: Sequence[RankSpec]) -> list[Channel]:
    """Have a scheduler made from each, in a process of its own.

    Raises:
        NanoCPError: a process has died.
    """
    launch(len(specs))
    pipes = [_ready.pop(0) for _ in specs]
    for pipe, spec in zip(pipes, specs, strict=True):
        pipe.process.name = f"the scheduler process of rank {spec.rank}"
        pipe.send(pickle.dumps(spec, -1))
    for pipe in pipes:
        answer = pickle.loads(pipe.receive())
        if answer is not None:
            raise NanoCPError(f"nanocp: {pipe.process.name} could not start: {answer}")
    watcher = threading.Thread(target=_watch, args=([p.process for p in pipes],), daemon=True, name="RankProcesses")
    watcher.start()
    for pipe in pipes:
        weakref.finalize(pipe, _end, pipe.process, pipe._end)
    return list(pipes)


def _end(process: BaseProcess, end: Connection) -> None:
    _closed.add(process.sentinel)
    end.close()
    process.join(_GRACE_S)
    if process.is_alive():
        process.kill()


def _watch(processes: list[BaseProcess]) -> None:
    """Report the first that ends though nobody told it to."""
    connection.wait([process.sentinel for process in processes])
    failed = [p for p in processes if p.exitcode is not None and p.sentinel not in _closed]
    if failed and on_death is not None:
        logger.error("nanocp: %s has died (exit code %s); the engine ends", failed[0].name, failed[0].exitcode)
        on_death()


def run(end: Connection) -> None:
    """The process: make a scheduler, then obey until the pipe is closed."""
    # Ctrl-C reaches all processes of the terminal; who ends first is the engine's matter.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        while _serve(end):
            pass
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def _serve(end: Connection) -> bool:
    """One scheduler's life; says whether another one is to come."""
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.utils.system_utils import decorate_logs, set_process_title

    spec = pickle.loads(end.recv_bytes())
    set_process_title("RankScheduler", str(spec.rank))
    decorate_logs(f"RankScheduler_{spec.rank}")
    try:
        server = make_server(spec)
        freeze_gc_heap()
    except Exception as error:
        end.send_bytes(pickle.dumps(repr(error)))
        return False
    end.send_bytes(pickle.dumps(None))
    try:
        while message := end.recv_bytes():
            for frame in server.obey(message):
                end.send_bytes(frame)
            server.after()
    finally:
        server.close()
    return True


def make_server(spec: RankSpec) -> RankServer:
    """A rank's scheduler and all that it needs in a process of its own."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.structured_output import StructuredOutputManager

    from .outlets import Outlets
    from .rank_server import RankServer

    hasher = None
    if spec.vllm_config.cache_config.enable_prefix_caching:
        hash_fn = get_hash_fn_by_name(spec.vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        hasher = get_request_block_hasher(spec.hash_block_size or spec.block_size, hash_fn)
    scheduler = spec.make(StructuredOutputManager(spec.vllm_config))
    return RankServer(scheduler, hasher, Outlets())
