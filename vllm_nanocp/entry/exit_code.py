# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --nanocp`` ends with one line and exit code 1 when its engine fails.

Stock ``vllm serve`` with several data-parallel ranks ends with that code: its launcher sees an engine die. So it does
here with several API servers. With one, vLLM serves from the launching process itself, which stops as if it had been
told to, with exit code 0; a supervisor that restarts what has failed would leave it. Touches vLLM 0.32's
``BackgroundResources.validate_alive`` (the engine's last message), ``CoreEngineProcManager.monitor_engine_liveness``
(for an engine that could not send it) and ``serve.wait_for_completion_or_failure`` (where API servers may end first).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import connection
from typing import IO, Any

from ..errors import REFUSAL_FILE, NanoCPConfigError
from ..wrapping import to_wrap, wraps

# How long an engine that has failed takes to end, behind its API servers: vLLM's executor first waits for its workers
# as long as it is told to, and once more after SIGTERM.
_MOMENT_S = 5.0
_TERMINATED_S = 4.0
_failed = False
# Those whose engines this process watches.
_managers: list[Any] = []


def watched(serve: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """``serve``, followed by exit code 1 if the engine of this process has failed. Can be pickled if ``serve`` can."""
    return functools.partial(_run, serve)


def _run(serve: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    _install()
    with tempfile.NamedTemporaryFile("r", prefix="nanocp-refusal-") as refusal:
        os.environ[REFUSAL_FILE] = refusal.name
        try:
            _serve(serve, args, refusal)
        finally:
            del os.environ[REFUSAL_FILE]


def _serve(serve: Callable[[argparse.Namespace], None], args: argparse.Namespace, refusal: IO[str]) -> None:
    try:
        serve(args)
    except Exception as error:
        if isinstance(error, NanoCPConfigError):
            raise
        if line := refusal.read():  # a worker's, which vLLM has logged somewhere in a traceback
            raise NanoCPConfigError(line) from error
        # By others the launcher of several API servers ends; it has logged them.
        if not _has_failed():
            raise
    if _has_failed():
        print("error: nanocp: the engine has failed; the log above says why", file=sys.stderr, flush=True)
        raise SystemExit(1)


def _note_failure() -> None:
    global _failed
    _failed = True


def _has_failed() -> bool:
    # A manager says so before it has shut down what is left, which takes a while: others may end this process first.
    return _failed or any(manager.failed_proc_name is not None for manager in _managers)


def _look_at_engines() -> None:
    """The launcher is about to end. If an engine has failed, its API servers may have been the first to end: the engine
    then ends in a moment, or when its workers have, unless it is told to before."""
    import vllm.envs as envs

    limit = envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS + _TERMINATED_S + _MOMENT_S
    processes = [process for manager in _managers for process in manager.processes]
    ended = connection.wait([process.sentinel for process in processes], limit) if processes else []
    for process in processes:
        if process.sentinel in ended:
            process.join(_MOMENT_S)  # its exit code may come a little later
            if process.exitcode != 0:
                _note_failure()


def _install() -> None:
    """Notice, in this process, that an engine has failed. Idempotent."""
    from vllm.entrypoints.cli import serve
    from vllm.v1.engine.core_client import BackgroundResources
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.utils import CoreEngineProcManager

    validate = to_wrap(BackgroundResources, "validate_alive", __name__)
    if validate is None:
        return
    monitor, wait = CoreEngineProcManager.monitor_engine_liveness, serve.wait_for_completion_or_failure

    @wraps(validate, __name__)
    def validate_alive(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except EngineDeadError:
            _note_failure()
            raise

    @functools.wraps(monitor)
    def monitor_engine_liveness(self: Any) -> None:
        _managers.append(self)
        monitor(self)

    @functools.wraps(wait)
    def wait_for_completion_or_failure(*args: Any, **kwargs: Any) -> None:
        try:
            wait(*args, **kwargs)
        except Exception:
            _look_at_engines()
            raise

    serve.wait_for_completion_or_failure = wait_for_completion_or_failure
    BackgroundResources.validate_alive = validate_alive  # type: ignore[method-assign]
    CoreEngineProcManager.monitor_engine_liveness = monitor_engine_liveness  # type: ignore[method-assign]
