# SPDX-License-Identifier: Apache-2.0
"""What the plugin exposes: no more ports than stock vLLM, nothing without the key, nothing unpickled for a client."""

from __future__ import annotations

import base64
import collections
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.engine.harness import prompt

from .serving import ANSWER_LIMIT_S, FLAGS, RANKS, Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# Otherwise Gloo listens at the address of the machine's name, whatever that is here.
HOOK_ENV = {"PYTHONPATH": str(Path(__file__).parent / "hook"), "GLOO_SOCKET_IFNAME": "lo"}
ALL_CASES = os.environ.get("NANOCP_FAULT_ALL", "0") == "1"
KEY = "a-key-of-a-test"
# Guarded by vLLM's --api-key. The others (health, metrics, documentation, ...) are open in stock vLLM, too.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
# How each request is made. By itself httpx waits for 5 seconds, and makes use of proxies.
PATIENT: dict[str, Any] = dict(timeout=ANSWER_LIMIT_S, trust_env=False)


class Bomb:
    """What it is pickled as names a function, which is seen when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, ("NANOCP_TEST_BOMB", "loaded")


@pytest.fixture(scope="module")
def guarded(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with a key, as it is by default in what it deserialises; and where it writes what it unpickles."""
    folder = tmp_path_factory.mktemp("guarded")
    audit = folder / "audit"
    audit.mkdir()
    env = {
        **HOOK_ENV,
        "NANOCP_TEST_HOOK": json.dumps({"audit": str(audit)}),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    }
    with serving(tiny_model, folder / "serve.log", [*FLAGS, "--api-key", KEY], env) as server:
        yield server, audit


def listening(server: Server) -> dict[str, collections.Counter[str]]:
    """Of each process of a server that listens: how many TCP sockets by address, without the API's own."""
    api = int(server.url.rsplit(":", 1)[1])
    found: dict[str, collections.Counter[str]] = {}
    for process in server.members():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port != api:
                title = process.name() if process.name().startswith("VLLM") else "launcher"
                found.setdefault(title, collections.Counter())[connection.laddr.ip] += 1
    return found


def ask(server: Server, key: str | None, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    content = {"model": server.model, "prompt": "a", "max_tokens": 2, **body}
    return httpx.post(f"{server.url}{path}", json=content, headers=headers, **PATIENT)


def test_only_the_api_listens_for_others(guarded: tuple[Server, Path]) -> None:
    """All else is on the loopback interface, but for the store by which the ranks meet, as stock's ranks do."""
    server, _ = guarded
    found = listening(server)
    assert set(found) == {f"VLLM::Worker_DP{rank}_EP{rank}" for rank in range(RANKS)}, "neither engine nor front-end"
    everywhere = {title: count["::"] + count["0.0.0.0"] for title, count in found.items()}
    assert everywhere == {"VLLM::Worker_DP0_EP0": 1, "VLLM::Worker_DP1_EP1": 0}
    assert {address for count in found.values() for address in count} == {"127.0.0.1", "::"}


@pytest.mark.skipif(not ALL_CASES, reason="starts a stock server too: NANOCP_FAULT_ALL=1")
def test_no_more_ports_than_stock(guarded: tuple[Server, Path], tiny_model: str, tmp_path: Path) -> None:
    """Stock vLLM with the same flags, and the repairs that its experts need on CPU: each worker listens as often and
    where; its engines, which are one here, listen beside.
    """
    flags = [*FLAGS]
    where = flags.index("--nanocp")
    del flags[where : where + 3]
    env = {
        **HOOK_ENV,
        "NANOCP_TEST_HOOK": json.dumps({"repair": True}),
        "VLLM_PLUGINS": "nanocp_metadata_alias,nanocp_test_hook",
    }
    ours = listening(guarded[0])
    # A model that fits: stock has no more than one rank's cache for a request.
    flags[flags.index("--max-model-len") + 1] = "2048"
    with serving(tiny_model, tmp_path / "serve.log", [*flags, "--api-server-count", "1"], env) as stock:
        theirs = listening(stock)
    assert theirs, "otherwise there is nothing to compare with"
    for title, count in ours.items():
        assert not count - theirs[title], (title, count, theirs[title])
    assert sum(sum(c.values()) for c in ours.values()) <= sum(sum(c.values()) for c in theirs.values())


def test_the_key_guards_what_it_guards_in_vllm(guarded: tuple[Server, Path]) -> None:
    server, _ = guarded
    assert ask(server, KEY).status_code == 200
    paths = httpx.get(f"{server.url}/openapi.json", **PATIENT).json()["paths"]
    assert not [path for path in paths if "nanocp" in path]
    for path in (path for path in paths if path.startswith(GUARDED)):
        for method in paths[path]:
            for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
                answer = httpx.request(method, f"{server.url}{path}", headers=headers, json={}, **PATIENT)
                assert answer.status_code == 401, (method, path, answer.status_code)
    # A body that is refused is not looked at before the key is.
    assert ask(server, None, prompt=[-1]).status_code == 401
    assert ask(server, KEY, prompt=[-1]).status_code == 400


def test_the_plugin_adds_no_routes() -> None:
    """So there is nothing of its own that would have to be guarded."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_nanocp import plugin

    plugin.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--nanocp"])
    routes = build_app(args, ("generate",)).routes
    modules = {getattr(getattr(route, "endpoint", None), "__module__", "") for route in routes}
    assert modules and not [module for module in modules if module.startswith("vllm_nanocp")]


def test_nothing_of_a_client_is_unpickled(guarded: tuple[Server, Path]) -> None:
    """Steps and answers go between engine and workers as pickles. What a client sends is never read as one: whatever
    is unpickled while requests are served comes out of those queues (a rank's part of a step: as bytes in a step), and
    names nothing of a client's.
    """
    server, audit = guarded
    bomb = base64.b64encode(pickle.dumps(Bomb())).decode()
    bodies: list[dict[str, Any]] = [
        dict(prompt=prompt(3500, 1)),
        dict(prompt=bomb),
        dict(user=bomb),
        dict(prompt_embeds=bomb),
        dict(vllm_xargs={"bomb": bomb}),
        dict(kv_transfer_params={"bomb": bomb}),
        dict(cache_salt=bomb),
        dict(request_id=bomb),
        dict(structured_outputs={"regex": bomb}),
    ]
    (audit / "armed").touch()
    for body in bodies:
        assert ask(server, KEY, **body).status_code in (200, 400), body
    raw = httpx.post(
        f"{server.url}/v1/completions",
        content=pickle.dumps(Bomb()),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/octet-stream"},
        **PATIENT,
    )
    assert 400 <= raw.status_code < 500
    assert ask(server, KEY).status_code == 200, "all steps of the above are over"
    (audit / "armed").unlink()
    seen = {
        int(file.stem): [json.loads(line) for line in file.read_text().splitlines()] for file in audit.glob("*.jsonl")
    }
    names = {process.pid: process.name() for process in server.members() if process.name().startswith("VLLM")}
    assert set(seen) == {pid for pid, name in names.items() if "APIServer" not in name}, "API servers unpickle nothing"
    everything = [event for events in seen.values() for event in events]
    assert all(event["carrier"] for event in everything), [event for event in everything if not event["carrier"]]
    assert not [event for event in everything if "putenv" in event["name"]]
