# SPDX-License-Identifier: Apache-2.0
"""Ask a running `vllm serve` a question about a long text, and say how long the answer took.

    python examples/ask_long.py --tokens 70000

The text is `examples/text/constitution.txt`, as often as it takes to reach about so many tokens. Needs nothing but
Python.
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parent / "text" / "constitution.txt"
CHARACTERS_A_TOKEN = 4.6  # of this text, with the tokenizers of Qwen3 and SmolLM2 about
QUESTION = "How long is the President's term of office? Answer in one sentence."


def post(url: str, body: dict[str, Any]) -> Any:
    """The open response to a JSON request. Raises `urllib.error.HTTPError`."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=3600)


def ask(url: str, tokens: int, max_tokens: int) -> None:
    """Stream one answer, and print it with its times. Raises `HTTPError`; `SystemExit` for an error in the stream."""
    text = TEXT.read_text(encoding="utf-8").strip()
    wanted = int(tokens * CHARACTERS_A_TOKEN)
    copies = (text + "\n\n") * (wanted // len(text) + 1)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{copies[:wanted]}\n\n{QUESTION}"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage: dict[str, Any] = {}
    start, first = time.monotonic(), 0.0
    with post(f"{url}/v1/chat/completions", body) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:  # the server has said 200 by now
                raise SystemExit(f"\nthe answer ended with an error: {data}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.monotonic() - start
                    print(choice["delta"]["content"], end="", flush=True)
    took = time.monotonic() - start
    count = usage.get("prompt_tokens"), usage.get("completion_tokens")
    print(f"\n{count[0]} prompt tokens, {count[1]} new ones; the first after {first:.2f} s, all after {took:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=70000, help="of the prompt, about (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answer (default: %(default)s)")
    given = parser.parse_args()
    try:
        ask(given.url.rstrip("/"), given.tokens, given.max_tokens)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error}: {error.read().decode(errors='replace')}") from None
