# SPDX-License-Identifier: Apache-2.0
"""Clients that stream while something happens to their server, and what a server may leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from tests.engine.harness import prompt

from .serving import LONG, Server, wait_for

# What the client of a request that is cut off may see of it, at most.
MANY = 560


class Client(threading.Thread):
    """Streams one answer and keeps what came: events, an error, and when it ended.

    Args:
        http: has a connection already; closed at the end. Without, the client connects when it starts.
    """

    def __init__(self, server: Server, tokens: list[int], max_tokens: int, http: httpx.Client | None = None) -> None:
        super().__init__(daemon=True)
        self.server = server
        self._http = http
        self.body = dict(model=server.model, prompt=tokens, max_tokens=max_tokens, ignore_eos=True, stream=True)
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.error: Exception | None = None
        self._sock: socket.socket | None = None

    def leave(self) -> None:
        """Close the connection, also while nothing comes."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            with (
                contextlib.closing(self._http or self.server.connection()) as client,
                client.stream("POST", "/v1/completions", json=self.body) as response,
            ):
                self._sock = response.extensions["network_stream"].get_extra_info("socket")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line:
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, ValueError) as error:
            self.error = error

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for event in list(self.events) for choice in event.get("choices", [])]

    @property
    def finished(self) -> bool:
        """Whether it was told that its answer is complete."""
        reasons = [choice["finish_reason"] for event in self.events for choice in event.get("choices", [])]
        return any(reason in ("length", "stop") for reason in reasons)

    @property
    def told(self) -> bool:
        """Whether it can tell that its answer is not complete: an error event, or a connection that broke."""
        return self.error is not None or any("error" in event for event in self.events)


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Names under /dev/shm that the processes map or hold open. Others use that folder too."""
    names: set[str] = set()
    for process in processes:
        proc = Path("/proc") / str(process.pid)
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/([^\s/]+)", (proc / "maps").read_text()))
        with contextlib.suppress(OSError):
            for link in (proc / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("/dev/shm/"):
                        names.add(target.removeprefix("/dev/shm/").split(" ")[0])
    return names


def left_of(names: set[str]) -> set[str]:
    return names & set(os.listdir("/dev/shm"))


def queues_of(names: set[str]) -> set[str]:
    """Those of message queues between the engine and its workers."""
    return {name for name in names if name.startswith("psm_")}


def running_clients(server: Server) -> list[Client]:
    """A long request, sharded, and two short ones, all of them decoding."""
    clients = [Client(server, prompt(length, length), MANY) for length in (LONG, 40, 700)]
    for client in clients:
        client.start()
    wait_for("all are decoding", lambda: all(len(client.texts) >= 3 for client in clients), 60)
    assert not any(client.done for client in clients)
    return clients


def check_clients_ended(clients: list[Client], limit: float) -> None:
    end = time.monotonic() + limit
    for client in clients:
        client.join(max(0.0, end - time.monotonic()))
        assert not client.is_alive(), f"a client still waits after {limit:.0f} s"
        assert len(client.texts) < MANY and not client.finished
