# SPDX-License-Identifier: Apache-2.0
"""A client's wish for a rank: the header ``X-data-parallel-rank``, or ``data_parallel_rank`` of ``generate``.

vLLM sends such a request to the engine of that number. Here one engine has all ranks, so the number goes with the
request to the scheduler, where placement takes it as a hint. What is no rank is refused as vLLM does, which knows only
of one rank. Touches vLLM 0.32's ``InputProcessor.process_inputs``, which every front-end calls for every request, and
``Request.from_engine_core_request``, which drops the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import config as nanocp_config
from .wrapping import to_wrap, wraps

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

_HINT = "_nanocp_preferred_rank"


def preferred_rank(request: Request) -> int | None:
    """The rank that a request's client wishes for."""
    hint: int | None = getattr(request, _HINT, None)
    return hint


def prefer_rank(request: Request, rank: int | None) -> None:
    """Wish for a rank on a client's behalf."""
    setattr(request, _HINT, rank)


def install_front_end() -> None:
    """Let this process's front-end take numbers of all ranks. Idempotent; engines without nanocp are left alone."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    process = to_wrap(InputProcessor, "process_inputs", __name__)
    if process is None:
        return

    @wraps(process, __name__)
    def process_inputs(self: Any, *args: Any, data_parallel_rank: int | None = None, **kwargs: Any) -> Any:
        """All callers name the rank."""
        additional = self.vllm_config.additional_config
        if data_parallel_rank is None or not nanocp_config.wanted(additional):
            return process(self, *args, **kwargs, data_parallel_rank=data_parallel_rank)
        ranks = nanocp_config.of(self.vllm_config).ranks
        if not 0 <= data_parallel_rank < ranks:
            raise VLLMValidationError(f"data_parallel_rank {data_parallel_rank} is out of range [0, {ranks}).")
        request: EngineCoreRequest = process(self, *args, **kwargs)
        request.data_parallel_rank = data_parallel_rank
        return request

    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]


def install_engine() -> None:
    """Let this process's engine keep the number. Idempotent."""
    from vllm.v1.request import Request

    make = to_wrap(Request, "from_engine_core_request", __name__)
    if make is None:
        return

    @wraps(make, __name__)
    def from_engine_core_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(cls, request, *args, **kwargs)
        prefer_rank(made, request.data_parallel_rank)
        return made

    Request.from_engine_core_request = classmethod(from_engine_core_request)  # type: ignore[assignment]
