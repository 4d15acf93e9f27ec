# SPDX-License-Identifier: Apache-2.0
"""Serve a real Mixture-of-Experts model with ``--nanocp`` and show what that does (``make demo``).

Two ranks serve four short chats and a question about a long text at once, then a second question about the same
text. Printed are the answers, the time to the first token, and how many KV tokens of each long request each rank held.
Then stock vLLM, with one rank and without the plugin, gets the same requests, and the tokens are compared.

Exit code 0: the answers are right, the long requests' KV was spread, and every token is the same. 1: not so, or
something failed.
"""

import argparse
import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_moe import DEFAULT_MODEL_DIR, make_moe

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(DEFAULT_MODEL_DIR)
TEXT = ROOT / "examples" / "text" / "constitution.txt"
LOG_DIR = ROOT / ".model" / "logs"

# Eager mode: compiling would cost each server longer than it takes to answer.
SERVE_FLAGS = ("--dtype", "float32", "--max-model-len", "8192", "--enforce-eager")
# The default segment suits requests of 100,000 tokens; with this one the demo's 6,300 tokens are worth a second rank.
RANKS = 2
NANOCP_CONFIG = '{"segment_size": 4096}'
NANOCP_FLAGS = (
    "--data-parallel-size", str(RANKS), "--enable-expert-parallel", "--nanocp", "--nanocp-config", NANOCP_CONFIG
)  # fmt: skip
# Stock vLLM is to be stock: of all plugins only the one that lets the `vllm` command find its metadata on CPU.
STOCK_ENV = {"VLLM_PLUGINS": "nanocp_metadata_alias"}
CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # By default every rank takes all cores, and threads that spin for each other make a token take seconds.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // RANKS)),
}

START_LIMIT_S = 600
ANSWER_LIMIT_S = 600
STOP_LIMIT_S = 20
PROGRESS_EVERY_S = 5
MAX_TOKENS = 48

HELD_LINE = re.compile(r"nanocp: request (\S+) finished: KV tokens per rank (\[[^\]]*\])")

_started = time.monotonic()


def say(text: str) -> None:
    """Print one line with the seconds since the start."""
    print(f"[demo {time.monotonic() - _started:5.1f}s] {text}", flush=True)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Question:
    """A chat of one user message, and a part of its right answer. One about a text is long: it is to be spread."""

    name: str
    question: str
    expect: str
    text: str = ""

    @property
    def long(self) -> bool:
        """Whether several ranks should hold its KV."""
        return bool(self.text)

    @property
    def prompt(self) -> str:
        """The user's message."""
        return f"{self.text}\n\n{self.question}" if self.text else self.question

    def __str__(self) -> str:
        return f"{self.name}: {self.question}"


@dataclass
class Answer:
    """What a server streamed back for a question."""

    question: Question
    request_id: str = ""
    prompt_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def right(self) -> bool:
        """Whether the answer contains what it should."""
        return self.question.expect in self.text


def rounds() -> list[list[Question]]:
    """The questions; those of one round are asked at the same time."""
    text = TEXT.read_text(encoding="utf-8").strip()
    return [
        [
            Question("long 1", "How long is the President's term of office?", "4 years", text),
            Question("chat 1", "What is the capital of France?", "Paris"),
            Question("chat 2", "What is the chemical symbol for water?", "H2O"),
            Question("chat 3", "What is 2 + 2?", "4"),
            Question("chat 4", "What is the first month of the year?", "January"),
        ],
        [
            Question(
                "long 2", "What does Amendment X say?", "reserved to the States respectively, or to the people", text
            )
        ],
    ]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def log_tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server: politely first, then all that is left of its process group."""
    try:
        process.terminate()
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        say(f"it did not stop within {STOP_LIMIT_S} s: killing it")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    """Whether the server at `url` answers its health check."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_until_ready(url: str, process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Return when the server answers; raise `DemoError` when it ended or took too long."""
    start = next_word = time.monotonic()
    while not healthy(url):
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise DemoError(f"the {name} server ended with exit code {process.returncode}:\n{log_tail(log)}")
        if waited > START_LIMIT_S:
            raise DemoError(f"the {name} server was not ready after {START_LIMIT_S} s:\n{log_tail(log)}")
        if time.monotonic() >= next_word:
            say(f"waiting for the {name} server to be ready ({waited:.0f} s)")
            next_word += PROGRESS_EVERY_S
        time.sleep(0.5)


@contextmanager
def server(name: str, flags: Sequence[str], env: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Run ``vllm serve`` for the body of the ``with``; gives its address and its log file."""
    LOG_DIR.mkdir(parents=True, exist_ok=True)
    log, port = LOG_DIR / f"{name}.log", free_port()
    arguments = ["serve", MODEL, *SERVE_FLAGS, *flags]
    say(f"{name}: vllm {' '.join(arguments)}   (log: {log.relative_to(ROOT)})")
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        *arguments,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as sink:
        # A group of its own, so that the engine and its workers end with it whatever happens here.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            start_new_session=True,
            env={**CPU_ENV, **os.environ, **env},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, name, log)
        yield url, log
    finally:
        say(f"stopping the {name} server")
        stop(process)


async def ask(client: Any, question: Question) -> Answer:
    """Stream one answer, greedily decoded."""
    answer, start = Answer(question), time.monotonic()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question.prompt}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    async for chunk in stream:
        answer.request_id = chunk.id
        if chunk.usage is not None:
            answer.prompt_tokens = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            answer.text += choice.delta.content or ""
            # vLLM's addition to the API, so that the client's types do not know it.
            ids = (choice.model_extra or {}).get("token_ids") or []
            if ids and not answer.token_ids:
                answer.first_token_s = time.monotonic() - start
            answer.token_ids += ids
    answer.total_s = time.monotonic() - start
    return answer


async def ask_round(url: str, questions: Sequence[Question]) -> list[Answer]:
    """Ask all questions at once; raise `DemoError` if the answers take too long."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_LIMIT_S, max_retries=0) as client:
        tasks = [asyncio.create_task(ask(client, question)) for question in questions]
        pending, start = set(tasks), time.monotonic()
        while pending:
            done, pending = await asyncio.wait(pending, timeout=PROGRESS_EVERY_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            waited = time.monotonic() - start
            if pending and waited > ANSWER_LIMIT_S:
                raise DemoError(f"{len(pending)} answers were missing after {ANSWER_LIMIT_S} s")
            if pending:
                say(f"waiting for {len(pending)} of {len(questions)} answers ({waited:.0f} s)")
    return [task.result() for task in tasks]


def show(answer: Answer) -> None:
    """Print an answer."""
    say(str(answer.question))
    print(f"    {answer.text.strip()}   [{'right' if answer.right else 'WRONG'}]")
    counts = f"{answer.prompt_tokens} prompt tokens, {len(answer.token_ids)} new ones"
    print(f"    {counts}; the first after {answer.first_token_s:.2f} s, all after {answer.total_s:.2f} s", flush=True)


def ask_all(url: str) -> list[Answer]:
    """Ask everything, print and return the answers."""
    answers: list[Answer] = []
    for questions in rounds():
        say(f"asking {', '.join(question.name for question in questions)}")
        for answer in asyncio.run(ask_round(url, questions)):
            show(answer)
            answers.append(answer)
    return answers


def held_tokens(log: Path) -> dict[str, list[int]]:
    """How many KV tokens each rank held of each finished request that was spread, by request id, as the log says."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = (HELD_LINE.search(line) for line in lines)
    return {m[1]: [int(count) for count in re.findall(r"\d+", m[2])] for m in matches if m}


def spread_of(answer: Answer, held: Mapping[str, list[int]]) -> list[int]:
    """The entry of `held` for this answer's request, empty when there is none."""
    # vLLM appends to the id that the client sees.
    return next((counts for request, counts in held.items() if request.startswith(answer.request_id)), [])


def report_spread(answers: Sequence[Answer], log: Path) -> bool:
    """Print the ranks' shares of every long request; return whether each lay on more than one rank."""
    held, fine = held_tokens(log), True
    for answer in answers:
        if answer.question.long:
            counts = spread_of(answer, held)
            spread = sum(count > 0 for count in counts) > 1
            fine &= spread
            verdict = "" if spread else "   NOT SPREAD"
            say(f"{answer.question.name}: KV tokens per rank: {counts or 'not reported'}{verdict}")
    return fine


def report_same(ours: Sequence[Answer], stock: Sequence[Answer]) -> bool:
    """Print for every question whether both servers gave the same tokens; return whether they all did."""
    fine = True
    for a, b in zip(ours, stock, strict=True):
        same = bool(a.token_ids) and a.token_ids == b.token_ids
        fine &= same
        verdict = f"the same {len(a.token_ids)} tokens" if same else f"DIFFERENT tokens: {a.token_ids} {b.token_ids}"
        say(f"{a.question.name}: {verdict}")
    return fine


def run_stock() -> list[Answer]:
    """The answers of stock vLLM with one rank."""
    with server("stock", (), STOCK_ENV) as (url, _):
        return ask_all(url)


def run(stock_only: bool) -> bool:
    """The whole demo; returns whether everything was as it should be."""
    os.chdir(ROOT)
    make_moe(DEFAULT_MODEL_DIR)
    if stock_only:
        return all(answer.right for answer in run_stock())
    with server("nanocp", NANOCP_FLAGS, {}) as (url, log):
        ours = ask_all(url)
    spread = report_spread(ours, log)
    stock = run_stock()
    same = report_same(ours, stock)
    right = all(answer.right for answer in ours)
    say(f"answers right: {right}; long requests on several ranks: {spread}; same tokens as stock vLLM: {same}")
    return right and spread and same


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``python examples/demo.py [--stock-only]``."""
    parser = argparse.ArgumentParser(description="Serve a real MoE model with --nanocp and compare it with stock vLLM.")
    parser.add_argument("--stock-only", action="store_true", help="only serve it with stock vLLM and check the answers")
    args = parser.parse_args(argv)
    # As an exception, so that the servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return 0 if run(args.stock_only) else 1
    except DemoError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
