# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` for tests: started in a process group of its own, watched, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
FORKED = [sys.executable, "-m", "tests.server.forked_serve"]
START_LIMIT_S = 240.0
ANSWER_LIMIT_S = 120.0
HEALTH_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0
KILL_LIMIT_S = 10.0
IDLE_LIMIT_S = 30.0
BLOCK = 32
# Behind those of Ray's workers, before those that Linux gives for port 0.
PORTS = range(20000, 29000)
RANKS = 2
MAX_MODEL_LEN = 4096
# vLLM keeps one block of each rank for itself: a rank holds less than a request may have.
RANK_BLOCKS = 90
RANK_TOKENS = (RANK_BLOCKS - 1) * BLOCK
# More than a rank holds: such a request is answered only if its KV is on several.
LONG = 3500
COMPLETIONS = "/v1/completions"
# Whether servers have their ranks' schedulers in processes, where tests do not say.
SETTINGS = '{"segment_size": 512, "scheduler_processes": true}'
if os.environ.get("NANOCP_OTHER_FORM", "0") != "1":
    SETTINGS = '{"segment_size": 512}'
FLAGS = [
    "--data-parallel-size", str(RANKS), "--enable-expert-parallel",
    "--nanocp", "--nanocp-config", SETTINGS,
    "--enforce-eager", "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", str(BLOCK),
    "--num-gpu-blocks-override", str(RANK_BLOCKS), "--max-num-batched-tokens", "512",
]  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody has now, and that nobody gets who asks the system for any: a server takes seconds to come
    to its own, and meanwhile its engine, or Ray, may ask for many."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of {PORTS} is free")


def wait_for(what: str, done: Callable[[], Any], limit: float, pause: float = 0.1) -> Any:
    """The first true result of ``done``; fails when there is none in time."""
    end = time.monotonic() + limit
    while not (result := done()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit:.0f} s: {what}")
        time.sleep(pause)
    return result


def group_members(group: int) -> list[psutil.Process]:
    """The processes of a group or session that still run. Workers are of the session even if of another group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            ours = group in (os.getpgid(process.pid), os.getsid(process.pid))
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_resource_tracker(process: psutil.Process) -> bool:
    """Whether it is Python's, which removes the names of shared memory when all that have registered some are gone."""
    with contextlib.suppress(psutil.Error):
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    return False


class Server:
    """A running ``vllm serve``. ``close`` it.

    Args:
        env: added to this process's environment.
        wait: until it is ready; without, it may still start, or fail to.
        spawn: its processes as vLLM on CPU does, not forked, which takes half the time.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        flags: list[str] = FLAGS,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        spawn: bool = False,
    ) -> None:
        self.model = model
        self.log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        # What the scheduler tells of a sharded request is part of what is tested. And a server that closes a connection
        # when it has been idle for 5 seconds may do so just as the next request is sent.
        ours = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
        environment = {**os.environ, **ours, **(env or {})}
        if not spawn and not any(flag.startswith("--api-server-count") for flag in flags):
            # vLLM sets it for several API servers, which is too late where prometheus_client is imported already.
            folder = log.with_suffix(".metrics")
            folder.mkdir()
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        command = [*(VLLM if spawn else FORKED), "serve", model, *flags, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env=environment,
            )
        self.client = self.connection()
        if not wait:
            return
        try:
            wait_for("the server is ready", self._ready, START_LIMIT_S, 0.5)
        except BaseException:
            self.close()
            raise

    def connection(self) -> httpx.Client:
        """A client that connects with its first request."""
        return httpx.Client(base_url=self.url, timeout=ANSWER_LIMIT_S, trust_env=False)

    def _ready(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.tail()}"
        return self.healthy()

    def healthy(self) -> bool:
        try:
            return self.client.get("/health", timeout=HEALTH_LIMIT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Ask with the model's name and greedy decoding, unless told otherwise."""
        return self.client.post(path, json={"model": self.model, "temperature": 0, **body})

    def metrics(self, client: httpx.Client | None = None) -> dict[str, float]:
        """vLLM's metrics by name, summed over their labels; by another client, perhaps of another API server."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families((client or self.client).get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def idle(self) -> bool:
        """Nobody runs or waits, and no KV block is held."""
        now = self.metrics()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        # Several API servers export none of them before the first request.
        return all(now.get(name, 0) == 0 for name in names)

    def members(self) -> list[psutil.Process]:
        return group_members(self.process.pid)

    def workers(self) -> list[psutil.Process]:
        """The ranks' worker processes, by their titles."""
        return [p for p in self.members() if "Worker" in " ".join(p.cmdline()) or "Worker" in p.name()]

    def terminate(self, limit: float = STOP_LIMIT_S) -> int:
        """SIGTERM to the server's process; its exit code."""
        self.process.terminate()
        return self.process.wait(limit)

    def close(self) -> None:
        """End the server, politely first, then all that is left of its group."""
        self.client.close()
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()

    def kill(self, limit: float = KILL_LIMIT_S) -> None:
        """SIGKILL to all members. Resource trackers have ``limit`` to end by themselves, after the others."""
        end = time.monotonic() + limit
        while (members := self.members()) and time.monotonic() < end:
            _kill([process for process in members if not is_resource_tracker(process)])
            time.sleep(0.05)
        _kill(self.members())
        self.process.wait(limit)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


@contextlib.contextmanager
def serving(model: str, log: Path, flags: list[str] = FLAGS, *args: Any, **kwargs: Any) -> Iterator[Server]:
    """A server for the body of the ``with``; arguments as of ``Server``."""
    server = Server(model, log, flags, *args, **kwargs)
    try:
        yield server
    finally:
        server.close()
