# SPDX-License-Identifier: Apache-2.0
"""A vLLM plugin for tests: workers that fail, and repairs for stock vLLM. Put this folder on ``PYTHONPATH``.

``NANOCP_TEST_HOOK`` says what it does, in every process that loads vLLM's plugins: a JSON object with

- ``repair``: apply the CPU repairs of ``vllm_nanocp.patches``, without which stock vLLM has no data-parallel experts
  on CPU;
- ``audit``: a folder. While it has a file ``armed``, each process writes there what the pickles that it loads name, and
  which file of ``CARRIERS`` has them loaded (None: another);
- ``where``, ``worker``, ``armed``: the worker of that number in the world raises in ``init`` (before it joins the
  world), in ``load`` (of the model), or in a ``step`` (in the middle of its layers): once the file ``armed`` exists,
  for which the first two wait.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAILURE = "a failure that a test has asked for"
LAYERS_FIRST = 2
ARMED_LIMIT_S = 60.0
# What loads pickles that engine, schedulers and workers send each other: vLLM's queues, and the parts of a step, which
# only the rank that they are for decodes, after the queue has brought them.
CARRIERS = ("vllm/distributed/device_communicators/shm_broadcast.py", "vllm_nanocp/step_messages.py")
_audited = False


def register() -> None:
    """The entry point; does nothing unless the environment asks for it."""
    wanted = json.loads(os.environ.get("NANOCP_TEST_HOOK", "{}"))
    if wanted.get("repair"):
        from vllm_nanocp import patches

        patches.apply_all()
    if "audit" in wanted:
        _audit(Path(wanted["audit"]))
    where = wanted.get("where")
    if where == "init":
        _fail_in("init_device", wanted["worker"], wanted["armed"])
    elif where == "load":
        _fail_in("load_model", wanted["worker"], wanted["armed"])
    elif where == "step":
        _fail_in_step(wanted["worker"], wanted["armed"])


def _audit(folder: Path) -> None:
    global _audited
    if _audited:
        return
    _audited = True
    armed = folder / "armed"

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event != "pickle.find_class" or not armed.exists():
            return
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.endswith(CARRIERS):
            frame = frame.f_back
        carrier = frame and next(name for name in CARRIERS if frame.f_code.co_filename.endswith(name))
        line = json.dumps({"name": ".".join(map(str, args)), "carrier": carrier})
        with (folder / f"{os.getpid()}.jsonl").open("a") as sink:
            sink.write(line + "\n")

    sys.addaudithook(hear)


def _fail_in(method: str, victim: int, armed: str) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    whole = getattr(CPUWorker, method)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "global_rank", self.rank) == victim:
            end = time.monotonic() + ARMED_LIMIT_S
            while not os.path.exists(armed) and time.monotonic() < end:
                time.sleep(0.05)
            raise RuntimeError(FAILURE)
        return whole(self, *args, **kwargs)

    setattr(CPUWorker, method, failing)


def _fail_in_step(victim: int, armed: str) -> None:
    from torch.distributed import get_rank
    from vllm.model_executor.layers.attention.attention import Attention

    forward = Attention.forward
    seen = 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if os.path.exists(armed) and get_rank() == victim:
            seen += 1
            if seen > LAYERS_FIRST:
                raise RuntimeError(FAILURE)
        return forward(self, *args, **kwargs)

    Attention.forward = failing
