# SPDX-License-Identifier: Apache-2.0
"""Ranks' schedulers in real processes, for worlds: forked from one that has imported all, for a start costs seconds.

All else is the product's: pipes, messages, ends. What a test reads inside a rank (``rank_insides``) it asks by one more
command of the server, ``inspect``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from vllm_nanocp.sched.rank import rank_process
from vllm_nanocp.sched.rank.rank_server import RankServer

from . import loopback

# Forks for each message: an environment, and a rank's ends of its pipes.
_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tests.unit import rank_forks
rank_forks.serve(int(sys.argv[2]))
"""
_MOST = 1 << 16  # bytes of a message
_pidfd_open = os.pidfd_open  # a test may take it from the product


class Fork:
    """A ``rank_process.Process`` that is another process's child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle: int | None = _pidfd_open(pid)

    def poll(self) -> int | None:
        """What it ended with is not known here."""
        if self._handle is not None and not select.select([self._handle], [], [], 0)[0]:
            return None
        self._close()
        return 0

    def wait(self, timeout: float | None = None) -> int:
        if self._handle is not None and not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a rank's scheduler process", timeout or 0.0)
        self._close()
        return 0

    def kill(self) -> None:
        if self._handle is not None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Forks:
    """The process that forks. ``start`` is as ``rank_process.start``.

    Args:
        vllm_config: of worlds. It makes a scheduler of it, which leaves all in memory that the making loads.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = json.dumps([folder for folder in sys.path if isinstance(folder, str)] + [os.getcwd()])
        command = [sys.executable, "-c", _CODE, path, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        with tempfile.NamedTemporaryFile() as file:
            file.write(cloudpickle.dumps(vllm_config))
            file.flush()
            self._end.send(file.name.encode())
            self._end.recv(_MOST)

    def start(self, theirs: Any) -> Fork:
        socket.send_fds(self._end, [json.dumps(dict(os.environ)).encode()], [end.fileno() for end in theirs])
        return Fork(int(self._end.recv(_MOST)))


# One for all tests; it ends with this process.
_forks: list[Forks] = []


@contextlib.contextmanager
def in_use(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the schedulers of all worlds in processes; none of them is left."""
    if not _forks:
        _forks.append(Forks(vllm_config))
    with monkeypatch.context() as patch:
        patch.setattr(loopback, "in_use", True)
        patch.setattr(rank_process, "start", _forks[0].start)
        yield
        assert not rank_process._started and not rank_process._ready


def serve(handle: int) -> None:
    """The process that forks, until the other end is closed."""
    from vllm.plugins import load_general_plugins
    from vllm.utils.gc_utils import freeze_gc_heap

    from vllm_nanocp.sched.rank import outlets  # noqa: F401

    from .world_shapes import Shape

    end = socket.socket(fileno=handle)
    vllm_config = pickle.loads(Path(end.recv(_MOST).decode()).read_bytes())
    Shape.draw(random.Random(0), 0).scheduler(vllm_config, True)
    load_general_plugins()
    freeze_gc_heap()
    end.send(b"ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        message, handles, _, _ = socket.recv_fds(end, _MOST, 2)
        if not message:
            return
        pid = os.fork()
        if pid:
            for handle in handles:
                os.close(handle)
            end.send(str(pid).encode())
            continue
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end.close()
            os.environ.clear()
            os.environ.update(json.loads(message))
            RankServer.do_inspect = inspect  # type: ignore[attr-defined]
            rank_process.run(*handles)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def inspect(server: RankServer, name: str, *args: Any) -> Any:
    """Call one of ``rank_insides`` in the rank's process."""
    from . import rank_insides

    return getattr(rank_insides, name)(server, *args)
