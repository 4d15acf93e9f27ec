# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` starts as many API servers as stock does; all of them serve the one engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


def ports_of_clients(server: Server) -> dict[int, set[int]]:
    """The ports of those that each API server is connected to, by its process."""
    port = int(server.url.rsplit(":", 1)[1])
    found = {}
    for process in server.members():
        if "APIServer" in process.name():
            open_now = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
            found[process.pid] = {c.raddr.port for c in open_now if c.laddr.port == port}
    return found


@contextmanager
def connections(server: Server, each: int) -> Iterator[list[httpx.Client]]:
    """Clients that are connected: so many to each API server, in turn. Whichever wakes first takes a connection, so
    more are opened than are needed, until there are enough of each."""
    with ExitStack() as stack:

        def chosen() -> list[httpx.Client] | None:
            opened = {}
            for _ in range(2 * RANKS * each):
                client = stack.enter_context(server.connection())
                with client.stream("GET", "/health") as answer:
                    answer.read()
                    opened[answer.extensions["network_stream"].get_extra_info("client_addr")[1]] = client
            clients = [[opened[port] for port in ports & opened.keys()] for ports in ports_of_clients(server).values()]
            enough = len(clients) == RANKS and all(len(ours) >= each for ours in clients)
            return [ours[at] for at in range(each) for ours in clients] if enough else None

        yield wait_for(f"{each} clients are connected to each API server", chosen, 60)


def stream(server: Server, lengths: list[int], max_tokens: int, through: list[httpx.Client]) -> list[Client]:
    clients = [
        Client(server, prompt(length, 300 + at), max_tokens, http)
        for at, (length, http) in enumerate(zip(lengths, through, strict=True))
    ]
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
    with connections(server, len(lengths) // RANKS) as through:
        clients = stream(server, lengths, 24, through)
        for client in clients:
            client.join(ANSWER_LIMIT_S)
    for client, answer in zip(clients, alone, strict=True):
        assert client.done and client.finished and client.error is None
        assert "".join(client.texts) == answer["choices"][0]["text"]


def test_clients_of_all_api_servers_leave(server: Server) -> None:
    """While they wait, compute their prompts and decode: those that stay are answered, and nothing is held."""
    lengths = [LONG, 40, 700, LONG - 1, 60, 900, LONG - 2, 50, 1200, LONG - 3]
    with connections(server, len(lengths) // RANKS) as through:
        clients = stream(server, lengths, 200, through)
        wait_for("some decode", lambda: sum(bool(client.texts) for client in clients) >= 3, 60)
        stay = [*clients[4:6], clients[9]]  # of both
        for client in clients:
            if client not in stay:
                client.leave()
        for client in clients:
            client.join(ANSWER_LIMIT_S)
    assert all(client.done and client.finished for client in stay)


def test_each_api_server_checks_requests(server: Server) -> None:
    """By what the engine has told it that a rank holds."""
    body = dict(model=server.model, prompt=prompt(RANK_TOKENS - 8, 7), max_tokens=20, prompt_logprobs=0)
    with connections(server, 1) as clients:
        for client in clients:
            answer = client.post(COMPLETIONS, json=body)
            assert answer.status_code == 400 and f"one rank holds {RANK_TOKENS}" in answer.text


def test_metrics_are_of_all_api_servers(server: Server) -> None:
    """Whichever of them is asked, and whichever got the statistics of a step: perhaps a moment after another one has
    answered."""
    names = ("vllm:nanocp_request_degree_count", "vllm:request_success_total", "vllm:generation_tokens_total")
    lengths = [LONG, 40, 700, 60, 1500, 30, 900, 50]
    before = server.metrics()
    wanted = [len(lengths), len(lengths), 12 * len(lengths)]
    with connections(server, len(lengths) // RANKS) as through:
        for client in stream(server, lengths, 12, through):
            client.join(ANSWER_LIMIT_S)

    def growth(through: httpx.Client) -> list[float]:
        found = server.metrics(through)
        return [found[name] - before[name] for name in names]

    with connections(server, 1) as clients:
        for client in clients:
            wait_for(f"they grew by {wanted}", lambda through=client: growth(through) == wanted, 10)
        assert [growth(client) for client in clients] == [wanted] * RANKS
