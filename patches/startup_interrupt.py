# SPDX-License-Identifier: Apache-2.0
"""A server that is told to stop while its engine starts.

Wrong upstream: `zmq_socket_ctx` (vllm/utils/network_utils.py), within which `launch_core_engines` waits for the engines
to start, takes a `KeyboardInterrupt` for the end of its body. `vllm serve` with one API server raises one when SIGTERM
or Ctrl-C comes before it serves. It is lost: the server goes on to start as if nothing had come; or, if an engine has
not yet been told what it is to know, both wait for each other until the engine is given up, after
VLLM_ENGINE_READY_TIMEOUT_S, ten minutes.

Versions: 0.32.0, 0.33.0.

Repair: the exception goes on once the socket is closed, so the client ends the engines and the server itself.

It concerns front-ends; where configurations are made it is applied with those that concern these.

Can go: when `zmq_socket_ctx` lets exceptions pass.

Near it upstream: https://github.com/vllm-project/vllm/pull/52299, for engines that are told to stop while they start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN = {"d309150aee7a7a0d"}  # 0.32.0


def apply() -> Outcome:
    """Let an interrupt end the start of an engine. Idempotent.

    Raises `PatchError` if `zmq_socket_ctx` is not the known one.
    """
    from vllm.v1.engine import utils

    return replace(__name__, Guarded(utils, "zmq_socket_ctx", _KNOWN, _passing_interrupts))


def _passing_interrupts(original: Any) -> Any:
    @contextlib.contextmanager
    def zmq_socket_ctx(*args: Any, **kwargs: Any) -> Iterator[Any]:
        interrupt: KeyboardInterrupt | None = None
        with original(*args, **kwargs) as socket:
            try:
                yield socket
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    return zmq_socket_ctx
