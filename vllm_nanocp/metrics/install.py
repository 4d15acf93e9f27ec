# SPDX-License-Identifier: Apache-2.0
"""Puts the stat logger beside vLLM's own, in engines with nanocp.

Touches, in vLLM 0.32: ``StatLoggerManager.__init__`` (``vllm/v1/metrics/loggers.py``), through which ``AsyncLLM`` and
``LLMEngine`` get their loggers. vLLM's entry points for stat loggers (``vllm.stat_logger_plugins``) are not used:

* one that is only installed makes every ``AsyncLLM`` collect statistics, and export vLLM's metrics, in spite of
  ``--disable-log-stats``, and without nanocp as well;
* ``LLM`` does not load them;
* they are made before vLLM's Prometheus logger, which then removes their metrics for having vLLM's prefix.
"""

from __future__ import annotations

from typing import Any

from .. import config as nanocp_config
from ..wrapping import to_wrap, wraps


def install() -> None:
    """From now on, engines with nanocp export its metrics if they export vLLM's. Idempotent."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    init = to_wrap(StatLoggerManager, "__init__", __name__)
    if init is None:
        return

    @wraps(init, __name__)
    def init_and_add(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if nanocp_config.wanted(vllm_config.additional_config):
            from .prometheus import NanoCPStatLogger

            self.stat_loggers.append(NanoCPStatLogger(vllm_config, self.engine_indexes))

    StatLoggerManager.__init__ = init_and_add  # type: ignore[method-assign]
