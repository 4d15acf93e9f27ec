# SPDX-License-Identifier: Apache-2.0
"""How a snapshot gets from the scheduler to the front-end: inside vLLM's ``SchedulerStats``.

Touches vLLM 0.32's ``SchedulerStats.num_kv_fetch_reqs_by_stage`` (``vllm/v1/metrics/stats.py``). The front-end decodes
the statistics by the types of their fields, so a payload needs a field of vLLM's. This one counts requests by
stage of a KV connector, and there are no connectors with nanocp. vLLM's loggers look up the stages that they know, and
log only counts above zero, so a key of another name with a count of zero is seen by nobody: the payload is that key,
as text. ``kv_connector_stats``, which may hold anything, would not do: vLLM's default logger fails on one that comes
without a connector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from vllm.logger import init_logger

from .collector import Snapshot

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm.nanocp.metrics")

PREFIX = "nanocp:"


def attach(stats: SchedulerStats, snapshot: Snapshot) -> None:
    """Let a snapshot ride along. One a message."""
    text = msgspec.json.encode(snapshot.to_payload()).decode()
    stats.num_kv_fetch_reqs_by_stage[PREFIX + text] = 0


def take(stats: SchedulerStats) -> Snapshot | None:
    """Take the snapshot out again, so that who reads the statistics later finds them as vLLM made them.

    Returns:
        None when there is none, or it cannot be read: statistics must not stop answers, which pass through the same
        loop.
    """
    stages = stats.num_kv_fetch_reqs_by_stage
    key = next((key for key in stages if key.startswith(PREFIX)), None)
    if key is None:
        return None
    del stages[key]
    try:
        return Snapshot.from_payload(msgspec.json.decode(key[len(PREFIX) :]))
    except (msgspec.MsgspecError, ValueError, AttributeError, TypeError) as error:
        logger.warning_once("nanocp: metrics of a step were dropped: %s", str(error))
        return None
