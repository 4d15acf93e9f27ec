# SPDX-License-Identifier: Apache-2.0
"""Every argument of vLLM's engine is classified, and the classification is true as far as it can be asked."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_nanocp.plugin
from tools import engine_flags
from tools.engine_flags import ENGINE, FRONT_END, REFUSED, REFUSED_VALUES, WORKS, Group
from vllm_nanocp.entry.refusals import FLAGS
from vllm_nanocp.errors import NanoCPConfigError

TESTS = Path(__file__).parent.parent
NO_FLAG = {"nanocp", "nanocp_config"}  # this package's own


def names(groups: tuple[Group, ...]) -> list[str]:
    return [name for group in groups for name in group.names]


def arguments() -> set[str]:
    """Of ``vllm serve``, the engine's among them."""
    vllm_nanocp.plugin.register()
    return set(vars(make_arg_parser(FlexibleArgumentParser()).parse_args([])))


def test_all_arguments_of_the_engine_are_classified() -> None:
    """A new version of vLLM brings new ones: they are to be looked at before it is supported."""
    known = {field.name for cls in (EngineArgs, AsyncEngineArgs) for field in dataclasses.fields(cls)}
    assert set(engine_flags.known_in(vllm.__version__, ENGINE)) == known
    assert [name for name, count in Counter(names(ENGINE)).items() if count > 1] == []


def test_all_arguments_of_the_front_end_are_classified() -> None:
    engine = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(engine_flags.known_in(vllm.__version__, FRONT_END)) == arguments() - engine - NO_FLAG
    assert [name for name, count in Counter(names(FRONT_END)).items() if count > 1] == []


@pytest.mark.parametrize("group", [*ENGINE, *FRONT_END], ids=lambda group: group.names[0])
def test_reasons_and_tests(group: Group) -> None:
    assert group.kind in engine_flags.MEANING
    if group.kind != WORKS:
        assert group.why and not group.test
        return
    file, name = group.test.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, group.test


def test_what_is_said_to_be_refused_has_a_value() -> None:
    refused = {name for group in (*ENGINE, *FRONT_END) if group.kind == REFUSED for name in group.names}
    assert refused <= set(REFUSED_VALUES)
    assert {flag.field for flag in FLAGS} <= set(REFUSED_VALUES)


def create(model: str, *flags: str) -> Any:
    """As ``vllm serve`` does."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    vllm_nanocp.plugin.register()
    common = ["--data-parallel-size", "2", "--enable-expert-parallel", "--nanocp", "--max-model-len", "4096"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", model, "--dtype", "float32", *common, *flags]
    )
    ServeSubcommand().validate(args)
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.fixture(autouse=True)
def _excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """``vllm serve --nanocp`` changes it."""
    import sys

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_what_is_said_to_be_refused_is(tiny_model: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, part = REFUSED_VALUES[name]
    try:
        create(tiny_model, "--" + name.replace("_", "-"), *values)
    except NanoCPConfigError as error:
        line = str(error)
    except SystemExit as end:
        assert end.code == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "nanocp:" in line]
    else:
        raise AssertionError(f"--{name} {values} is accepted")
    assert "is not supported: " in line and part in line and "; " in line
    assert line.endswith(engine_flags._refusal(name)) or name in ("distributed_executor_backend",)


def test_what_is_accepted(tiny_model: str) -> None:
    assert create(tiny_model).parallel_config.data_parallel_size == 1


def test_the_page_is_up_to_date() -> None:
    assert engine_flags.PAGE.read_text() == engine_flags.page(), "python -m tools.engine_flags"


# The parts of vLLM's configuration, by who looks at them here.
_REFUSALS = """model_config cache_config parallel_config scheduler_config compilation_config speculative_config
    diffusion_config kv_transfer_config ec_transfer_config aux_output_config"""
_WORKERS = "attention_config"  # a worker asks the attention that it has loaded
_NOBODY = """device_config load_config offload_config engram_config mamba_config kernel_config lora_config
    watermark_config structured_outputs_config observability_config logging_config quant_config profiler_config
    kv_events_config ec_manager_config reasoning_config additional_config instance_id optimization_level
    performance_mode weight_transfer_config shutdown_timeout"""
_NEWER = "watchdog_config"  # of 0.33; nobody looks at it


def test_all_parts_of_the_configuration_are_known() -> None:
    """Variables and models' defaults reach them without an argument."""
    from vllm.config import VllmConfig

    from vllm_nanocp.entry import engine_config, refusals

    known = {field.name for field in dataclasses.fields(VllmConfig)} - {_NEWER}
    assert {*_REFUSALS.split(), *_WORKERS.split(), *_NOBODY.split()} == known
    text = "".join(Path(module.__file__).read_text() for module in (engine_config, refusals))
    assert [name for name in _REFUSALS.split() if f".{name}" not in text] == []
    assert [name for name in _NOBODY.split() if f"c.{name}" in text] == []
