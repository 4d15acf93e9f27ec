# SPDX-License-Identifier: Apache-2.0
"""What ``soak.py`` sends: requests of a seed, and what came of each."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

VOCAB = range(3, 512)
STEMS = (200, 700, 1600, 2500)
OUTPUTS = (1, 8, 40, 120)
REQUEST_LIMIT_S = 600.0
# Bodies that no server may answer with 200, and none may die of.
REFUSED: tuple[dict[str, Any], ...] = (
    {"prompt": [5, 10**9]},
    {"prompt": [-1]},
    {"prompt": []},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "temperature": -1},
    {"prompt": [5] * 100_000},
)


@dataclass
class Job:
    """One request: when it is due (seconds from the start), and when its client leaves (tokens; None: never)."""

    number: int
    due: float
    body: dict[str, Any]
    leave_after: int | None = None
    refused: bool = False
    sampled: bool = False
    # What came of it.
    status: int | None = None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    error_code: int | None = None
    sent: float = 0.0
    first: float | None = None
    ended: float | None = None

    @property
    def lost(self) -> str | None:
        """Why this is not what the client had to get; None if it is."""
        if self.refused and self.ended is not None:
            # vLLM begins a stream before it looks at the tokens; then the refusal is an event of it.
            told = self.status == 400 or (self.error is not None and self.error_code == 400)
            return None if told else f"HTTP {self.status} for a request that makes no sense"
        if self.ended is None or self.error is not None:
            return self.error or "no end"
        if self.status != 200:
            return f"HTTP {self.status}"
        if self.leave_after is not None and len(self.tokens) < self.body["max_tokens"]:
            return None
        if len(self.tokens) != self.body["max_tokens"] or self.finish != "length":
            return f"{len(self.tokens)} of {self.body['max_tokens']} tokens, {self.finish}"
        return None


def give_priorities(jobs: list[Job], seed: int) -> None:
    """Random ones; of the same jobs without them nothing else changes."""
    rng = random.Random(seed)
    for job in jobs:
        job.body["priority"] = rng.choice([-5, 0, 0, 0, 3, 10])


def make_jobs(
    seed: int, count: int, seconds: float, max_length: int, sample: int, outputs: Sequence[int] = OUTPUTS
) -> list[Job]:
    """Requests over so many seconds: lengths mostly short with a long tail, a third on shared prefixes, bursts and
    pauses, seeded sampling, clients that leave, requests that make no sense. Every ``sample``-th is to be compared.
    ``outputs``: how many tokens they ask for.
    """
    rng = random.Random(seed)
    stems = [rng.choices(VOCAB, k=min(length, max_length // 2)) for length in STEMS]
    jobs = []
    dues = _arrivals(rng, count, seconds)
    for number, due in enumerate(dues):
        room = max_length - max(outputs)
        stem = rng.choice(stems) if rng.random() < 0.35 else []
        length = max(1, min(room - len(stem), int(rng.paretovariate(0.9) * 60)))
        tokens = [*stem, *rng.choices(VOCAB, k=length)]
        body: dict[str, Any] = dict(prompt=tokens, max_tokens=rng.choice(outputs), temperature=0, ignore_eos=True)
        if rng.random() < 0.25:
            body |= dict(temperature=0.8, seed=number, repetition_penalty=1.1)
        job = Job(number, due, body)
        draw = rng.random()
        if draw < 0.03:
            job.refused, job.body = True, {**rng.choice(REFUSED)}
        elif draw < 0.18:
            job.leave_after = rng.choice([0, 1, 4, 20])
        else:
            job.sampled = number % sample == 0
        jobs.append(job)
    return jobs


def _arrivals(rng: random.Random, count: int, seconds: float) -> list[float]:
    """Times at which requests come: some together, some after a pause, all within ``seconds``."""
    gaps = [rng.choice([0.0, 0.0, 0.0, 0.2, 1.0, 3.0]) for _ in range(count)]
    scale = seconds / (sum(gaps) or 1.0)
    now, dues = 0.0, []
    for gap in gaps:
        now += gap * scale
        dues.append(now)
    return dues


async def run_job(job: Job, session: aiohttp.ClientSession, url: str, model: str) -> None:
    """Stream the answer into the job; never raises for what the server does."""
    body = {"model": model, "stream": True, "return_token_ids": True, **job.body}
    job.sent = time.monotonic()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            job.status = answer.status
            if answer.status != 200:
                await answer.read()
                job.ended = time.monotonic()
                return
            if job.leave_after == 0:
                job.ended = time.monotonic()
                return
            async for line in answer.content:
                if _read(job, line):
                    break
                if job.leave_after is not None and len(job.tokens) >= job.leave_after:
                    break
            job.ended = time.monotonic()
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        job.error = repr(error)
        job.ended = time.monotonic()


def _read(job: Job, line: bytes) -> bool:
    """Take one line of a stream; whether it was the last."""
    if not line.startswith(b"data:"):
        return False
    text = line[5:].strip()
    if text == b"[DONE]":
        return True
    event = json.loads(text)
    if event.get("error"):
        job.error = f"in the stream: {json.dumps(event['error'])[:300]}"
        job.error_code = event["error"].get("code")
    for choice in event.get("choices", []):
        job.first = job.first or time.monotonic()
        job.tokens += choice["token_ids"] or []
        job.finish = choice["finish_reason"] or job.finish
    return False


async def run_jobs(jobs: list[Job], url: str, model: str, concurrency: int, until: float) -> None:
    """Send each when it is due, at most so many at a time; what is not sent at ``until`` (monotonic) is not sent."""
    start = time.monotonic()
    room = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    # A connection that a client left open would be used again, with the rest of the answer in it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def run(job: Job) -> None:
            try:
                await run_job(job, session, url, model)
            finally:
                room.release()

        tasks = []
        for job in jobs:
            await asyncio.sleep(max(0.0, start + job.due - time.monotonic()))
            await room.acquire()
            if time.monotonic() > until:
                room.release()
                break
            tasks.append(asyncio.create_task(run(job)))
        await asyncio.gather(*tasks)
