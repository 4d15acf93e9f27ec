# SPDX-License-Identifier: Apache-2.0
"""Random HTTP requests, good and bad: ``vllm serve --nanocp`` answers as ``vllm serve`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.random_runs import COUNT, MARKS, SEEDS

from .random_http import Call, Caller, Reply, asked, differences
from .serving import BLOCK, IDLE_LIMIT_S, Server, serving, wait_for

pytestmark = MARKS

AT_ONCE = 8
LONGEST = 1500
NAME = "tiny"
COMMON = [
    "--enforce-eager", "--dtype", "float32", "--max-model-len", str(LONGEST), "--block-size", str(BLOCK),
    "--served-model-name", NAME, "--enable-prompt-tokens-details", "--enable-auto-tool-choice",
    "--tool-call-parser", "hermes", "--api-server-count", "1",
]  # fmt: skip
OURS = [
    "--data-parallel-size", "2", "--enable-expert-parallel", "--nanocp",
    "--nanocp-config", '{"segment_size": 200}', "--num-gpu-blocks-override", "49", "--max-num-batched-tokens", "512",
]  # fmt: skip
# With this package's repairs: on CPU it dies of a seeded request that takes two chunks.
STOCK = ["--max-num-batched-tokens", "16384", "--num-gpu-blocks-override", "1024"]
STOCK += ["--worker-cls", "tests.engine.repaired.Worker"]


@pytest.fixture(scope="module")
def both(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    folder: Path = tmp_path_factory.mktemp("both")
    with (
        serving(tiny_model, folder / "ours.log", COMMON + OURS) as ours,
        serving(tiny_model, folder / "stock.log", COMMON + STOCK) as stock,
    ):
        yield ours, stock


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_are_stocks(both: tuple[Server, Server], seed: int) -> None:
    caller = Caller(seed, LONGEST, NAME)
    calls = [caller.one() for _ in range(COUNT)]
    ours, stocks = (replies(server, calls) for server in both)
    print(seed, Counter((call.path, reply.status) for call, reply in zip(calls, ours, strict=True)))
    found = []
    for index, (call, mine, theirs) in enumerate(zip(calls, ours, stocks, strict=True)):
        differ = differences([mine.status, mine.kind, mine.body], [theirs.status, theirs.kind, theirs.body])
        if differ:
            found.append(f"{seed}/{index} {call}\n    " + "\n    ".join(differ))
            print(found[-1], flush=True)
    for server in both:
        assert server.process.poll() is None and server.healthy(), server.tail()
        wait_for("nothing runs and no KV is held", server.idle, IDLE_LIMIT_S)
    assert not found, "\n".join(found)
    assert sum(reply.status == 200 for reply in ours) > COUNT / 3, "nearly all that is compared is refused"


def replies(server: Server, calls: list[Call]) -> list[Reply]:
    with server.connection() as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda call: asked(client, call), calls))


def test_routes_and_metrics(both: tuple[Server, Server]) -> None:
    """The same routes and schemas; all of stock's metrics, with the same labels."""
    ours, stock = both
    assert differences(ours.client.get("/openapi.json").json(), stock.client.get("/openapi.json").json()) == []
    names = [set(server.metrics()) for server in both]
    assert names[1] - names[0] == set()
    assert {name for name in names[0] - names[1] if not name.startswith("vllm:nanocp_")} == set()
