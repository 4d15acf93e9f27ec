# SPDX-License-Identifier: Apache-2.0
"""Processes that run the ranks' schedulers.

They are children of the engine's process, each at the end of two pipes, one each way (a socket serves both, but takes
half as long again for a message). They end when the engine closes these, or soon after the engine's process has ended,
however it did (``orphans.py``). One that dies ends the engine. They are started before the workers load the model, so
that what they import is there when they are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import Pipe as make_pipe
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

import cloudpickle
from vllm.logger import init_logger
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

from ...errors import NanoCPError

if TYPE_CHECKING:
    from .rank_server import RankServer
    from .rank_spec import RankSpec
    from .remote_rank import Channel

logger = init_logger("vllm.nanocp.scheduler")

# What ``Connection`` puts before a message; the second one if the first is -1.
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_LONGEST = 0x7FFFFFFF
# How long a process has to end by itself.
_GRACE_S = 2.0
# How often it is looked whether a process lives, where the system cannot tell of its end.
_POLL_S = 0.5
# A fresh interpreter: neither the engine's threads are copied, nor is a user's script imported anew. Ctrl-C reaches all
# processes of the terminal, and who stops a service may signal all of them: who ends first is the engine's matter.
_CODE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from vllm_nanocp.sched.rank import orphans
orphans.watch(int(sys.argv[4]))
from vllm_nanocp.sched.rank import rank_process
rank_process.run(int(sys.argv[2]), int(sys.argv[3]))
"""


# What is read from, and what is written to.
Ends = tuple[Connection, Connection]


class Process(Protocol):
    """A process that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Pipe:
    """The engine's ends of the pipes to a process. A ``Channel``."""

    def __init__(self, process: Process, ends: Ends) -> None:
        self.process = process
        self.name = "a rank's scheduler process"
        self.closed = False
        self._ends = ends
        self._reads, self._writes = (end.fileno() for end in ends)
        self._buffer = memoryview(bytearray(1 << 16))

    def send(self, message: bytes) -> None:
        """As ``Connection.send_bytes`` does, in one call of the system however long the message is."""
        try:
            if len(message) > _LONGEST:
                self._ends[1].send_bytes(message)
                return
            frame = _LENGTH.pack(len(message)) + message
            sent = os.write(self._writes, frame)
            while sent < len(frame):
                sent += os.write(self._writes, frame[sent:])
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> memoryview:
        """As ``Connection.recv_bytes`` does, which reads a message's length first and then copies what it reads: here
        one call of the system mostly does. Nothing comes behind an answer before the next question."""
        try:
            have = 0
            while have < _LENGTH.size:
                have += self._read(have)
            (length,) = _LENGTH.unpack_from(self._buffer)
            start = _LENGTH.size
            if length == -1:  # too long for that
                while have < start + _LONG.size:
                    have += self._read(have)
                (length,) = _LONG.unpack_from(self._buffer, start)
                start += _LONG.size
            if start + length > len(self._buffer):
                self._buffer = memoryview(bytearray(self._buffer[:have]) + bytes(start + length - have))
            while have < start + length:
                have += self._read(have)
        except (EOFError, OSError) as error:
            raise self._gone() from error
        return self._buffer[start : start + length]

    def _read(self, at: int) -> int:
        count = os.readv(self._reads, [self._buffer[at:]])
        if not count:
            raise EOFError
        return count

    def _gone(self) -> NanoCPError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_S)
        return NanoCPError(f"nanocp: {self.name} has died (exit code {self.process.poll()})")

    def close(self) -> None:
        """Let the process end; ``reap`` waits for it."""
        self.closed = True
        with contextlib.suppress(OSError):  # a process that was forked meanwhile may hold this end, too
            self._ends[1].send_bytes(b"")
        self._reads = self._writes = -1  # the numbers may be others' soon
        _close(self._ends)


def make_pipes() -> tuple[Ends, Ends]:
    """Two pipes: one side's ends of them, and the other's."""
    (mine, their_out), (theirs, my_out) = make_pipe(duplex=False), make_pipe(duplex=False)
    return (mine, my_out), (theirs, their_out)


def _close(ends: Ends) -> None:
    for end in ends:
        end.close()


# Processes with these ends of their pipes, until they have ended; guarded by the lock.
_started: list[tuple[Process, Ends]] = []
_lock = threading.Lock()
# Started, and not in use yet.
_ready: list[Pipe] = []
# To be called, from a thread, when a process has died that is put in use from now on.
_on_death: weakref.WeakMethod[Callable[[], None]] | None = None


def start(theirs: Ends) -> Process:
    """Start a process at the other ends of pipes."""
    handles = [end.fileno() for end in theirs]
    path = json.dumps([folder for folder in sys.path if isinstance(folder, str)])
    command = [sys.executable, "-c", _CODE, path, *map(str, handles), str(os.getpid())]
    # It inherits what this thread blocks, until it ignores it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return subprocess.Popen(command, pass_fds=handles, stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def launch(count: int, on_death: Callable[[], None] | None = None) -> None:
    """Have just so many processes ready that ``open_channels`` will use. They import vLLM and wait.

    Args:
        count: of processes; what an engine has left that failed to start is taken or ended.
        on_death: a method; called, from a thread, when one of them has died though nobody told it to.
    """
    global _on_death
    _on_death = None if on_death is None else weakref.WeakMethod(on_death)
    _discard(count)
    while len(_ready) < count:
        mine, theirs = make_pipes()
        try:
            pipe = Pipe(start(theirs), mine)
        finally:
            _close(theirs)
        with _lock:
            _started.append((pipe.process, mine))
        # Who forgets it instead of closing it has failed to start: let go of the process, too.
        weakref.finalize(pipe, _let_go, mine).atexit = False
        _ready.append(pipe)


def discard() -> None:
    """End those that no engine uses: one has failed to start."""
    _discard(0)
    reap()


def _discard(keep: int) -> None:
    for pipe in [pipe for pipe in _ready if pipe.process.poll() is not None] + _ready[keep:]:
        if pipe in _ready:
            _ready.remove(pipe)
            pipe.close()


def _let_go(ends: Ends) -> None:
    if not ends[0].closed:
        _close(ends)
        threading.Thread(target=reap, daemon=True, name="RankProcesses").start()


def open_channels(specs: Sequence[RankSpec]) -> list[Channel]:
    """Have a scheduler made from each, in a process of its own.

    Raises:
        NanoCPError: a process has died, or cannot make it; then all are ended.
    """
    if len(_ready) < len(specs):
        launch(len(specs))
    pipes = [_ready.pop(0) for _ in specs]
    try:
        _make_schedulers(pipes, specs)
    except BaseException:
        for pipe in pipes:
            pipe.close()
        reap()
        raise
    threading.Thread(
        target=_watch, args=(list(map(weakref.ref, pipes)), _on_death), daemon=True, name="RankProcesses"
    ).start()
    return list(pipes)


def _make_schedulers(pipes: Sequence[Pipe], specs: Sequence[RankSpec]) -> None:
    # As vLLM's own processes get it: classes of models' code and of a user's script by value.
    maybe_register_config_serialize_by_value()
    # What has been set since the processes were started counts for them, too.
    environment = dict(os.environ)
    for pipe, spec in zip(pipes, specs, strict=True):
        pipe.name = f"the scheduler process of rank {spec.rank}"
        pipe.send(pickle.dumps((environment, cloudpickle.dumps(spec))))
    for pipe in pipes:
        answer = pickle.loads(pipe.receive())
        if answer is not None:
            raise NanoCPError(f"nanocp: {pipe.name} could not start: {answer}")


def reap() -> None:
    """Wait for all whose pipes are closed, together and not for long."""
    deadline = time.monotonic() + _GRACE_S
    with _lock:
        ending = [one for one in _started if one[1][0].closed]
        _started[:] = [one for one in _started if one not in ending]
    for process, _ in ending:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def _watch(pipes: Sequence[weakref.ref[Pipe]], on_death: Callable[[], Callable[[], None] | None] | None) -> None:
    """Report the first that ends though nobody told it to.

    Args:
        pipes: of the processes.
        on_death: what to call then, or a reference to it.
    """
    wait_for_an_end([pipe.process for ref in pipes if (pipe := ref()) is not None])
    left = [pipe for ref in pipes if (pipe := ref()) is not None and not pipe.closed]
    dead = [pipe for pipe in left if pipe.process.poll() is not None]
    report = None if on_death is None else on_death()
    if dead and report is not None:
        logger.error("nanocp: %s has died (exit code %s); the engine ends", dead[0].name, dead[0].process.poll())
        report()


def wait_for_an_end(processes: Sequence[Process]) -> None:
    """Until one of these children has ended."""
    handles: list[int] = []
    try:
        for process in processes:
            handles.append(os.pidfd_open(process.pid))
        connection.wait(handles)
    except (AttributeError, OSError):  # an old kernel, or a container that forbids it; or one has ended
        while all(process.poll() is None for process in processes):
            time.sleep(_POLL_S)
    finally:
        for handle in handles:
            os.close(handle)


def run(reads: int, writes: int) -> None:
    """The process: make a scheduler, then obey until the pipe is closed.

    Args:
        reads: handle of its end of the pipe from the engine.
        writes: of that to the engine.
    """
    from vllm.utils.system_utils import decorate_logs, set_process_title

    ends = Connection(reads, writable=False), Connection(writes, readable=False)
    set_process_title("RankScheduler")
    decorate_logs("RankScheduler")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(*ends)


def _serve(questions: Connection, answers: Connection) -> None:
    """A scheduler's life, prepared as vLLM's own processes are: plugins, environment, logs, title."""
    from vllm.envs import enable_envs_cache
    from vllm.logger import configure_logging_if_needed
    from vllm.plugins import load_general_plugins
    from vllm.utils.gc_utils import freeze_gc_heap, maybe_attach_gc_debug_callback
    from vllm.utils.system_utils import decorate_logs, set_process_title

    load_general_plugins()
    message = questions.recv_bytes()
    if not message:
        return
    try:
        environment, packed = pickle.loads(message)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        spec = pickle.loads(packed)
        configure_logging_if_needed(spec.vllm_config.logging_config)
        set_process_title("RankScheduler", str(spec.rank))
        decorate_logs(f"RankScheduler_{spec.rank}")
        server = make_server(spec)
        freeze_gc_heap()
        maybe_attach_gc_debug_callback()
        enable_envs_cache()
    except Exception as error:
        answers.send_bytes(pickle.dumps(repr(error)))
        return
    answers.send_bytes(pickle.dumps(None))
    try:
        while message := questions.recv_bytes():
            answer = server.obey(message)
            if answer is not None:
                answers.send_bytes(answer)
            server.after()
    finally:
        server.close()


def make_server(spec: RankSpec) -> RankServer:
    """A rank's scheduler and all that it needs in a process of its own."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    from .grammars import RankGrammars
    from .outlets import Outlets
    from .rank_server import RankServer

    hasher = None
    if spec.vllm_config.cache_config.enable_prefix_caching:
        hash_fn = get_hash_fn_by_name(spec.vllm_config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        hasher = get_request_block_hasher(spec.hash_block_size or spec.block_size, hash_fn)
    scheduler = spec.make(RankGrammars(spec.vllm_config))
    return RankServer(scheduler, hasher, Outlets())
