# SPDX-License-Identifier: Apache-2.0
"""What routers and trainers are told, and what they may say: ranks, their KV events, the size of the world."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch

from tests.unit.event_index import Index

from .serving import BLOCK, COMPLETIONS, LONG, RANKS, Server, wait_for
from .test_http import complete, held_by_rank, only_tokens, prompt

pytestmark = pytest.mark.engine


def ask(server: Server, tokens: list[int], rank: object) -> httpx.Response:
    body = dict(model=server.model, prompt=tokens, max_tokens=2, ignore_eos=True, return_token_ids=True, temperature=0)
    return server.client.post(COMPLETIONS, json=body, headers={"X-data-parallel-rank": str(rank)})


def sources(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/kv_event_sources").json()
    return found


class Router:
    """Subscribes to all ranks and keeps an index of each. ``begin`` before anything else."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.marks = itertools.count(340)
        self.indexes: dict[int, Index] = {}
        self.sockets: dict[int, zmq.Socket[bytes]] = {}
        for rank, source in sources(server).items():
            socket = self.sockets[int(rank)] = zmq.Context.instance().socket(zmq.SUB)
            socket.connect(source["endpoint"])
            socket.setsockopt(zmq.SUBSCRIBE, source["topic"].encode())
        self.decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def close(self) -> None:
        for socket in self.sockets.values():
            socket.close(linger=0)

    def begin(self) -> None:
        """Clear the ranks' caches until all have been heard of it: a publisher sends nothing to whom it does not know
        yet."""

        def heard() -> bool:
            # It is not cleared while blocks are held.
            if not self.server.client.post("/reset_prefix_cache").json()["success"]:
                return False
            complete(self.server, prompt(5, 300), 1)
            return self._take_until(lambda: len(self.indexes) == RANKS, 1.0)

        wait_for("all ranks say that their caches are clear", heard, 30)

    def follow(self) -> None:
        """Take in all that has happened: up to a block that each rank stores last, since its events come in order."""
        marks = [prompt(BLOCK + 1, next(self.marks)) for _ in range(RANKS)]
        for rank, mark in enumerate(marks):
            assert ask(self.server, mark, rank).status_code == 200
        assert self._take_until(lambda: all(self.has(mark)[rank] for rank, mark in enumerate(marks)), 30.0)

    def _take_until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Take in what comes, as long as there is no more to be waited for; whether it is all."""
        end = time.monotonic() + limit_s
        while not (all_there := done()) and time.monotonic() < end:
            for rank, socket in self.sockets.items():
                if socket.poll(20):
                    _, _, payload = socket.recv_multipart()
                    self._take(rank, self.decoder.decode(payload))
        return all_there

    def _take(self, rank: int, batch: KVEventBatch) -> None:
        assert batch.data_parallel_rank == rank
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.indexes[rank] = Index(rank, BLOCK)
            elif rank in self.indexes:
                self.indexes[rank].follow([event])

    def has(self, tokens: list[int]) -> list[int]:
        """Blocks of a prompt that each rank has."""
        return [len(self.indexes[rank].match(tokens)) for rank in range(RANKS)]


@pytest.fixture
def router(server: Server) -> Iterator[Router]:
    router = Router(server)
    router.begin()
    yield router
    router.close()


def test_each_rank_is_a_source_of_events(server: Server) -> None:
    found = sources(server)
    assert sorted(found) == [str(rank) for rank in range(RANKS)]
    assert len({source["endpoint"] for source in found.values()}) == RANKS
    assert all(source["enable_kv_cache_events"] and source["publisher"] == "zmq" for source in found.values())


def test_a_request_goes_to_the_rank_that_its_header_names(server: Server, router: Router) -> None:
    for number in range(2 * RANKS):
        rank, tokens = number % RANKS, prompt(10 * BLOCK, 301 + number)
        assert ask(server, tokens, rank).status_code == 200
        router.follow()
        assert router.has(tokens) == [10 * (other == rank) for other in range(RANKS)]


def test_a_router_follows_the_ranks(server: Server, router: Router) -> None:
    """A long request, whose blocks lie on all ranks, then short ones that share its prefix: of each rank the router
    knows what can be used there, which is what the server then takes from the cache."""
    tokens = prompt(LONG, 311)
    whole = complete(server, tokens, 2)
    assert min(held_by_rank(server, whole["id"])) >= BLOCK
    router.follow()
    known = router.has(tokens)
    assert 0 < sum(known) < LONG // BLOCK, "only the first rank can use its part by itself"
    for rank in range(RANKS):
        before = server.metrics()["vllm:prompt_tokens_cached_total"]
        short = [*tokens[: 15 * BLOCK], *prompt(5, 320 + rank)]
        answer = ask(server, short, rank)
        assert answer.status_code == 200
        cached = server.metrics()["vllm:prompt_tokens_cached_total"] - before
        assert cached == min(15, known[rank]) * BLOCK
        router.follow()
        assert router.has(short)[rank] == 15
        assert only_tokens(answer.json()) == only_tokens(complete(server, short, 2))


@pytest.mark.parametrize("rank", [RANKS, -1, 10**20])
def test_ranks_that_there_are_not(server: Server, rank: int) -> None:
    answer = ask(server, prompt(5, 330), rank)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"data_parallel_rank {rank} is out of range [0, {RANKS})."


@pytest.mark.parametrize("rank", ["", "one", "0.5"])
def test_a_header_that_is_no_number_counts_as_none(server: Server, rank: str) -> None:
    """As in vLLM."""
    assert ask(server, prompt(5, 331), rank).status_code == 200


def test_the_size_of_the_world(server: Server) -> None:
    """All workers of all ranks; or, without data parallelism, those of one."""
    assert server.client.get("/get_world_size").json() == {"world_size": RANKS}
    assert server.client.get("/get_world_size", params={"include_dp": True}).json() == {"world_size": RANKS}
    assert server.client.get("/get_world_size", params={"include_dp": False}).json() == {"world_size": 1}


def test_checksums_of_all_workers_weights(server: Server) -> None:
    """Of both ranks: they hold other experts, and the same of all else."""
    answer = server.client.post("/weight_checker", json={"action": "checksum"})
    assert answer.status_code == 200, answer.text
    found = answer.json()["checksums"]
    by_rank = [{k.split(":", 4)[4]: v for k, v in found.items() if k.startswith(f"dp{rank}:")} for rank in range(RANKS)]
    assert sum(map(len, by_rank)) == len(found) and by_rank[0].keys() == by_rank[1].keys() != set()
    differing = {name for name in by_rank[0] if by_rank[0][name] != by_rank[1][name]}
    assert differing and all("experts" in name for name in differing)


def test_the_fingerprint_names_the_ranks(server: Server) -> None:
    parts = complete(server, prompt(5, 332), 1)["system_fingerprint"].split("-")
    assert f"dp{RANKS}" in parts and "ep" in parts


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_server_s_configuration_shows_the_ranks(server: Server, form: str) -> None:
    shown = server.client.get("/server_info", params={"config_format": form}).json()["vllm_config"]
    if form == "text":
        assert f"data_parallel_size={RANKS}," in shown
    else:
        parallel = shown["parallel_config"]
        assert (parallel["data_parallel_size"], parallel["data_parallel_size_local"]) == (RANKS, RANKS)
        assert (parallel["world_size"], parallel["data_parallel_rank"]) == (1, 0)


def test_the_number_of_ranks_is_fixed(server: Server) -> None:
    for ranks in (1, RANKS + 1):
        answer = server.client.post("/scale_elastic_ep", json={"new_data_parallel_size": ranks})
        assert answer.status_code == 400 and f"from {RANKS} to {ranks} ranks" in answer.text
    assert server.client.post("/scale_elastic_ep", json={"new_data_parallel_size": RANKS}).status_code == 200
