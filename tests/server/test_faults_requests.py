# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot be served, floods of those that can, and calls that fail: the server says so, and goes on."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.harness import prompt

from .clients import Client, running_clients
from .serving import ANSWER_LIMIT_S, COMPLETIONS, LONG, MAX_MODEL_LEN, RANK_TOKENS, Server, wait_for

pytestmark = pytest.mark.engine

VOCAB = 512


def check_answers(server: Server) -> None:
    """A request that takes more than one rank is answered in full: all blocks are there."""
    answer = server.post(COMPLETIONS, prompt=prompt(LONG, 1), max_tokens=4, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [5, -(2**63)],
        [5, -(2**70)],
        [5, VOCAB],
        [5, 2**31],
        [5, 2**64],
        [5, 1.5],
        [5, "x"],
        [5, None],
        [5, [6]],
        [[5], 6],
        [[5], [VOCAB]],
        [[5], [-1]],
        [5, {"token": 6}],
        [{"prompt": "a"}],
        5,
        True,
    ],
    ids=repr,
)
def test_token_ids_that_are_none(server: Server, tokens: Any) -> None:
    """Also as the last of a prompt that is sharded, where no rank sees the whole of it."""
    for value in (tokens, [*prompt(LONG, 2), *tokens] if isinstance(tokens, list) else tokens):
        # What httpx would not encode is sent as it is.
        content = json.dumps({"model": server.model, "prompt": value, "max_tokens": 4})
        answer = server.client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
    assert server.healthy()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stop_token_ids": ["x"]},
        {"prompt": "a", "allowed_token_ids": [VOCAB]},
        {"prompt": "a", "logit_bias": {"-1": 1.0}},
        {"prompt": "a", "seed": 2**65},
        {"prompt": "a", "truncate_prompt_tokens": -2},
        {"prompt": "a", "min_tokens": 5, "max_tokens": 1},
        {"prompt": "a", "priority": "first"},
        {"prompt": "a", "stream": "perhaps"},
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        {"prompt_embeds": "gASVAAAAAAAAAAA="},
    ],
    ids=lambda body: ",".join(key for key in body if key != "prompt"),
)
def test_parameters_that_make_no_sense(server: Server, body: dict[str, Any]) -> None:
    answer = server.post(COMPLETIONS, **body)
    assert answer.status_code == 400, answer.text
    assert server.healthy()


def test_a_flood_that_can_never_fit(server: Server) -> None:
    """Longer than the model, or than a rank and not to be sharded, beside one that is served: all are refused."""
    bodies: list[dict[str, Any]] = [
        dict(prompt=prompt(MAX_MODEL_LEN + 1 + i, i), max_tokens=1) if i % 2 else
        dict(prompt=prompt(RANK_TOKENS - 8, i), max_tokens=9 + i, prompt_logprobs=0)
        for i in range(60)
    ]  # fmt: skip
    client = Client(server, prompt(LONG, 3), 60)
    client.start()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: server.post(COMPLETIONS, **body), bodies))
    assert {answer.status_code for answer in answers} == {400}
    client.join(ANSWER_LIMIT_S)
    assert client.done and client.finished
    check_answers(server)


def test_a_flood_that_waits(server: Server) -> None:
    """Each needs more than a rank, together 20 times what all hold; nearly all leave while they wait or run."""
    clients = [Client(server, prompt(LONG - i, 40 + i), 60) for i in range(30)]
    for client in clients:
        client.start()
    wait_for("some wait", lambda: server.metrics()["vllm:num_requests_waiting"] > 20, 60)
    wait_for("one is decoding", lambda: any(client.texts for client in clients), 60)
    stay = [client for client in clients if client.texts][:1] + [client for client in clients if not client.texts][-1:]
    for client in clients:
        if client not in stay:
            client.leave()
    for client in stay:
        client.join(ANSWER_LIMIT_S)
        assert client.done and client.finished
    wait_for("nothing is held", server.idle, 60)
    check_answers(server)


def test_a_call_that_fails_on_all_workers(server: Server) -> None:
    """Its answers are not taken for those of the steps that follow. vLLM's developers' routes are on in this server."""
    streaming = Client(server, prompt(LONG, 5), 40)
    streaming.start()
    wait_for("it decodes", lambda: streaming.texts, 60)
    for _ in range(3):
        # Not by the client's connection, which the server closes after an error that it does not know.
        with server.connection() as other:
            answer = other.post("/collective_rpc", json={"method": "no_such_method"})
        assert answer.status_code >= 400, answer.text
    counters = server.client.post("/collective_rpc", json={"method": "nanocp_counters"}).json()["results"]
    assert len(counters) == 2 and all("sharded_steps" in str(counter) for counter in counters)
    streaming.join(ANSWER_LIMIT_S)
    assert streaming.done and streaming.finished
    check_answers(server)


def test_requests_beside_a_reset(server: Server) -> None:
    """The prefix cache is reset, with running requests, while requests come and go; each is answered in full."""
    stop = threading.Event()

    def reset() -> int:
        count = 0
        while not stop.wait(0.3):
            query = f"reset_running_requests={'true' if count % 2 else 'false'}"
            assert server.client.post(f"/reset_prefix_cache?{query}").status_code == 200
            count += 1
        return count

    with ThreadPoolExecutor(9) as pool:
        resets = pool.submit(reset)
        jobs = [
            pool.submit(server.post, COMPLETIONS, prompt=prompt(n, n), max_tokens=24, ignore_eos=True)
            for n in (LONG, 2000, 900, 40, 700, 60, 1500, 5)
        ]
        try:
            answers = [job.result(ANSWER_LIMIT_S) for job in jobs]
        finally:
            stop.set()
        assert resets.result(30) > 1
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [24] * len(answers)


@pytest.mark.parametrize(
    ("stop", "asked", "go_on"),
    [("/pause?mode=abort", "/is_paused", "/resume"), ("/sleep?level=0", "/is_sleeping", "/wake_up")],
    ids=["pause", "sleep"],
)
def test_a_pause_that_aborts(server: Server, stop: str, asked: str, go_on: str) -> None:
    """Clients are told, by whichever API server and rank; what comes meanwhile waits, and is answered afterwards."""
    clients = running_clients(server)
    assert server.client.post(stop).status_code == 200
    try:
        for client in clients:
            client.join(30)
            last = [choice for event in client.events for choice in event["choices"]][-1]
            assert client.done and client.error is None and last["finish_reason"] == "abort"
        assert server.client.get(asked).json() == {asked.removeprefix("/"): True}
        meanwhile = Client(server, prompt(LONG, 6), 4)
        meanwhile.start()
        meanwhile.join(1)
        assert meanwhile.is_alive() and not meanwhile.events
    finally:
        assert server.client.post(go_on).status_code == 200
    meanwhile.join(ANSWER_LIMIT_S)
    assert meanwhile.finished and server.client.get(asked).json() == {asked.removeprefix("/"): False}
    check_answers(server)
