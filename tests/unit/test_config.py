# SPDX-License-Identifier: Apache-2.0
"""Settings, the vLLM versions that are supported, and what importing the package costs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nanocp.compat import unsupported_reason
from vllm_nanocp.config import DECODE_BENCH, EXCHANGES, MAX_PLACES, PLACEMENTS, NanoCPConfig, of, parse
from vllm_nanocp.entry.engine_config import make, with_defaults
from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.placement.moves import MoveConfig


def refusal(raw: Any, data_parallel_size: int = 1) -> str:
    """The one line a user reads."""
    with pytest.raises(NanoCPConfigError) as caught:
        parse(raw, data_parallel_size)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("nanocp: ")
    assert "; " in line, "what is refused and why, then what to do instead"
    return line


def test_defaults() -> None:
    config = parse({}, 4)
    assert config == NanoCPConfig(ranks=4, segment_size=65536, max_degree=None, placement="balanced", exchange="auto")
    assert config.degree_limit == 4


@pytest.mark.parametrize(
    ("raw", "key", "value"),
    [
        ({"segment_size": 1}, "segment_size", 1),
        ({"segment_size": 10**9}, "segment_size", 10**9),
        ({"segment_size": "auto"}, "segment_size", "auto"),
        ({"max_degree": 1}, "max_degree", 1),
        ({"max_degree": 4}, "max_degree", 4),
        ({"max_degree": None}, "max_degree", None),
        *(({"placement": name}, "placement", name) for name in PLACEMENTS),
        *(({"exchange": name}, "exchange", name) for name in EXCHANGES),
        ({}, "graph_capacities", None),
        ({"graph_capacities": None}, "graph_capacities", None),
        ({"graph_capacities": []}, "graph_capacities", ()),
        ({"graph_capacities": [1]}, "graph_capacities", (1,)),
        ({"graph_capacities": (2, 3, 5)}, "graph_capacities", (2, 3, 5)),
        ({"graph_capacities": [MAX_PLACES // 5]}, "graph_capacities", (MAX_PLACES // 5,)),
        ({"decode_bench": False}, "decode_bench", False),
    ],
)
def test_valid_values_arrive(raw: dict[str, Any], key: str, value: Any) -> None:
    config = parse(raw, 4)
    assert getattr(config, key) == value
    assert config.ranks == 4


def test_max_degree_limits_the_degree() -> None:
    assert parse({"max_degree": 3}, 4).degree_limit == 3


@pytest.mark.parametrize(("raw", "data_parallel_size"), [({"ranks": 4}, 1), ({"ranks": 4}, 4), ({}, 4)])
def test_ranks_by_key_or_by_data_parallel_size(raw: dict[str, Any], data_parallel_size: int) -> None:
    assert parse(raw, data_parallel_size).ranks == 4


@pytest.mark.parametrize("key", ["segment_size", "max_degree", "ranks"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "2", True, [2], {"a": 1}])
def test_integers_are_positive_integers(key: str, value: Any) -> None:
    line = refusal({key: value}, 1 if key == "ranks" else 4)
    assert key in line and repr(value) in line and "integer of at least 1" in line
    assert line.split("; use ")[1].isdigit()


@pytest.mark.parametrize("key", ["segment_size", "ranks"])
def test_null_is_for_max_degree_only(key: str) -> None:
    assert key in refusal({key: None}, 1 if key == "ranks" else 4)


def test_the_default_segment_size_is_what_is_proposed() -> None:
    assert str(NanoCPConfig(2).segment_size) in refusal({"segment_size": 0}, 2)


def test_auto_spills_where_nothing_is_said_of_moves() -> None:
    """On GPUs, where homes do not move by default."""
    auto = parse({"segment_size": "auto"}, 4)
    assert with_defaults(auto, cpu=False).moves == {"max_moves": 0}
    assert with_defaults(auto, cpu=True).moves is True
    for given in ({"moves": False}, {"moves": True}, {"max_degree": 1}, {"placement": "round_robin"}):
        config = parse({"segment_size": "auto"} | given, 4)
        assert with_defaults(config, cpu=False).moves is (given.get("moves") or False)
    assert with_defaults(parse({}, 4), cpu=False).moves is False


@pytest.mark.parametrize(("key", "choices"), [("placement", PLACEMENTS), ("exchange", EXCHANGES)])
@pytest.mark.parametrize("value", ["fastest", "", "Balanced", "two\nlines", 1, None, ["auto"], {}])
def test_choices_are_named(key: str, choices: tuple[str, ...], value: Any) -> None:
    line = refusal({key: value}, 2)
    assert key in line and repr(value) in line
    assert all(choice in line for choice in choices)


@pytest.mark.parametrize(
    "value",
    [4, "4", True, {}, {"4": 16}, [0], [-4, 16], [4.0], ["4"], [True, 4], [[4]], [None], [16, 4], [4, 4], (8, 2)],
)
def test_capacities_are_ascending_positive_integers(value: Any) -> None:
    line = refusal({"graph_capacities": value}, 2)
    assert f"graph_capacities must be a list of ascending positive integers, got {value!r}" in line
    assert "leave it out" in line and "[] for no graphs" in line


@pytest.mark.parametrize("ranks", [2, 3, 8, 31])
def test_capacities_without_places(ranks: int) -> None:
    most = MAX_PLACES // (ranks + 1)
    assert parse({"graph_capacities": [1, most]}, ranks).graph_capacities == (1, most)
    line = refusal({"graph_capacities": [1, most + 1]}, ranks)
    assert f"{most + 1} visits from each of {ranks} ranks" in line and line.endswith(f"use at most {most}")


@pytest.mark.parametrize("value", [1, 0, "true", None, [True]])
def test_decode_bench_is_a_boolean(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECODE_BENCH, "1")
    line = refusal({"decode_bench": value}, 2)
    assert "decode_bench must be true or false" in line and repr(value) in line


@pytest.mark.parametrize("environment", [None, "", "0", "true"])
def test_decode_bench_must_be_meant(environment: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes every answer meaningless, so the setting alone is not enough."""
    monkeypatch.delenv(DECODE_BENCH, raising=False)
    if environment is not None:
        monkeypatch.setenv(DECODE_BENCH, environment)
    line = refusal({"decode_bench": True}, 2)
    assert "meaningless" in line and "NANOCP_DECODE_BENCH=1" in line
    assert parse({"decode_bench": False}, 2).decode_bench is False


def test_decode_bench_in_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECODE_BENCH, "1")
    config = parse({"decode_bench": True}, 2)
    assert config.decode_bench is True
    assert parse(json.loads(json.dumps(config.to_dict()))) == config
    monkeypatch.delenv(DECODE_BENCH)
    refusal(config.to_dict())  # a process that does not inherit it


def test_max_degree_above_the_ranks() -> None:
    line = refusal({"max_degree": 5}, 4)
    assert "max_degree is 5" in line and "4 ranks" in line and "use at most 4" in line


def test_ranks_and_data_parallel_size_disagree() -> None:
    line = refusal({"ranks": 4}, 2)
    assert "ranks is 4" in line and "data-parallel size is 2" in line and "only one" in line


@pytest.mark.parametrize(("raw", "data_parallel_size"), [({}, 1), ({"ranks": 1}, 1), ({"segment_size": 9}, 1)])
def test_one_rank_has_nothing_to_share(raw: dict[str, Any], data_parallel_size: int) -> None:
    line = refusal(raw, data_parallel_size)
    assert "two or more" in line and "--data-parallel-size 2" in line and "without --nanocp" in line


@pytest.mark.parametrize("key", ["segmentsize", "Ranks", "degree_limit", "", 3, "two\nlines"])
def test_unknown_keys_are_refused_and_the_known_ones_named(key: Any) -> None:
    line = refusal({key: 1}, 2)
    assert repr(key) in line
    assert all(name in line for name in ("ranks", "segment_size", "max_degree", "placement", "exchange"))


@pytest.mark.parametrize("raw", [None, 3, "segment_size", True, ["segment_size"], [("segment_size", 3)]])
def test_the_configuration_is_a_mapping(raw: Any) -> None:
    line = refusal(raw, 2)
    assert repr(raw) in line and "JSON object" in line


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"max_degree": 2, "segment_size": 7, "placement": "round_robin", "exchange": "collective"},
        {"graph_capacities": []},
        {"graph_capacities": [3, 9, 300]},
    ],
)
def test_a_parsed_configuration_survives_json(raw: dict[str, Any]) -> None:
    """Workers parse again what the front-end wrote into ``additional_config``, and see a data-parallel size of one."""
    config = parse(raw, 3)
    assert parse(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.0.post1", "0.32.0rc1", "0.33.0", "0.33.1"])
def test_supported_versions(version: str) -> None:
    assert unsupported_reason(version) is None


@pytest.mark.parametrize(
    "version", ["0.34.0", "0.34.0+cpu", "0.25.1", "0.31.9", "1.32.0", "0.320.0", "1", "0", "dev", "", "v0.32.0"]
)
def test_unsupported_versions(version: str) -> None:
    reason = unsupported_reason(version)
    assert reason is not None and "\n" not in reason
    assert reason.startswith(f"nanocp: vLLM {version} is not supported (supported: 0.32.0, 0.33.0)")
    assert "install vllm==0.32.0" in reason and "without --nanocp" in reason


@pytest.mark.parametrize(
    "module",
    ["vllm_nanocp", "vllm_nanocp.config", "vllm_nanocp.compat", "vllm_nanocp.plugin", "vllm_nanocp.plan"],
)
def test_importing_costs_nothing(module: str) -> None:
    """vLLM loads the plugin in every process: neither torch nor vLLM may be imported before it is asked for."""
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & {{'torch', 'vllm'}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "value", ["yes", 1, [], {"nope": 1}, {"min_gap": 1}, {"batch_margin": "wide"}, {"max_degree": 2}]
)
def test_moves_are_refused(value: Any) -> None:
    with pytest.raises(NanoCPConfigError, match="nanocp: moves"):
        parse({"moves": value}, 2)


@pytest.mark.parametrize(
    "key", [f.name for f in fields(MoveConfig) if isinstance(f.default, int) and not isinstance(f.default, bool)]
)
@pytest.mark.parametrize("value", [True, 3.5, 8.0, "8", None, [8], float("nan"), float("inf"), -1])
def test_integers_of_moves_are_integers(key: str, value: Any) -> None:
    line = refusal({"moves": {key: value}}, 2)
    assert line.startswith(f"nanocp: moves: {key} must be an integer of at least ") and f"got {value!r};" in line


@pytest.mark.parametrize("key", ["batch_margin", "kv_margin"])
@pytest.mark.parametrize("value", [True, False, "0.1", None, [0.1], float("nan"), float("inf"), 10**400, -0.1])
def test_margins_of_moves_are_numbers(key: str, value: Any) -> None:
    assert refusal({"moves": {key: value}}, 2).startswith(f"nanocp: moves: {key} must be a number of at least 0, got ")
    for right in (0, 1, 0.5):
        assert parse({"moves": {key: right}}, 2).move_config == MoveConfig(max_degree=2, **{key: right})


@pytest.mark.parametrize("value", [1, 0, "true", None, 1.0])
def test_weigh_exchange_is_a_boolean(value: Any) -> None:
    line = refusal({"moves": {"weigh_exchange": value}}, 2)
    assert line.startswith(f"nanocp: moves: weigh_exchange must be true or false, got {value!r};")


@pytest.mark.parametrize("fixed", [{"placement": "round_robin"}, {"max_degree": 1}])
def test_moves_where_homes_stay(fixed: dict[str, Any]) -> None:
    still = parse(fixed, 2)
    assert still.move_config is None and parse(still.to_dict(), 1) == still
    assert parse({**fixed, "moves": False}, 2).move_config is None
    for value in (True, {}):
        with pytest.raises(NanoCPConfigError, match="nanocp: moves: homes cannot move with"):
            parse({**fixed, "moves": value}, 2)


def test_moves() -> None:
    assert parse({}, 2).moves is None and parse({"moves": None}, 2).moves is None
    for raw in ({}, {"moves": True}, {"moves": {}}):
        config = parse(raw, 2)
        assert config.move_config == MoveConfig(max_degree=2) and parse(config.to_dict(), 1) == config
    assert parse({"moves": False}, 2).move_config is None
    config = parse({"moves": {"min_gap": 3}, "max_degree": 2}, 3)
    assert config.move_config == MoveConfig(min_gap=3, max_degree=2)
    assert parse(config.to_dict(), 1) == config


def test_parallel_prefill() -> None:
    assert parse({}, 2).parallel_prefill is None and parse({"parallel_prefill": None}, 2).parallel_prefill is None
    for value in (True, False, {"chunk_tokens": 512}):
        config = parse({"parallel_prefill": value}, 2)
        assert config.parallel_prefill == value and parse(config.to_dict(), 1) == config
        assert config.chunk_tokens == (512 if isinstance(value, dict) else None)
    with pytest.raises(NanoCPConfigError, match="nanocp: chunk_tokens must be an integer of at least 1"):
        parse({"parallel_prefill": {"chunk_tokens": 0}}, 2)
    for value in (True, 4.0, "4", None, float("nan"), -1):
        with pytest.raises(NanoCPConfigError, match="nanocp: chunk_tokens must be an integer of at least 1"):
            parse({"parallel_prefill": {"chunk_tokens": value}}, 2)
    for wrong in (1, "yes", {}, {"tokens": 3}, {"chunk_tokens": 3, "x": 1}):
        with pytest.raises(NanoCPConfigError, match="nanocp: parallel_prefill must be true, false or"):
            parse({"parallel_prefill": wrong}, 2)


@pytest.mark.parametrize(
    ("settings", "cpu", "moves", "parallel"),
    [
        ({}, True, True, True),
        ({}, False, False, True),
        ({"moves": True, "parallel_prefill": False}, False, True, False),
        ({"parallel_prefill": {"chunk_tokens": 512}}, False, False, {"chunk_tokens": 512}),
        ({"placement": "round_robin"}, True, False, True),
        ({"max_degree": 1}, True, False, False),
        ({"max_degree": 1}, False, False, False),
    ],
)
def test_what_is_on_when_left_out(settings: dict[str, Any], cpu: bool, moves: bool, parallel: Any) -> None:
    config = with_defaults(parse(settings, 2), cpu)
    assert bool(config.move_config) is moves and config.parallel_prefill == parallel


@pytest.mark.parametrize(
    ("key", "value"),
    [("parallel_prefill", True), ("graph_capacities", [4]), ("graph_capacities", []), ("exchange", "routed")],
)
def test_what_has_no_effect_without_shards_is_refused(key: str, value: Any) -> None:
    line = refusal({key: value, "max_degree": 1}, 2)
    assert line == f"nanocp: {key} has no effect with max_degree 1, for nothing is sharded; leave it out"
    assert parse({key: value, "max_degree": 2}, 2)
    config = parse({"max_degree": 1, "parallel_prefill": False, "graph_capacities": None}, 2)
    assert parse(config.to_dict(), 1) == config


@pytest.mark.parametrize(
    ("key", "value"), [("graph_capacities", []), ("graph_capacities", [4]), ("exchange", "routed")]
)
def test_what_is_for_gpus_is_refused_on_cpu(key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    for name, here in (("is_cpu", True), ("is_cuda", False)):
        monkeypatch.setattr(current_platform, name, lambda here=here: here)
    args = SimpleNamespace(additional_config={"nanocp": {key: value}}, data_parallel_size=2)
    with pytest.raises(NanoCPConfigError, match=f"^nanocp: {key} .*on CPU is not supported: "):
        make(args, lambda: pytest.fail("vLLM was asked"))


def test_the_routed_exchange_needs_places() -> None:
    assert parse({"exchange": "routed"}, 2).exchange == "routed"
    with pytest.raises(NanoCPConfigError, match="graph_capacities"):
        parse({"exchange": "routed", "graph_capacities": []}, 2)


def test_settings_do_not_change_where_compiled_code_is_kept(tiny_model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_nanocp.plugin

    vllm_nanocp.plugin.register()

    def create(segment_size: int, **other: Any) -> Any:
        additional = {"nanocp": {"ranks": 2, "segment_size": segment_size}, **other}
        return EngineArgs(
            model=tiny_model, enable_expert_parallel=True, enforce_eager=True, additional_config=additional
        ).create_engine_config()

    def copies(config: Any) -> list[Any]:
        """As in workers, and as vLLM makes one for a model inside of another."""
        return [config, pickle.loads(pickle.dumps(config)), config.with_hf_config(config.model_config.hf_config)]

    for one, two in zip(copies(create(512)), copies(create(1024)), strict=True):
        assert (of(one).segment_size, of(two).segment_size) == (512, 1024)
        assert one.compute_hash() == two.compute_hash()
    other = create(512, other=1)
    assert isinstance(other.additional_config, dict) and other.compute_hash() != create(1024, other=1).compute_hash()
