# SPDX-License-Identifier: Apache-2.0
"""A server under load of which ``soak.py`` kills a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import psutil  # type: ignore[import-untyped]
from serving import Server
from soak_load import Job

LIMIT_S = 30.0


async def kill_under_load(
    server: Server, load: Coroutine[Any, Any, None], jobs: list[Job], victim: psutil.Process, after: float
) -> dict[str, Any]:
    """What became of clients and server once the process was killed, ``after`` seconds into the load: it must end with
    an error, and each client must have an end, within ``LIMIT_S``.
    """
    task = asyncio.create_task(load)
    await asyncio.sleep(after)
    asked = [job for job in jobs if job.sent and job.ended is None]
    killed = time.monotonic()
    victim.kill()
    seconds: dict[str, float | None] = {"server": None, "clients": None}
    while None in seconds.values() and time.monotonic() - killed < 2 * LIMIT_S:
        over = {"server": server.process.poll() is not None, "clients": all(job.ended is not None for job in asked)}
        for who, is_over in over.items():
            if is_over and seconds[who] is None:
                seconds[who] = round(time.monotonic() - killed, 2)
        await asyncio.sleep(0.05)
    task.cancel()
    code = server.process.poll()
    in_time = all(value is not None and value <= LIMIT_S for value in seconds.values())
    return {
        "pass": bool(asked) and in_time and code not in (None, 0),
        "limit_s": LIMIT_S,
        "exit_code": code,
        "seconds": seconds,
        "asked": len(asked),
        "told": sum(job.error is not None for job in asked),
    }
