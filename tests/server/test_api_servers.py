# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` starts as many API servers as stock does; all of them serve the one engine."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from .clients import Client, prompt
from .serving import ANSWER_LIMIT_S, COMPLETIONS, LONG, RANK_TOKENS, RANKS, Server, wait_for
from .test_refusals import parse_serve

pytestmark = pytest.mark.engine


def started(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many API servers ``vllm serve`` starts, by its own rules; or what it refuses."""
    from vllm.entrypoints.cli import serve

    counts: list[int] = []
    monkeypatch.setattr(serve, "run_multi_api_server", lambda args: counts.append(args.api_server_count))
    monkeypatch.setattr(serve, "run_headless", lambda args: counts.append(0))
    monkeypatch.setattr(serve, "run_server", lambda args: counts.append(1))
    monkeypatch.setattr(serve.uvloop, "run", lambda coroutine: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    args = parse_serve(flags)
    serve.ServeSubcommand().validate(args)
    serve.ServeSubcommand.cmd(args)
    [count] = counts
    return count


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("flags", [[], ["--api-server-count=1"], ["--api-server-count=3"], ["-asc", "8"]], ids=str)
@pytest.mark.parametrize(
    "asked", [["--nanocp"], ["--additional-config", '{"nanocp": {}}']], ids=["flag", "additional-config"]
)
def test_as_many_as_ranks(ranks: int, flags: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--data-parallel-size", str(ranks), "--enable-expert-parallel", *flags]
    stock = started(common, monkeypatch)
    assert started([*common, *asked], monkeypatch) == stock


def test_ranks_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(["--nanocp", "--nanocp-config", '{"ranks": 4}'], monkeypatch) == 4


def connected(server: Server) -> dict[int, int]:
    """How many clients each API server talks to, by its process."""
    counts = {}
    for process in server.members():
        if "APIServer" in process.name():
            ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
            counts[process.pid] = ports.count(int(server.url.rsplit(":", 1)[1]))
    return counts


def stream(server: Server, lengths: list[int], max_tokens: int) -> list[Client]:
    clients = [Client(server, prompt(length, 300 + at), max_tokens) for at, length in enumerate(lengths)]
    for client in clients:
        client.body["temperature"] = 0
        client.start()
    return clients


def test_answers_come_to_who_has_asked(server: Server) -> None:
    """Short requests and sharded ones, from clients of all API servers; each gets what it gets alone."""
    lengths = [40, LONG, 700, 60, 1500, 30, 900, 50]
    alone = [
        server.post(COMPLETIONS, prompt=prompt(length, 300 + at), max_tokens=24, ignore_eos=True).json()
        for at, length in enumerate(lengths)
    ]
    clients = stream(server, lengths, 24)
    most: dict[int, int] = {}
    while any(client.is_alive() for client in clients):
        for pid, count in connected(server).items():
            most[pid] = max(most.get(pid, 0), count)
    assert len(most) == RANKS and all(count >= 2 for count in most.values()), f"the clients were at {most}"
    for client, answer in zip(clients, alone, strict=True):
        client.join(ANSWER_LIMIT_S)
        assert client.done and client.finished and client.error is None
        assert "".join(client.texts) == answer["choices"][0]["text"]


def test_clients_of_all_api_servers_leave(server: Server) -> None:
    """While they wait, compute their prompts and decode: those that stay are answered, and nothing is held."""
    clients = stream(server, [LONG, 40, 700, LONG - 1, 60, 900, LONG - 2, 50, 1200, LONG - 3], 200)
    wait_for("some decode", lambda: sum(bool(client.texts) for client in clients) >= 3, 60)
    assert all(count for count in connected(server).values())
    stay = clients[1::4]
    for client in clients:
        if client not in stay:
            client.leave()
    for client in stay:
        client.join(ANSWER_LIMIT_S)
        assert client.done and client.finished


def test_each_api_server_checks_requests(server: Server) -> None:
    """By what the engine has told it that a rank holds."""
    body = dict(model=server.model, prompt=prompt(RANK_TOKENS - 8, 7), max_tokens=20, prompt_logprobs=0)
    with ExitStack() as stack:
        before = connected(server)
        for _ in range(6):
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=ANSWER_LIMIT_S, trust_env=False))
            answer = client.post(COMPLETIONS, json=body)
            assert answer.status_code == 400 and f"one rank holds {RANK_TOKENS}" in answer.text
        now = connected(server)
    assert len(now) == RANKS and all(now[pid] > before[pid] for pid in now), (before, now)


def test_metrics_are_of_all_api_servers(server: Server) -> None:
    """Whichever of them is asked, and whichever got the statistics of a step."""
    names = ("vllm:nanocp_request_degree_count", "vllm:request_success_total", "vllm:generation_tokens_total")
    before = server.metrics()
    clients = stream(server, [LONG, 40, 700, 60, 1500, 30, 900, 50], 12)
    for client in clients:
        client.join(ANSWER_LIMIT_S)
    after = [server.metrics() for _ in range(6)]
    for found in after:
        grew = [found[name] - before[name] for name in names]
        assert grew == [len(clients), len(clients), 12 * len(clients)]
