# SPDX-License-Identifier: Apache-2.0
"""Random HTTP requests, good and bad, and what two servers answered compared."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.engine.harness import prompt

KINDS = 512
TOLERANCE = 2e-3
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
WORDS = ("a b", "the", "ab", "q", "xy z", "no such", "e", "th", "K", "zz", "é", "<eos>")
# Differ from one run to the next, or say how many ranks there are, which is documented.
UNLIKE = {"id", "created", "created_at", "completed_at", "item_id", "request_id", "system_fingerprint", "call_id"}
JOINED = ("text", "content", "reasoning", "arguments")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
# What no field takes, or some do.
ODD: tuple[Any, ...] = (
    -1, 0, 1, 3, 0.5, 1e9, -2.5, "x", "", None, [], {}, [1], ["a"], True, False, 1 << 70, [[1, 2], [3]], {"a": 1},
    [None], [-1], [KINDS], "é\u0000", [[]], 10**4,
)  # fmt: skip
FIELDS = (
    "prompt", "max_tokens", "temperature", "top_p", "n", "logprobs", "echo", "stop", "seed", "stream",
    "stream_options", "presence_penalty", "frequency_penalty", "logit_bias", "best_of", "suffix", "user", "model",
    "top_k", "min_p", "repetition_penalty", "stop_token_ids", "min_tokens", "prompt_logprobs", "allowed_token_ids",
    "bad_words", "truncate_prompt_tokens", "priority", "cache_salt", "add_special_tokens", "response_format",
    "structured_outputs", "return_token_ids", "return_tokens_as_token_ids", "vllm_xargs", "kv_transfer_params",
    "request_id", "messages", "tools", "tool_choice", "top_logprobs", "max_completion_tokens", "ignore_eos",
    "detokenize", "skip_special_tokens", "use_beam_search", "length_penalty", "prompt_embeds", "documents",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "reasoning_effort", "unheard_of",
    "logits_processors", "include_stop_str_in_output", "spaces_between_special_tokens", "stream_interval",
    "thinking_token_budget", "repetition_detection", "mm_processor_kwargs", "include_reasoning",
)  # fmt: skip


@dataclass
class Call:
    method: str
    path: str
    body: Any = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Reply:
    status: int
    kind: str
    body: Any


class Caller:
    """Makes calls."""

    def __init__(self, seed: int, longest: int, model: str) -> None:
        self.rng, self.seed, self.longest, self.model = random.Random(seed), seed, longest, model
        self.serial = 0

    def chance(self, part: float) -> bool:
        return self.rng.random() < part

    def text(self, most: int) -> str:
        return " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(1, most)))

    def tokens(self) -> list[int]:
        self.serial += 1
        if self.chance(0.04):
            length = self.longest - self.rng.choice([-1, 0, 1, 4, 15, 16, 17])
        else:
            length = min(self.longest - 60, int(self.rng.paretovariate(0.8) * 40))
        return prompt(length, 1000 * self.seed + self.serial)

    def one(self) -> Call:
        made = self.rng.random()
        if made < 0.1:
            return self.other()
        body = self.completion() if made < 0.6 else self.chat() if made < 0.9 else self.response()
        path = COMPLETIONS if made < 0.6 else CHAT if made < 0.9 else RESPONSES
        if self.chance(0.3):
            for _ in range(self.rng.choice([1, 1, 2])):
                name = self.rng.choice(FIELDS)
                body[name] = self.rng.choice(ODD)
                if name in ("seed", "temperature", "top_p", "top_k"):  # without a seed anything may come
                    body["temperature" if name == "seed" else name] = self.rng.choice([0, 0.0, "x", -1, []])
        if self.chance(0.03):
            body.pop(self.rng.choice(list(body)))
            body.setdefault("temperature", 0.0)
        call = Call("POST", path, body)
        if self.chance(0.04):
            call.headers["X-data-parallel-rank"] = self.rng.choice(["0", "x", "0.5"])
        return call

    def completion(self) -> dict[str, Any]:
        rng = self.rng
        body = self.common()
        body["prompt"] = rng.choice([self.tokens, self.tokens, lambda: self.text(30)])()
        if self.chance(0.06):
            body["prompt"] = rng.choice([[self.text(5), self.text(9)], [prompt(5, 1), prompt(900, 2), prompt(7, 3)]])
        if self.chance(0.1):
            body["echo"] = True
        if self.chance(0.25):
            body["logprobs"] = rng.choice([0, 1, 5])
        if self.chance(0.05):
            body["return_tokens_as_token_ids"] = True
        if self.chance(0.05):
            body["max_tokens"] = rng.choice([0, 1])
        if self.chance(0.03):
            body |= dict(use_beam_search=True, n=2, max_tokens=4, temperature=0.0)
        return body

    def chat(self) -> dict[str, Any]:
        rng = self.rng
        body = self.common()
        body["messages"] = [
            {"role": role, "content": self.text(rng.choice([5, 200]))}
            for role in rng.choice([["user"], ["system", "user"], ["user", "assistant", "user"]])
        ]
        if self.chance(0.25):
            body |= dict(logprobs=True, top_logprobs=rng.choice([0, 1, 5]))
        if self.chance(0.1):
            body["max_completion_tokens"] = rng.choice([1, 9])
        if self.chance(0.05):
            body["echo"] = True
        if self.chance(0.05):
            body |= dict(add_generation_prompt=False, continue_final_message=True)
        if self.chance(0.05):
            tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
            body |= dict(tools=[tool], tool_choice=rng.choice(["auto", "none", "required", tool]))
        return body

    def response(self) -> dict[str, Any]:
        body = {"model": self.model, "input": self.text(40), "temperature": 0.0}
        body["max_output_tokens"] = self.rng.choice([1, 8, 20])
        if self.chance(0.2):
            body["instructions"] = self.text(5)
        if self.chance(0.2):
            body["stream"] = True
        if self.chance(0.2):
            body["store"] = self.chance(0.5)
        return body

    def common(self) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = dict(model=self.model, temperature=0.0, max_tokens=rng.choice([1, 4, 12, 12, 40]))
        body["seed"] = rng.randrange(1 << 30)
        if self.chance(0.3):
            body |= dict(temperature=0.9, top_p=rng.choice([1.0, 0.8]))
        if self.chance(0.4):
            body["stream"] = True
            if self.chance(0.6):
                body["stream_options"] = dict(include_usage=self.chance(0.8), continuous_usage_stats=self.chance(0.2))
        some: dict[str, Any] = {
            "n": rng.choice([2, 3]),
            "stop": rng.choice(["e", ["th", "q"]]),
            "ignore_eos": True,
            "min_tokens": 1,
            "logit_bias": {str(rng.randrange(3, KINDS)): rng.uniform(-9, 9)},
            "presence_penalty": 1.0,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.2,
            "stop_token_ids": rng.sample(range(KINDS), 30),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "prompt_logprobs": rng.choice([0, 2]),
            "bad_words": ["a", "th"],
            "allowed_token_ids": rng.sample(range(KINDS), 40),
            "top_k": 7,
            "min_p": 0.1,
            "truncate_prompt_tokens": rng.choice([-1, 5, 100]),
            "cache_salt": f"salt-{self.seed}",
            "priority": rng.choice([0, 1]),
            "user": "someone",
            "response_format": rng.choice(
                [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}]
            ),
            "structured_outputs": rng.choice([{"regex": "[ab]{4}"}, {"choice": ["yes", "no"]}]),
            "max_tokens": None,
            "vllm_xargs": {"something": 1},
            "stream_interval": 3,
        }
        for name, value in some.items():
            if self.chance(0.02 if name == "max_tokens" else 0.06):
                body[name] = value
        if "response_format" in body:
            body.pop("structured_outputs", None)
        return body

    def other(self) -> Call:
        rng, model = self.rng, self.model
        return rng.choice(
            [
                Call("POST", "/tokenize", {"model": model, "prompt": self.text(20), "return_token_strs": True}),
                Call("POST", "/tokenize", {"messages": [{"role": "user", "content": self.text(9)}]}),
                Call("POST", "/tokenize", {"model": "other", "prompt": "a"}),
                Call("POST", "/tokenize", {"model": model}),
                Call("POST", "/detokenize", {"model": model, "tokens": prompt(9, 3)}),
                Call("POST", "/detokenize", {"model": model, "tokens": [-1, 1 << 40]}),
                Call("GET", "/health"), Call("GET", "/v1/models"), Call("GET", "/version"), Call("GET", "/ping"),
                Call("POST", "/ping"), Call("GET", "/load"), Call("DELETE", COMPLETIONS), Call("GET", COMPLETIONS),
                Call("POST", "/v1/embeddings", {"model": model, "input": "a"}),
                Call("POST", "/pooling", {"model": model, "input": "a"}),
                Call("POST", "/score", {"model": model, "text_1": "a", "text_2": "b"}),
                Call("POST", "/v1/messages", {
                    "model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "temperature": 0,
                }),
                Call("GET", "/v1/responses/none"), Call("POST", "/v1/responses/none/cancel"),
                Call("POST", "/invocations", {"model": model, "prompt": "a", "max_tokens": 2, "temperature": 0}),
                Call("POST", "/inference/v1/generate", {"token_ids": prompt(20, 3), "sampling_params": {
                    "max_tokens": 3, "temperature": 0.0}}),
                Call("POST", "/v1/completions/render", {"model": model, "prompt": "a b"}),
                Call("POST", COMPLETIONS, content=b"{"), Call("POST", COMPLETIONS, content=b"[1]"),
                Call("POST", CHAT, content=b"\xff\xfe"), Call("POST", CHAT, content=b"null"),
                Call("POST", COMPLETIONS, {"model": model, "prompt": "a"}, headers={"content-type": "text/plain"}),
                Call("GET", "/v1/no/such"), Call("GET", "/server_info"), Call("POST", "/v1/audio/transcriptions"),
                Call("POST", CHAT, {"model": model, "messages": []}), Call("GET", "/is_sleeping"),
                Call("POST", "/v1/completions", {"model": "other", "prompt": "a"}),
            ]
        )  # fmt: skip


def asked(client: httpx.Client, call: Call) -> Reply:
    """What came: JSON, the events of a stream put together, or text."""
    try:
        return _asked(client, call)
    except httpx.TransportError:  # behind an error of its own a server closes a connection that is the next call's
        return _asked(client, call)


def _asked(client: httpx.Client, call: Call) -> Reply:
    headers = dict(call.headers)
    if call.content is not None:
        headers.setdefault("content-type", "application/json")
        response = client.request(call.method, call.path, content=call.content, headers=headers)
    elif call.body is not None:
        content = json.dumps(call.body).encode()
        headers.setdefault("content-type", "application/json")
        response = client.request(call.method, call.path, content=content, headers=headers)
    else:
        response = client.request(call.method, call.path, headers=headers)
    kind = response.headers.get("content-type", "").split(";")[0]
    if kind == "text/event-stream":
        return Reply(response.status_code, kind, together(response.text))
    try:
        return Reply(response.status_code, kind, response.json())
    except ValueError:
        return Reply(response.status_code, kind, response.text)


def together(text: str) -> dict[str, Any]:
    """Of a stream: texts, tokens and logprobs of each choice joined, and what else it told."""
    whole: dict[str, Any] = {"done": text.rstrip().endswith("data: [DONE]"), "events": set()}
    for line in text.splitlines():
        if line.startswith("event: "):
            whole["events"].add(line)
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "choices" not in event:
            if event.get("type", "error") in ("error", "response.completed") or "error" in event:
                whole.setdefault("other", []).append(event)
            continue
        whole["keys"] = sorted(set(whole.get("keys", ())) | set(event))
        if event.get("usage") is not None and not event["choices"]:
            whole["usage"] = event["usage"]
        for choice in event["choices"]:
            join(whole.setdefault(f"choice {choice['index']}", {}), choice)
    whole["events"] = sorted(whole["events"])
    return whole


def join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Texts and lists one behind the other; of the rest what is not null."""
    for name, value in part.items():
        if isinstance(value, dict):
            whole[name] = whole.get(name) or {}
            join(whole[name], value)
        elif name == "tool_calls" and value:
            calls = whole[name] = whole.get(name) or {}
            for call in value:
                join(calls.setdefault(str(call["index"]), {}), call)
        elif isinstance(value, list) or (isinstance(value, str) and name in JOINED):
            whole[name] = (whole.get(name) or type(value)()) + value
        elif value is not None or name not in whole:
            whole[name] = value


def differences(ours: Any, stocks: Any, at: str = "") -> list[str]:
    """Where two JSON values differ by more than rounding and what differs from run to run."""
    if isinstance(ours, dict) and isinstance(stocks, dict):
        found = [f"{at}: {sorted(set(ours) ^ set(stocks))} in one only"] if set(ours) != set(stocks) else []
        if at.endswith("top_logprobs") or (at.endswith("]") and "prompt_logprobs" in at):
            found = found if len(set(ours) ^ set(stocks)) > 2 else []
        for name in set(ours) & set(stocks) - UNLIKE:
            found += differences(ours[name], stocks[name], f"{at}.{name}")
        return found
    if isinstance(ours, list) and isinstance(stocks, list):
        if len(ours) != len(stocks):
            return [f"{at}: {len(ours)} not {len(stocks)} entries: {ours} {stocks}"]
        return [x for i, (a, b) in enumerate(zip(ours, stocks, strict=True)) for x in differences(a, b, f"{at}[{i}]")]
    if isinstance(ours, float) and isinstance(stocks, float) and abs(ours - stocks) <= TOLERANCE:
        return []
    if at.endswith(".rank") and isinstance(ours, int) and isinstance(stocks, int) and abs(ours - stocks) <= 2:
        return []
    if at.endswith(("cached_tokens", "bytes")) or ours == stocks:
        return []
    return [f"{at}: {ours!r} not {stocks!r}"]
