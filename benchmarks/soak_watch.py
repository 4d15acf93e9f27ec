# SPDX-License-Identifier: Apache-2.0
"""What ``soak.py`` looks at from outside of a server: its processes, what they hold, what is left of them, its log."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from serving import Server

SHARED = Path("/dev/shm")
EVERY_S = 5.0
# What a client has just left may still be closed.
MORE_FILES = 8
# A reset that is refused is said by each rank; what is said of every request is a flood.
MOST_ALIKE = 60
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_LEVEL = re.compile(r"(WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d (.*)")
# What vLLM logs of a request that makes no sense, of which there are some.
_REFUSALS = {"VLLMValidationError", "RequestValidationError"}
_RAISED = re.compile(r"(?:\] |^)((?:\w+\.)*\w+(?:Error|Exception|Interrupt|Exit))(?::|$)", re.MULTILINE)
_VARYING = re.compile(r"\b(?:0x)?[\da-f]*\d[\da-f.-]*\b")


class Watch(threading.Thread):
    """Resident memory (MiB), files and threads of each process of the server, every few seconds."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._names: dict[int, tuple[psutil.Process, str]] = {}
        seen: collections.Counter[str] = collections.Counter()
        for process in server.members():
            label = name(process)
            seen[label] += 1
            self._names[process.pid] = (process, label if seen[label] == 1 else f"{label} {seen[label]}")
        self._done = threading.Event()
        self._start = time.monotonic()
        self.series: dict[str, list[tuple[float, float]]] = {label: [] for _, label in self._names.values()}
        self.files: list[dict[str, list[int]]] = []
        self.shared: set[str] = set()
        self.look_at_files()

    def look_at_files(self) -> None:
        """Note each process's files and threads, and names of shared memory."""
        found = {}
        for process, label in self._names.values():
            with contextlib.suppress(psutil.Error):
                found[label] = [process.num_fds(), process.num_threads()]
        self.files.append(found)
        self.shared |= shared_memory(process for process, _ in self._names.values())

    def run(self) -> None:
        while not self._done.wait(EVERY_S):
            now = time.monotonic() - self._start
            for process, label in self._names.values():
                try:
                    self.series[label].append((round(now, 1), process.memory_info().rss / 2**20))
                except psutil.Error:
                    self.series[label].append((round(now, 1), 0.0))
            self.look_at_files()

    def stop(self) -> None:
        """Look for the last time."""
        self._done.set()
        self.join()
        self.look_at_files()

    def find(self, part: str) -> psutil.Process:
        """The last process with this in its name.

        Raises:
            ValueError: there is none.
        """
        found = [process for process, label in self._names.values() if part in label]
        if not found:
            raise ValueError(f"no process has {part!r} in its name; there are {sorted(self.series)}")
        return found[-1]


def name(process: psutil.Process) -> str:
    """What vLLM calls it, or what it is."""
    title = process.name()
    if title.startswith("VLLM"):
        return str(title.removeprefix("VLLM::"))
    return "resource_tracker" if "resource_tracker" in " ".join(process.cmdline()) else "APIServer"


def shared_memory(processes: Iterable[psutil.Process]) -> set[str]:
    """Names under /dev/shm that the processes map or hold open."""
    names: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/([^\s/]+)", Path(f"/proc/{process.pid}/maps").read_text()))
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith(f"{SHARED}/"):
                        names.add(target.removeprefix(f"{SHARED}/").split(" ")[0])
    return names


def files(looks: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Whether each process ends with about as many files and threads as it had at most in the first third: some are
    made when they are needed first.

    Args:
        looks: the idle server at the start, then under load, and the idle server at the end.
    """
    first, last = looks[0], looks[-1]
    early = most(looks[: max(1, len(looks) // 3)])
    more = [now - was for label in last for was, now in zip(early[label], last[label], strict=True)]
    return {
        "pass": first.keys() == last.keys() and max(more) <= MORE_FILES,
        "start": first,
        "first_third": early,
        "most": most(looks),
        "end": last,
    }


def most(looks: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The largest number of files and of threads of each process."""
    labels = {label for look in looks for label in look}
    return {label: [max(look[label][i] for look in looks if label in look) for i in (0, 1)] for label in sorted(labels)}


def left(server: Server, shared: set[str], folder: Path, limit: float = 30.0) -> dict[str, Any]:
    """What is left of a server that has ended: processes (after so many seconds), names of shared memory, temporary
    files (only said: stock vLLM leaves sockets).

    Args:
        shared: names of its shared memory that were seen. Others use /dev/shm, too.
        folder: for its temporary files alone.
    """
    began = time.monotonic()
    seconds: dict[str, float] = {}  # when each was last seen
    while (members := server.members()) and (now := time.monotonic() - began) < limit:
        seen: collections.Counter[str] = collections.Counter()
        for process in members:
            with contextlib.suppress(psutil.Error):
                label = name(process)
                seen[label] += 1
                seconds[label if seen[label] == 1 else f"{label} {seen[label]}"] = round(now, 1)
        time.sleep(0.2)
    names = sorted(shared & set(os.listdir(SHARED)))
    processes = [name(process) for process in members]
    return {
        "pass": not processes and not names,
        "processes": processes,
        "last_seen_s": seconds,
        "shared_memory": names,
        "shared_memory_seen": len(shared),
        "temporary_files": kinds(folder),
    }


def kinds(folder: Path) -> dict[str, int]:
    """Names in a folder, with a star for what is random in them, and how many there are of each."""
    return dict(collections.Counter(re.sub(r"[\da-f]{8}[\da-f-]*", "*", path.name) for path in folder.iterdir()))


def log(text: str) -> dict[str, Any]:
    """Whether a server's log has no traceback but of refused requests, and no flood: warnings and errors, alike but for
    numbers, by count."""
    text = _COLOURS.sub("", text)
    counts: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if found := _LEVEL.search(line):
            counts[f"{found[1]} {_VARYING.sub('N', found[2])[:160]}"] += 1
    # The exception that a traceback ends with is the first one behind it.
    behind = text.split("Traceback (most recent call last)")[1:]
    raised = collections.Counter(found[1].split(".")[-1] if (found := _RAISED.search(one)) else "?" for one in behind)
    return {
        "pass": raised.keys() <= _REFUSALS and not any(count > MOST_ALIKE for count in counts.values()),
        "lines": text.count("\n"),
        "raised": dict(raised),
        "alike": dict(counts.most_common(20)),
    }
