# SPDX-License-Identifier: Apache-2.0
"""Streamed completions of random tokens, and the times of their chunks."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class StreamError(RuntimeError):
    """A stream was refused, failed, or was not complete in time."""


@dataclass
class Stream:
    """One streamed completion of random token ids. ``ready`` is set once ``ready_after`` chunks came, or it failed."""

    name: str
    body: bytes
    max_tokens: int
    ready_after: int = 1
    status: int | None = None
    error: str | None = None
    tokens: int = 0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        lines: list[bytes] = []
        self.sent = time.perf_counter()
        try:
            async with session.post(url, data=self.body, headers={"Content-Type": "application/json"}) as answer:
                self.status = answer.status
                if answer.status != 200:
                    self.error = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                    return
                async for line in answer.content:
                    if line.startswith(b"data:"):
                        self.times.append(time.perf_counter())
                        lines.append(line)
                        if len(lines) == self.ready_after:
                            self.ready.set()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.error = repr(error)
        finally:
            self._read(lines)
            self.ready.set()

    def _read(self, lines: list[bytes]) -> None:
        """Parse afterwards, not while the gaps are taken; keep the times of chunks with tokens."""
        times, done = [], False
        for moment, line in zip(self.times, lines, strict=True):
            text = line[5:].strip()
            if text == b"[DONE]":
                done = True
                continue
            chunk = json.loads(text)
            if chunk.get("error"):
                self.error = self.error or f"in the stream: {json.dumps(chunk['error'])[:300]}"
            elif chunk.get("choices"):
                times.append(moment)
            elif chunk.get("usage"):
                self.tokens = chunk["usage"]["completion_tokens"]
        self.times = times
        if self.error is None and (not done or self.tokens != self.max_tokens):
            self.error = f"ended after {len(times)} chunks and {self.tokens} tokens of {self.max_tokens}"

    def gaps(self, skip: int) -> list[tuple[float, float]]:
        """Start and end of each gap between chunks, the first ``skip`` left out."""
        return list(zip(self.times, self.times[1:], strict=False))[skip:]

    def raw(self, origin: float) -> dict[str, Any]:
        """Milliseconds, of ``sent`` since the scenario's start. Fewer chunks than tokens: the server joined some."""
        return {
            "name": self.name,
            "status": self.status,
            "error": self.error,
            "tokens": self.tokens,
            "chunks": len(self.times),
            "sent_ms": round(1e3 * (self.sent - origin), 3),
            "ttft_ms": round(1e3 * (self.times[0] - self.sent), 3) if self.times else None,
            "gaps_ms": [round(1e3 * (end - start), 3) for start, end in self.gaps(0)],
        }


def make_stream(
    name: str,
    number: int,
    prompt: int,
    tokens: int,
    model: str,
    vocab: int,
    seed: str,
    ready_after: int = 1,
    compute: bool = False,
) -> Stream:
    """A stream with the same prompt for the same seed and number, made into bytes before any clock runs.

    With ``compute`` its prompt is computed even where others' are taken as there.
    """
    low, high = min(300, vocab // 2), min(150000, vocab - 1)
    ids = random.Random(f"{seed} {name} {number}").choices(range(low, high + 1), k=prompt)
    body = dict(model=model, prompt=ids, max_tokens=tokens, temperature=0, ignore_eos=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    if compute:
        body["vllm_xargs"] = {"compute_prompt": 1}
    return Stream(name, json.dumps(body).encode(), tokens, ready_after)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Of numbers in ascending order, the one that a fraction ``q`` of them is below."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def post(url: str, body: dict[str, Any]) -> None:
    """POST, for what answers with nothing; raises ``StreamError`` when refused."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        if answer.status != 200:
            raise StreamError(f"{url}: HTTP {answer.status}: {(await answer.text())[:300]}")


async def _watch_clock(late: list[float]) -> None:
    """How late this process wakes: others on its cores delay it, and then the gaps are not the server's."""
    while True:
        due = time.perf_counter() + 0.01
        await asyncio.sleep(0.01)
        late.append(time.perf_counter() - due)


async def play(
    url: str, phases: Sequence[Sequence[Stream]], stagger: float, limit: float, meanwhile: Any = None
) -> float:
    """Start the phases' streams, each phase once those of the one before are ready; return when all ended.

    Streams of a phase that are ``long`` start ``stagger`` seconds apart, so that a balancer can see the first before
    it places the second. ``meanwhile``, if given, is called and awaited once all have started. Returns by how many
    seconds this client was late at most, so that its delays are not taken for the server's. Raises ``StreamError`` when
    a stream failed or time ran out.
    """
    streams = [stream for phase in phases for stream in phase]
    timeout = aiohttp.ClientTimeout(total=limit)
    connector = aiohttp.TCPConnector(limit=0)  # each stream has a connection of its own
    late = [0.0]
    tasks = [asyncio.create_task(_watch_clock(late))]
    try:
        async with asyncio.timeout(limit), aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for phase in phases:
                for i, stream in enumerate(phase):
                    if i and stream.name == "long":
                        await asyncio.sleep(stagger)
                    tasks.append(asyncio.create_task(stream.run(session, f"{url}/v1/completions")))
                for stream in phase:
                    await stream.ready.wait()
                    if stream.error:
                        raise StreamError(f"{stream.name}: {stream.error}")
            if meanwhile is not None:
                await meanwhile()
            await asyncio.gather(*tasks[1:])
    except TimeoutError:
        raise StreamError(f"not complete after {limit:.0f} s") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    failed = [f"{stream.name}: {stream.error}" for stream in streams if stream.error]
    if failed:
        raise StreamError("; ".join(failed[:3]))
    return max(late)
