# SPDX-License-Identifier: Apache-2.0
"""The plugin's own metrics at ``/metrics``, of requests that a real server answers."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from .serving import ANSWER_LIMIT_S, BLOCK, COMPLETIONS, LONG, RANKS, Server, wait_for
from .test_http import complete, prompt

Samples = dict[tuple[str, str], float]


def scrape(url: str) -> Samples:
    """(name without ``vllm:nanocp_``, value of the one label that is not the model's, or ``""``) -> value."""
    with httpx.Client(base_url=url, trust_env=False, timeout=ANSWER_LIMIT_S) as client:
        text = client.get("/metrics").text
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:nanocp_"):
                labels = [value for label, value in sample.labels.items() if label != "model_name"]
                assert len(labels) <= 1
                found[sample.name.removeprefix("vllm:nanocp_"), "".join(labels)] = sample.value
    return found


def growth(server: Server, act: Callable[[], object]) -> Callable[[str, str], float]:
    before = scrape(server.url)
    act()
    after = scrape(server.url)
    return lambda name, label="": after[name, label] - before.get((name, label), 0.0)


def test_what_a_sharded_request_adds(server: Server) -> None:
    grew = growth(server, lambda: complete(server, prompt(LONG, 81), 8))
    assert grew("request_degree_count", "") == 1 and grew("request_degree_sum", "") == RANKS
    assert grew("request_degree_bucket", "1.0") == 0 and grew("request_degree_bucket", "2.0") == 1
    assert grew("prefix_missed_tokens_total", "") == LONG
    assert grew("prefix_hit_tokens_total", "local") == grew("prefix_hit_tokens_total", "remote") == 0
    assert grew("preemptions_total", "true") == grew("preemptions_total", "false") == 0


def test_what_a_short_request_adds(server: Server) -> None:
    grew = growth(server, lambda: complete(server, prompt(40, 82), 2))
    assert grew("request_degree_sum", "") == grew("request_degree_bucket", "1.0") == 1


def test_prefixes_are_told_by_distance(server: Server) -> None:
    tokens = prompt(LONG, 83)
    complete(server, tokens)
    grew = growth(server, lambda: complete(server, tokens))
    cached = (LONG - 1) // BLOCK * BLOCK
    local, remote = (grew("prefix_hit_tokens_total", distance) for distance in ("local", "remote"))
    assert local + remote == cached and remote > 0
    assert grew("prefix_missed_tokens_total", "") == LONG - cached


def test_ranks_while_a_sharded_request_runs(server: Server) -> None:
    body = dict(model=server.model, prompt=prompt(LONG, 84), max_tokens=500, stream=True, ignore_eos=True)
    with server.client.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()  # kept: the connection closes with it
        assert next(lines).startswith("data: ")

        def decoding() -> Samples | None:
            seen = scrape(server.url)
            return seen if sum(seen["guests", str(rank)] for rank in range(RANKS)) == 1 else None

        seen = wait_for("the engine tells of a guest", decoding, 20)
    ranks = [str(rank) for rank in range(RANKS)]
    assert sorted(seen["num_requests_running", rank] for rank in ranks) == [0, 1]
    assert [seen["shards", rank] for rank in ranks] == [1, 1]
    assert all(seen["kv_cache_usage_perc", rank] > 0 for rank in ranks)
    assert 1 <= seen["kv_imbalance", ""] <= RANKS
    assert seen["cost_coefficient", "base"] > 0 and seen["cost_coefficient", "exchange"] >= 0
