# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --nanocp`` ends with one line when its engine has failed, whoever notices first."""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.cli import serve as cli_serve
from vllm.v1.engine.core_client import BackgroundResources
from vllm.v1.engine.utils import CoreEngineProcManager

from vllm_nanocp.entry import exit_code
from vllm_nanocp.errors import REFUSAL_FILE, NanoCPConfigError

LINE = "error: nanocp: the engine has failed; the log above says why\n"
LIMIT_S = 20.0


@pytest.fixture
def monitored(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """vLLM's monitor, which sees an engine die and then takes its time to end what is left: seen, and all ended."""
    seen, ended = threading.Event(), threading.Event()

    def monitor(manager: Any) -> None:
        manager.failed_proc_name = "EngineCore"
        seen.set()
        assert ended.wait(LIMIT_S)

    monkeypatch.setattr(CoreEngineProcManager, "monitor_engine_liveness", monitor)
    # As if nothing were installed in this process.
    for owner, name in ((BackgroundResources, "validate_alive"), (cli_serve, "wait_for_completion_or_failure")):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    monkeypatch.setattr(exit_code, "_failed", False)
    monkeypatch.setattr(exit_code, "_managers", [])
    return seen, ended


def run(serve: Callable[[argparse.Namespace], None]) -> None:
    exit_code.watched(serve)(argparse.Namespace())


def test_the_launcher_ends_before_its_monitor(
    monitored: tuple[threading.Event, threading.Event], capsys: pytest.CaptureFixture[str]
) -> None:
    """An API server ends when it has heard of the failure, and by that vLLM's launcher wakes up."""
    seen, ended = monitored
    manager = SimpleNamespace(failed_proc_name=None)
    threads = []

    def serve(args: argparse.Namespace) -> None:
        threads.append(threading.Thread(target=CoreEngineProcManager.monitor_engine_liveness, args=(manager,)))
        threads[0].start()
        assert seen.wait(LIMIT_S)
        raise RuntimeError("Engine core process EngineCore died unexpectedly.")

    with pytest.raises(SystemExit) as end:
        run(serve)
    assert end.value.code == 1 and capsys.readouterr().err == LINE
    ended.set()
    threads[0].join(LIMIT_S)


@pytest.mark.usefixtures("monitored")
@pytest.mark.parametrize(
    ("exitcode", "ends_s"), [(1, 0.1), (-9, 0.1), (0, 0.1), (None, None), pytest.param(1, 1.0, id="behind its workers")]
)
def test_api_servers_end_before_their_engine(
    exitcode: int | None, ends_s: float | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have heard of its failure; vLLM's launcher wakes up by the end of one, before the engine has ended."""
    sentinel, end = os.pipe()
    joined = []
    process = SimpleNamespace(sentinel=sentinel, exitcode=exitcode, join=joined.append)
    monkeypatch.setattr(exit_code, "_managers", [SimpleNamespace(failed_proc_name=None, processes=[process])])
    monkeypatch.setattr(exit_code, "_MOMENT_S", 0.5)
    # An engine whose scheduler has failed waits so long for its workers.
    monkeypatch.setattr(exit_code, "_TERMINATED_S", 0.0)
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")

    def died() -> None:
        if ends_s is not None:
            threading.Timer(ends_s, os.close, [end]).start()
        raise RuntimeError("Process ApiServer_0 died with exit code None")

    monkeypatch.setattr(cli_serve, "wait_for_completion_or_failure", died)

    def serve(args: argparse.Namespace) -> None:
        cli_serve.wait_for_completion_or_failure()

    with pytest.raises(SystemExit if exitcode else RuntimeError):
        run(serve)
    assert capsys.readouterr().err == (LINE if exitcode else "")
    assert len(joined) == (exitcode is not None)
    os.close(sentinel)


@pytest.mark.usefixtures("monitored")
def test_other_failures_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def serve(args: argparse.Namespace) -> None:
        raise RuntimeError("Process ApiServer_0 died with exit code 3")

    with pytest.raises(RuntimeError, match="ApiServer_0"):
        run(serve)
    run(lambda args: None)
    assert not capsys.readouterr().err


def _refused(args: argparse.Namespace) -> None:
    """As vLLM does: a worker's error is logged, and its own follows."""
    code = "from vllm_nanocp.errors import refuse; refuse('this', 'that', 'do so')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1
    raise RuntimeError("Engine core initialization failed. See root cause above.")


@pytest.mark.usefixtures("monitored")
def test_a_refusal_of_a_worker_is_what_the_server_ends_with() -> None:
    with pytest.raises(NanoCPConfigError) as error:  # one line: ``cli._excepthook``
        run(_refused)
    assert str(error.value) == "nanocp: this is not supported: that; do so"
    assert REFUSAL_FILE not in os.environ
