# SPDX-License-Identifier: Apache-2.0
"""Several domains behind one OpenAI endpoint, with Ray Serve: see README.md.

A domain is one ``vllm serve --nanocp`` with its own ranks. ``Domain`` runs it, ``PrefixRouter`` picks one for each
request, ``Endpoint`` takes requests in and streams answers out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import ray
from prefixes import Prefixes, keys_of
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

Head = tuple[int, str]  # HTTP status, content type
_PARENT_DEATH_SIGNAL = 1


class Settings(BaseModel):
    """``args`` of the application in the YAML file."""

    model: str
    flags: list[str]
    start_limit_s: float = 1800.0


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """To the domain that has most of the prompt in its prefix cache, unless it is much busier than others.

    Knows the requests of one ``Endpoint``; each has a router of its own.
    """

    def initialize_state(self, slack: int = 8, capacity: int = 100_000) -> None:  # type: ignore[override]
        """``request_router_kwargs`` of the YAML file; see ``Prefixes``."""
        self.slack = slack
        self.prefixes = Prefixes(capacity)
        self.loads: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        # In no order: of equally good ones, not always the same.
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        replicas = {replica.replica_id.unique_id: replica for replica in shuffled}
        keys = _keys(pending_request)
        ranked = self.prefixes.rank(keys, {place: self.loads[place] for place in replicas}, self.slack)
        return [[replicas[place]] for place in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self.loads[replica_id.unique_id] += 1
        self.prefixes.record(_keys(pending_request), replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.loads[replica_id.unique_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        gone = set(self.loads) - {replica.replica_id.unique_id for replica in replicas}
        if gone:
            self.prefixes.forget(gone)
            for place in gone:
                del self.loads[place]


def _keys(pending: PendingRequest | None) -> Sequence[str]:
    return () if pending is None else pending.kwargs.get("keys", ())


@serve.deployment
class Domain:
    """One engine with all its ranks. It reserves devices itself, through the executor; this actor needs none."""

    def __init__(self, settings: Settings) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        if not env.get("CUDA_VISIBLE_DEVICES"):
            # Ray hides all devices from an actor that asks for none.
            env.pop("CUDA_VISIBLE_DEVICES", None)
        address = ["--host", "127.0.0.1", "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", settings.model, *settings.flags, *address],
            env=env,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False)
        deadline = time.monotonic() + settings.start_limit_s
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vllm serve {settings.model} did not start; its log is this actor's")
            time.sleep(1.0)

    async def check_health(self) -> None:
        """Ray Serve calls this, and replaces the domain when it raises."""
        (await self.client.get("/health", timeout=10)).raise_for_status()

    async def forward(
        self, method: str, path: str, body: bytes, content_type: str, *, keys: Sequence[str]
    ) -> AsyncIterator[Head | bytes]:
        """Answer one request: its head first, then its body as it comes. ``keys`` are for the router."""
        headers = {"content-type": content_type} if content_type else {}
        async with self.client.stream(method, path, content=body, headers=headers) as answer:
            yield answer.status_code, answer.headers.get("content-type", "")
            async for chunk in answer.aiter_raw():
                yield chunk

    def stop(self) -> None:
        """End the server with all that it started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.stop()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@serve.deployment
class Endpoint:
    """What clients see. Everything that a domain's server answers is passed on as it is."""

    def __init__(self, domains: DeploymentHandle) -> None:
        self.domains = domains.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        content_type = request.headers.get("content-type", "")
        answer: Any = self.domains.forward.remote(request.method, path, body, content_type, keys=keys_of(body))
        status, kind = await anext(answer)
        return StreamingResponse(_rest(answer), status, media_type=kind or None)


async def _rest(answer: Any) -> AsyncIterator[bytes]:
    """Closed when the client leaves, upon which the domain's server is left, too."""
    try:
        async for chunk in answer:
            yield chunk
    finally:
        answer.cancel()


def build(args: dict[str, Any]) -> serve.Application:
    """``import_path`` of the YAML file. Raises ``pydantic.ValidationError``: ``args`` there are not ``Settings``."""
    return Endpoint.bind(Domain.bind(Settings.model_validate(args)))  # type: ignore[attr-defined]
