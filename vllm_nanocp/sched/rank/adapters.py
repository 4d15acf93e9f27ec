# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters at one rank: at most ``max_loras`` are active in a step, and requests from other ranks count.

vLLM's scheduler lets waiting requests start as long as those that run leave a slot for their adapter, and takes for
granted that those that run never have too many. Here requests also come to run from other ranks, and those that are
about to leave may stay. Their adapters keep their slots. So do those of prompts that run and get nothing of the step at
hand, which vLLM's scheduler does not count. Touches vLLM 0.32's ``Scheduler.lora_config`` and
``Scheduler._handle_blocked_waiting_request``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .sessions import is_idle

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


def adapter_of(request: Request) -> int | None:
    """By number; None if it has none."""
    return request.lora_request.lora_int_id if request.lora_request is not None else None


def _adapters(requests: Iterable[Request]) -> set[int]:
    return {number for request in requests if (number := adapter_of(request)) is not None}


@dataclass
class Slots:
    """What vLLM's scheduler asks of the LoRA configuration.

    Attributes:
        max_loras: adapters that may be active in the step at hand.
    """

    max_loras: int


class AdapterDoors(_Base):
    """Mixed into vLLM's scheduler: the slots of adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_adapters = None if self.lora_config is None else self.lora_config.max_loras
        if self.max_adapters is not None:
            self.lora_config: Any = Slots(self.max_adapters)
        # Requests that do not run here and may in the next step: those about to leave; adapters of those to arrive.
        self._leaving: dict[str, Request] = {}
        self._coming: dict[str, int | None] = {}
        # Adapters that have a slot in the step at hand, and how many of those that run were looked at for it.
        self._active: set[int] = set()
        self._seen = 0

    def reserve_adapters(self) -> None:
        """Before a step: those of requests that do not run now and may in the next step keep their slots."""
        if self.max_adapters is not None:
            reserved, running = _adapters(self._leaving.values()) | self._coming_adapters(), _adapters(self.running)
            self.lora_config.max_loras = self.max_adapters - len(reserved - running)
            self._active, self._seen = reserved | running, len(self.running)

    def has_adapter_slot(self, request: Request) -> bool:
        """In a step: whether a request that waits may have its adapter beside those that have a slot now."""
        if self.max_adapters is None or request.lora_request is None:
            return True
        self._active |= _adapters(self.running[self._seen :])  # that have started in this step
        self._seen = len(self.running)
        return len(self._active) < self.max_adapters or adapter_of(request) in self._active

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return self.has_adapter_slot(request) and super()._handle_blocked_waiting_request(request)

    def adapters(self) -> frozenset[int]:
        """Those that run here or are about to. Sessions that wait for their client need none."""
        if self.max_adapters is None:
            return frozenset()
        queued = (request for request in chain(self.waiting, self.kv_holding_waiting) if not is_idle(request))
        return frozenset(_adapters(chain(self.running, queued, self._leaving.values())) | self._coming_adapters())

    def _coming_adapters(self) -> set[int]:
        return {adapter for adapter in self._coming.values() if adapter is not None}
