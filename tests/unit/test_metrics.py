# SPDX-License-Identifier: Apache-2.0
"""Metrics: counting, the way to the front-end, and what Prometheus gets to see."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import AggregatedLoggingStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_nanocp.metrics.collector import Collector, RankState, Snapshot
from vllm_nanocp.metrics.prometheus import NanoCPStatLogger
from vllm_nanocp.metrics.transport import PREFIX, attach, take

STATES = [RankState(0.5, 3, 1, 7, 2), RankState(0.25, 1, 0, 0, 1), RankState(0.0, 2, 0, 4, 0)]
COEFFICIENTS = {"base": 0.006, "kv_token": 2.25e-8}
CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(served_model_name="m"), additional_config={"nanocp": {"ranks": 3}}
)


def busy_snapshot() -> Snapshot:
    """All counts differ."""
    collector = Collector()
    for degree, hits in ((1, 10), (3, 20), (1, 30)):
        collector.admitted(degree, local_hits=hits, remote_hits=2 * hits, missed=5)
    counts = ((collector.moved, 4), (collector.spilled, 2), (collector.prevented_preemption, 6))
    for count, times in counts:
        for _ in range(times):
            count()
    collector.drafted(3, 8, 7)
    collector.drafted(4, 9, 1)
    for rooms_elsewhere in (True, False, False, False, False, False):
        collector.preempted(rooms_elsewhere)
    return collector.snapshot(list(STATES), dict(COEFFICIENTS))


def over_the_wire(stats: SchedulerStats) -> SchedulerStats:
    """As EngineCore encodes and its clients decode."""
    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert decoded is not None
    return decoded


def exported() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples of nanocp in the default registry's text, by name and labels without the model's."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm:nanocp_") and not sample.name.endswith("_created"):
                labels = {**sample.labels}
                assert labels.pop("model_name") == "m"
                found[sample.name.removeprefix("vllm:nanocp_"), tuple(sorted(labels.items()))] = sample.value
    return found


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


# -- collector -------------------------------------------------------------------------------------------------


def test_counts_since_the_last_snapshot() -> None:
    snapshot = busy_snapshot()
    assert snapshot == Snapshot(
        ranks=STATES,
        degrees={1: 2, 3: 1},
        local_hits=60,
        remote_hits=120,
        missed=15,
        moves=4,
        spills=2,
        preemptions_with_room=1,
        preemptions_without_room=5,
        prevented_preemptions=6,
        sharded_drafts=7,
        sharded_draft_tokens=17,
        sharded_accepted_tokens=8,
        coefficients=COEFFICIENTS,
    )


def test_a_snapshot_resets_the_counts_and_stays_as_it_is() -> None:
    collector = Collector()
    collector.admitted(2, 1, 1, 1)
    collector.moved()
    first = collector.snapshot(STATES, None)
    assert collector.snapshot(STATES, None) == Snapshot(ranks=STATES)
    collector.admitted(2, 1, 1, 1)
    assert first.degrees == {2: 1} and first.moves == 1


def test_nothing_grows_without_snapshots() -> None:
    # With --disable-log-stats nobody takes them.
    collector = Collector()
    for i in range(10_000):
        collector.admitted(1 + i % 4, i, i, i)
        collector.preempted(bool(i % 2))
    snapshot = collector.snapshot(STATES, None)
    assert snapshot.degrees == dict.fromkeys((1, 2, 3, 4), 2500)
    assert snapshot.local_hits == sum(range(10_000))


@pytest.mark.parametrize(
    ("values", "imbalance"), [([0, 0, 0], 1.0), ([2, 2, 2], 1.0), ([6, 0, 0], 3.0), ([3, 2, 1], 1.5), ([], 1.0)]
)
def test_imbalance_is_largest_over_mean(values: list[int], imbalance: float) -> None:
    snapshot = Snapshot([RankState(kv_usage=v / 10, running=v, waiting=0, guests=0, shards=0) for v in values])
    assert snapshot.batch_imbalance == pytest.approx(imbalance)
    assert snapshot.kv_imbalance == pytest.approx(imbalance)


def test_a_step_costs_microseconds() -> None:
    ranks = [RankState(0.5, 8, 0, 3, 2)] * 8
    collector, times = Collector(), []
    for _ in range(200):
        start = time.perf_counter()
        collector.admitted(2, 100, 100, 100)
        attach(SchedulerStats(), collector.snapshot(ranks, COEFFICIENTS))
        times.append(time.perf_counter() - start)
    # The fastest: others may share the cores.
    assert min(times) < 100e-6


# -- transport -------------------------------------------------------------------------------------------------


def test_a_snapshot_survives_the_wire() -> None:
    stats = SchedulerStats(num_running_reqs=3)
    attach(stats, busy_snapshot())
    arrived = over_the_wire(stats)
    assert take(arrived) == busy_snapshot()
    assert arrived == SchedulerStats(num_running_reqs=3), "others find what vLLM made"
    assert take(arrived) is None


def test_payload_is_plain_data() -> None:
    payload = json.loads(json.dumps(busy_snapshot().to_payload()))
    assert Snapshot.from_payload(payload) == busy_snapshot()
    assert set(payload) == {field.name for field in fields(Snapshot)}


def test_statistics_without_a_snapshot() -> None:
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2})
    assert take(over_the_wire(stats)) is None
    assert take(SchedulerStats()) is None
    attach(stats, busy_snapshot())
    assert take(stats) == busy_snapshot()
    assert stats.num_kv_fetch_reqs_by_stage == {"in_progress": 2}


def broken(**changes: Any) -> str:
    return json.dumps({**busy_snapshot().to_payload(), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "null",
        broken(moves=-1), broken(moves=1.5), broken(spills=None), broken(missed=True), broken(ranks=[[0.5, 1]]),
        broken(ranks=[[None, 1, 1, 1, 1]]), broken(degrees=[[1, -1]]), broken(degrees=3), broken(coefficients=[]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_dropped(text: str) -> None:
    # An error would end the loop that hands out all answers.
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={PREFIX + text: 0})
    assert take(stats) is None
    assert stats == SchedulerStats()


def test_coefficients_that_are_no_numbers_are_dropped() -> None:
    stats = SchedulerStats()
    attach(stats, Snapshot(STATES, coefficients={"base": float("nan")}))
    assert take(stats) is None


# -- prometheus ------------------------------------------------------------------------------------------------


def record(logger: Any, snapshot: Snapshot) -> None:
    stats = SchedulerStats()
    attach(stats, snapshot)
    logger.record(scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None, engine_idx=0)


def test_what_prometheus_sees() -> None:
    logger = NanoCPStatLogger(CONFIG, [0])
    record(logger, busy_snapshot())
    expected: dict[Any, float] = {
        ("kv_imbalance", ()): 2.0,
        ("batch_imbalance", ()): 1.5,
        ("request_degree_bucket", (("le", "1.0"),)): 2,
        ("request_degree_bucket", (("le", "2.0"),)): 2,
        ("request_degree_bucket", (("le", "3.0"),)): 3,
        ("request_degree_bucket", (("le", "+Inf"),)): 3,
        ("request_degree_count", ()): 3,
        ("request_degree_sum", ()): 5,
        ("moves_total", ()): 4,
        ("spills_total", ()): 2,
        ("prevented_preemptions_total", ()): 6,
        ("spec_decode_drafts_total", ()): 7,
        ("spec_decode_draft_tokens_total", ()): 17,
        ("spec_decode_accepted_tokens_total", ()): 8,
        ("preemptions_total", (("room_elsewhere", "true"),)): 1,
        ("preemptions_total", (("room_elsewhere", "false"),)): 5,
        ("prefix_hit_tokens_total", (("distance", "local"),)): 60,
        ("prefix_hit_tokens_total", (("distance", "remote"),)): 120,
        ("prefix_missed_tokens_total", ()): 15,
        ("cost_coefficient", (("coefficient", "base"),)): 0.006,
        ("cost_coefficient", (("coefficient", "kv_token"),)): 2.25e-8,
    }
    for rank, state in enumerate(STATES):
        label = (("rank", str(rank)),)
        expected["kv_cache_usage_perc", label] = state.kv_usage
        expected["num_requests_running", label] = state.running
        expected["num_requests_waiting", label] = state.waiting
        expected["guests", label] = state.guests
        expected["shards", label] = state.shards
    assert exported() == expected


def test_states_are_replaced_and_counts_added() -> None:
    logger = NanoCPStatLogger(CONFIG, [0])
    record(logger, busy_snapshot())
    record(logger, Snapshot([RankState(0.125, 0, 0, 0, 0)] * 3, moves=1))
    logger.record(scheduler_stats=SchedulerStats(), iteration_stats=None)
    logger.record(scheduler_stats=None, iteration_stats=None)
    now = exported()
    assert now["kv_cache_usage_perc", (("rank", "0"),)] == 0.125
    assert now["kv_imbalance", ()] == 1.0
    assert now["moves_total", ()] == 5
    assert now["request_degree_count", ()] == 3


def test_all_series_exist_at_zero() -> None:
    NanoCPStatLogger(CONFIG, [0])
    now = exported()
    assert now and not any(now.values())
    assert {key[0] for key in now} >= {"moves_total", "preemptions_total", "request_degree_count", "shards"}


def test_more_ranks_than_expected_are_left_out() -> None:
    record(NanoCPStatLogger(CONFIG, [0]), Snapshot([RankState(0.5, 1, 1, 1, 1)] * 5))
    assert ("shards", (("rank", "3"),)) not in exported()


def test_twice_in_one_process() -> None:
    record(NanoCPStatLogger(CONFIG, [0]), busy_snapshot())
    again = NanoCPStatLogger(CONFIG, [0])
    assert not any(exported().values())
    record(again, busy_snapshot())
    assert exported()["moves_total", ()] == 4


TWO_FRONT_ENDS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from prometheus_client import generate_latest
from tests.unit.test_metrics import CONFIG, STATES, NanoCPStatLogger, Snapshot, busy_snapshot, record
from vllm.v1.metrics.prometheus import get_prometheus_registry
for snapshot in (busy_snapshot(), Snapshot(STATES[::-1], moves=1)):
    child = os.fork()
    if not child:
        record(NanoCPStatLogger(CONFIG, [0]), snapshot)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.01)
print(generate_latest(get_prometheus_registry()).decode())
"""


def test_several_api_servers(tmp_path: Path) -> None:
    """Counts are summed over them, states are those of the one that heard last."""
    root = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", TWO_FRONT_ENDS, root],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    lines = dict(line.rsplit(" ", 1) for line in ran.stdout.splitlines() if line.startswith("vllm:nanocp_"))
    assert float(lines['vllm:nanocp_moves_total{model_name="m"}']) == 5
    assert float(lines['vllm:nanocp_request_degree_count{model_name="m"}']) == 3
    shards = [float(lines[f'vllm:nanocp_shards{{model_name="m",rank="{rank}"}}']) for rank in range(3)]
    assert shards == [state.shards for state in STATES[::-1]]
    assert not any("pid=" in line for line in lines)


# -- beside vLLM's loggers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_nanocp(tiny_model: str) -> Any:
    args: dict[str, Any] = dict(
        enable_expert_parallel=True, enforce_eager=True, served_model_name="m", max_model_len=2048
    )
    return EngineArgs(model=tiny_model, additional_config={"nanocp": {"ranks": 2}}, **args).create_engine_config()


@pytest.fixture(scope="module")
def without_nanocp(tiny_model: str) -> Any:
    return EngineArgs(model=tiny_model, enforce_eager=True, served_model_name="m").create_engine_config()


@pytest.fixture
def vllm_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """With all levels: an idle engine's line is at DEBUG, and from WARNING on vLLM makes no logger for it."""
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, "vllm")
    yield caplog
    vllm_logger.removeHandler(caplog.handler)


def kinds(manager: StatLoggerManager) -> list[str]:
    return [type(logger).__name__ for logger in manager.stat_loggers]


def test_an_engine_without_nanocp_has_nothing(with_nanocp: Any, without_nanocp: Any) -> None:
    # The configuration with nanocp was made in this process before: what it installs must pass others by.
    manager = StatLoggerManager(vllm_config=without_nanocp)
    assert "NanoCPStatLogger" not in kinds(manager)
    assert not exported()
    assert manager.stat_loggers


def test_vllms_loggers_stay(with_nanocp: Any, without_nanocp: Any, vllm_log: pytest.LogCaptureFixture) -> None:
    stock = kinds(StatLoggerManager(vllm_config=without_nanocp))
    assert len(stock) == 2
    vllms = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:")}
    for _ in range(2):  # a second engine in the same process
        manager = StatLoggerManager(vllm_config=with_nanocp)
        assert kinds(manager) == [*stock, "NanoCPStatLogger"]
        now = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:")}
        assert vllms == {name for name in now if "nanocp" not in name}
        manager.log_engine_initialized()
        manager.record_admission_rejection("max_num_queued_reqs")
        stats = SchedulerStats(num_running_reqs=3)
        attach(stats, busy_snapshot())
        manager.record(stats, None)
        manager.log()
        assert exported()["moves_total", ()] == 4
        assert REGISTRY.get_sample_value("vllm:num_requests_running", {"model_name": "m", "engine": "0"}) == 3


@pytest.mark.parametrize("aggregate", [False, True])
def test_vllms_log_does_not_show_the_payload(
    without_nanocp: Any, vllm_log: pytest.LogCaptureFixture, aggregate: bool
) -> None:
    """Not even where nobody takes it out."""
    manager = StatLoggerManager(vllm_config=without_nanocp, engine_idxs=[0], aggregate_engine_logging=aggregate)
    assert aggregate == any(isinstance(logger, AggregatedLoggingStatLogger) for logger in manager.stat_loggers)
    stats = SchedulerStats(num_running_reqs=3)
    attach(stats, busy_snapshot())
    manager.record(stats, None)
    manager.log()
    assert "Running: 3 reqs" in vllm_log.text
    assert "KV fetch" not in vllm_log.text and PREFIX not in vllm_log.text
    assert PREFIX not in generate_latest(REGISTRY).decode()


# -- dashboard -------------------------------------------------------------------------------------------------

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "nanocp.json"


def panels() -> list[dict[str, Any]]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert board["schemaVersion"] >= 36 and board["title"] and board["id"] is None
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "model_name", "instance"}
    return list(board["panels"])


def test_dashboard_is_well_formed() -> None:
    found = panels()
    ids = [panel["id"] for panel in found]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        grid = panel["gridPos"]
        cells = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert grid["x"] + grid["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert target["expr"].count("(") == target["expr"].count(")")


def test_dashboard_asks_for_what_is_exported(with_nanocp: Any) -> None:
    manager = StatLoggerManager(vllm_config=with_nanocp)
    stats = SchedulerStats()
    attach(stats, busy_snapshot())
    manager.record(stats, None)
    labels: dict[str, set[str]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = set()
    for panel in panels():
        for target in panel.get("targets", ()):
            grouped = {label for by in re.findall(r"by \(([\w, ]+)\)", target["expr"]) for label in by.split(", ")}
            series = re.findall(r"(vllm:\w+)\{([^}]*)\}", target["expr"])
            assert len(series) == target["expr"].count("vllm:") > 0
            for name, selector in series:
                assert name in labels, f"{panel['title']}: {name} is not exported"
                used = grouped | set(re.findall(r"(\w+)=", selector)) - {"instance"}
                assert used <= labels[name], f"{panel['title']}: {name} has {labels[name]}"
                asked.add(name)
    ours = {name for name in labels if name.startswith("vllm:nanocp_") and not name.endswith("_created")}
    assert ours <= asked, "each of nanocp's metrics has a panel"
