# SPDX-License-Identifier: Apache-2.0
"""What clients of ``vllm serve --nanocp`` see: answers, refusals, metrics; also when they are many, rude or gone."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.harness import prompt

from .serving import ANSWER_LIMIT_S, BLOCK, COMPLETIONS, LONG, MAX_MODEL_LEN, RANK_TOKENS, RANKS, Server, wait_for

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"


def complete(server: Server, tokens: list[int], max_tokens: int = 16, **body: Any) -> dict[str, Any]:
    """One completion that runs to its end, with its tokens."""
    body = {"ignore_eos": True, "return_token_ids": True, "max_tokens": max_tokens, **body}
    response = server.post(COMPLETIONS, prompt=tokens, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(tokens)
    assert usage["completion_tokens"] == max_tokens * body.get("n", 1)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == max_tokens
    return answer


def only_tokens(answer: dict[str, Any]) -> list[int]:
    [choice] = answer["choices"]
    tokens: list[int] = choice["token_ids"]
    return tokens


def stream(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which ends as the API says."""
    body = {"model": server.model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    chunks = []
    with server.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        assert line.startswith("data: ")
        chunks.append(json.loads(line.removeprefix("data: ")))
    return chunks


def words(length: int) -> str:
    """Text of about as many tokens."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[(i * i + i // 7) % 26] for i in range(length))


def concurrently(jobs: list[Any]) -> list[Any]:
    """Results of calls made at the same time."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.result(ANSWER_LIMIT_S) for future in futures]


def held_by_rank(server: Server, request_id: str) -> list[int]:
    """KV tokens that each rank held of a sharded request, as the scheduler logs when it ends."""

    def found() -> Any:
        pattern = rf"nanocp: request {re.escape(request_id)}\S* finished: KV tokens per rank \[([\d, ]*)\]"
        return re.search(pattern, server.log.read_text(errors="replace"))

    match = wait_for(f"the log tells of {request_id}", found, 10)
    return [int(number) for number in match.group(1).split(",")]


# -- answers -------------------------------------------------------------------------------------------------------


def test_completion_streamed_and_not(server: Server) -> None:
    """A long prompt: the same tokens, text and usage both ways, and both ranks hold a part."""
    tokens = prompt(LONG, 1)
    whole = complete(server, tokens)
    held = held_by_rank(server, whole["id"])
    assert len(held) == RANKS and min(held) >= BLOCK and max(held) <= RANK_TOKENS
    assert LONG + 15 <= sum(held) <= LONG + 16, "the last token needs no KV"
    chunks = stream(
        server, COMPLETIONS, prompt=tokens, max_tokens=16, ignore_eos=True, return_token_ids=True, logprobs=1
    )
    usage = chunks.pop()["usage"]
    assert usage.items() <= whole["usage"].items()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == only_tokens(whole)
    # A server that is slower than its engine sends several tokens at once.
    assert len([choice for choice in choices if choice["text"]]) > 1, "it comes in parts"
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


def test_chat_streamed_and_not(server: Server) -> None:
    for length in (10, LONG - 100):
        body: dict[str, Any] = dict(messages=[{"role": "user", "content": words(length)}], max_tokens=12)
        whole = server.post(CHAT, **body, ignore_eos=True).json()
        assert whole["usage"]["prompt_tokens"] > length and whole["usage"]["completion_tokens"] == 12
        if whole["usage"]["prompt_tokens"] > RANK_TOKENS:
            assert min(held_by_rank(server, whole["id"])) >= BLOCK
        message = whole["choices"][0]["message"]
        assert message["role"] == "assistant" and message["content"]
        chunks = stream(server, CHAT, **body, ignore_eos=True)
        assert chunks.pop()["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert whole["usage"]["prompt_tokens"] > RANK_TOKENS, "the last was a long one"


def test_long_beside_short(server: Server) -> None:
    """A long request and short ones at the same time: each gets the tokens that it gets alone."""
    prompts = [prompt(LONG, 2), *(prompt(5 + 37 * i, 20 + i) for i in range(6))]
    together = concurrently([lambda tokens=tokens: complete(server, tokens, 24) for tokens in prompts])
    for tokens, answer in zip(prompts, together, strict=True):
        assert only_tokens(complete(server, tokens, 24)) == only_tokens(answer)


def test_the_prompt_decides(server: Server) -> None:
    """Also the part of it that another rank holds: so that equal tokens above mean something."""
    tokens = prompt(LONG, 3)
    changed = [*tokens]
    changed[40:60] = prompt(20, 4)
    assert only_tokens(complete(server, tokens)) != only_tokens(complete(server, changed))


@pytest.mark.parametrize("length", [20, 1500])
def test_two_choices(server: Server, length: int) -> None:
    tokens = prompt(length, 5)
    # vLLM refuses two greedy choices; the likeliest token of one is the same.
    answer = complete(server, tokens, n=2, temperature=1.0, top_k=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    alone = only_tokens(complete(server, tokens))
    assert [choice["token_ids"] for choice in answer["choices"]] == [alone, alone]
    differing = complete(server, tokens, n=2, temperature=1.0)["choices"]
    assert differing[0]["token_ids"] != differing[1]["token_ids"]


def test_up_to_the_model_length(server: Server) -> None:
    """A request may take all of the model's positions, and ends there."""
    tokens = prompt(MAX_MODEL_LEN - 8, 6)
    eight = only_tokens(complete(server, tokens, 8))
    cut = server.post(COMPLETIONS, prompt=tokens, max_tokens=100, ignore_eos=True, return_token_ids=True).json()
    assert only_tokens(cut) == eight and cut["usage"]["total_tokens"] == MAX_MODEL_LEN
    chat = server.post(CHAT, messages=[{"role": "user", "content": words(4000)}], ignore_eos=True).json()
    assert chat["usage"]["total_tokens"] == MAX_MODEL_LEN and chat["choices"][0]["finish_reason"] == "length"


# -- refusals ------------------------------------------------------------------------------------------------------


def test_longer_than_the_model(server: Server) -> None:
    response = server.post(COMPLETIONS, prompt=prompt(5000, 7), max_tokens=1)
    assert response.status_code == 400
    assert "5000" in response.text and str(MAX_MODEL_LEN) in response.text


def test_prompt_logprobs_that_no_rank_can_hold(server: Server) -> None:
    """They are computed where the whole prompt is, so such a request is not spread."""
    response = server.post(COMPLETIONS, prompt=prompt(3300, 8), max_tokens=4, prompt_logprobs=1)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "BadRequestError"
    for part in ("3304", "prompt 3300", "output 4", str(RANK_TOKENS), "prompt logprobs"):
        assert part in error["message"]
    # It is the prompt logprobs that are refused, not the length.
    complete(server, prompt(3300, 8), 4)


def test_prompt_logprobs_that_one_rank_holds(server: Server) -> None:
    answer = complete(server, prompt(1000, 9), 4, prompt_logprobs=1)
    logprobs = answer["choices"][0]["prompt_logprobs"]
    assert len(logprobs) == 1000 and logprobs[0] is None and all(logprobs[1:])


def test_prompt_logprobs_up_to_the_last_block(server: Server) -> None:
    """The bound is exact: what is let in is answered, alone on a rank to its last block."""
    tokens = prompt(RANK_TOKENS - 16, 10)
    complete(server, tokens, 16, prompt_logprobs=1)
    response = server.post(COMPLETIONS, prompt=tokens, max_tokens=17, prompt_logprobs=1)
    assert response.status_code == 400 and str(RANK_TOKENS + 1) in response.text


def test_open_ended_output_is_cut_to_a_rank(server: Server) -> None:
    """A chat without ``max_tokens`` asks for all the model has; where one rank must hold it, it gets what that has."""
    content = words(RANK_TOKENS - 100)
    answer = server.post(
        CHAT, messages=[{"role": "user", "content": content}], prompt_logprobs=1, ignore_eos=True
    ).json()
    assert answer["usage"]["prompt_tokens"] < RANK_TOKENS
    assert answer["usage"]["total_tokens"] == RANK_TOKENS and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"prompt": [5, 512]}),
        (400, {"prompt": [5, 10**9]}),
        (400, {"prompt": [-1]}),
        (400, {"prompt": []}),
        (400, {"prompt": {"text": "a"}}),
        (400, {}),
        (400, {"prompt": "a", "max_tokens": -1}),
        (400, {"prompt": "a", "max_tokens": 0}),
        (400, {"prompt": "a", "max_tokens": "many"}),
        (400, {"prompt": "a", "temperature": -1}),
        (400, {"prompt": "a", "top_p": 7}),
        (400, {"prompt": "a", "n": 0}),
        (400, {"prompt": "a", "logprobs": 10000}),
        (400, {"prompt": "a", "prompt_logprobs": -5}),
        (404, {"prompt": "a", "model": "another"}),
    ],
)
def test_requests_that_make_no_sense(server: Server, status: int, body: dict[str, Any]) -> None:
    response = server.post(COMPLETIONS, **body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert server.healthy()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b'{"prompt": "a", "max_tokens": NaN}', b"\xff\xfe"])
def test_bodies_that_are_no_request(server: Server, content: bytes) -> None:
    response = server.client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert server.healthy()


def test_answers_after_refusals(server: Server) -> None:
    before = only_tokens(complete(server, prompt(LONG, 11)))
    refused = server.post(COMPLETIONS, prompt=[*prompt(LONG, 11)[:-1], 512], max_tokens=16)
    assert refused.status_code == 400
    assert only_tokens(complete(server, prompt(LONG, 11))) == before


# -- clients that leave, and clients that are many -----------------------------------------------------------------


def request_bytes(server: Server, body: dict[str, Any]) -> bytes:
    content = json.dumps({"model": server.model, "temperature": 0, "ignore_eos": True, **body}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {server.client.base_url.host}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def events(sock: socket.socket, count: int) -> None:
    """Read until so many events of a stream have come."""
    seen = b""
    while seen.count(b"data: {") < count:
        part = sock.recv(65536)
        assert part, "the server closed the connection"
        seen += part


@pytest.mark.parametrize(
    ("length", "streamed", "after"),
    [(LONG, True, 3), (20, True, 3), (LONG, True, 0), (LONG, False, 0)],
    ids=["long-decoding", "short-decoding", "long-prefilling", "long-not-streamed"],
)
def test_a_client_leaves(server: Server, length: int, streamed: bool, after: int) -> None:
    """It asks for 500 tokens and closes the socket: its request ends, and all its blocks are free at once."""
    before = server.metrics()
    port = server.client.base_url.port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_LIMIT_S) as sock:
        sock.sendall(request_bytes(server, dict(prompt=prompt(length, 12 + after), max_tokens=500, stream=streamed)))
        if after:
            events(sock, after)
        wait_for("the request runs", lambda: server.metrics()["vllm:num_requests_running"] > 0, 20, 0.02)
    wait_for("the request is gone and its KV free", server.idle, 20, 0.2)
    made = server.metrics()["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert made < 450, "it ended because its client left"
    # Both ranks have room for a request that needs more than half of all there is.
    complete(server, prompt(LONG, 13), 4)


def test_clients_leave_together(server: Server) -> None:
    """Some of many leave while others wait for room; those that stay are answered."""

    def leave(seed: int) -> None:
        port = server.client.base_url.port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_LIMIT_S) as sock:
            sock.sendall(request_bytes(server, dict(prompt=prompt(2000, seed), max_tokens=300, stream=True)))
            time.sleep(0.1 * (seed % 5))

    stay = [prompt(1200, 60 + i) for i in range(3)]
    answers = concurrently(
        [
            *(lambda tokens=tokens: complete(server, tokens) for tokens in stay),
            *(lambda seed=seed: leave(seed) for seed in range(70, 78)),
        ]
    )
    for tokens, answer in zip(stay, answers[: len(stay)], strict=True):
        assert only_tokens(answer) == only_tokens(complete(server, tokens))


def test_a_burst(server: Server) -> None:
    """40 requests of mixed length, five times what the ranks hold: all are answered, with the tokens they get alone."""
    lengths = [LONG, 2900, 1300, *(7 + (i * 53) % 700 for i in range(37))]
    prompts = [prompt(length, 100 + i) for i, length in enumerate(lengths)]
    before = server.metrics()
    answers = concurrently([lambda tokens=tokens: complete(server, tokens, 8) for tokens in prompts])
    after = server.metrics()
    assert len(answers) == 40
    assert after["vllm:request_success_total"] - before["vllm:request_success_total"] == 40
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == sum(lengths)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 40 * 8
    for index in (0, 1, 2, 9, 21, 39):
        assert only_tokens(complete(server, prompts[index], 8)) == only_tokens(answers[index])


# -- what operators see --------------------------------------------------------------------------------------------


def test_metrics_of_a_sharded_request(server: Server) -> None:
    """It counts once, not once a rank."""
    before = server.metrics()
    answer = complete(server, prompt(LONG, 14), 16)
    assert min(held_by_rank(server, answer["id"])) >= BLOCK
    after = server.metrics()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew("vllm:prompt_tokens_total") == LONG
    assert grew("vllm:generation_tokens_total") == 16
    assert grew("vllm:iteration_tokens_total_sum") == LONG + 16
    assert grew("vllm:request_success_total") == 1
    assert grew("vllm:num_preemptions_total") == 0
    assert grew("vllm:prefix_cache_queries_total") == LONG and grew("vllm:prefix_cache_hits_total") == 0
    assert grew("vllm:request_prompt_tokens_sum") == grew("vllm:request_prefill_kv_computed_tokens_sum") == LONG
    assert grew("vllm:request_generation_tokens_sum") == 16
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
    ):
        assert grew(f"vllm:{name}_count") == 1, name
        assert 0 <= grew(f"vllm:{name}_sum") < ANSWER_LIMIT_S, name
    assert grew("vllm:request_prefill_time_seconds_sum") > 0
    assert grew("vllm:inter_token_latency_seconds_count") == 15


def test_metrics_of_a_cached_prefix(server: Server) -> None:
    tokens = prompt(LONG, 15)
    first = only_tokens(complete(server, tokens))
    before = server.metrics()
    assert only_tokens(complete(server, tokens)) == first
    after = server.metrics()
    cached = after["vllm:prompt_tokens_cached_total"] - before["vllm:prompt_tokens_cached_total"]
    assert cached == (LONG - 1) // BLOCK * BLOCK
    assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] == cached
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == LONG


def test_metrics_while_running(server: Server) -> None:
    """A sharded request is one that runs, and its KV is seen whichever ranks hold it."""
    with server.client.stream(
        "POST",
        COMPLETIONS,
        json=dict(model=server.model, prompt=prompt(LONG, 16), max_tokens=500, stream=True, ignore_eos=True),
    ) as response:
        lines = response.iter_lines()  # kept: the connection closes with it
        assert next(lines).startswith("data: ")
        with server.connection() as other:
            text = wait_for(
                "the engine tells of the request",
                lambda: (t := other.get("/metrics").text) and re.search(r"requests_running\{[^}]*\} 1\.0", t) and t,
                10,
            )
    usage = re.search(r"kv_cache_usage_perc\{[^}]*\} (\S+)", text)
    assert usage is not None
    held = float(usage.group(1)) * RANKS * RANK_TOKENS
    assert LONG - BLOCK <= held <= LONG + 500 + 2 * RANKS * BLOCK


def test_health_models_version(server: Server) -> None:
    import vllm

    assert server.client.get("/health").status_code == 200
    models = server.client.get("/v1/models").json()
    assert models["object"] == "list"
    [model] = models["data"]
    assert model["id"] == server.model and model["max_model_len"] == MAX_MODEL_LEN
    assert server.client.get("/version").json() == {"version": vllm.__version__}
    assert server.client.get("/no/such/path").status_code == 404


def test_tokenize(server: Server) -> None:
    from transformers import AutoTokenizer

    text = words(50)
    found = server.post("/tokenize", prompt=text).json()
    expected = AutoTokenizer.from_pretrained(server.model).encode(text)
    assert found["tokens"] == expected and found["count"] == len(expected)
    assert found["max_model_len"] == MAX_MODEL_LEN
    assert server.post("/detokenize", tokens=expected).json()["prompt"] == text
