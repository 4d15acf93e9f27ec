# SPDX-License-Identifier: Apache-2.0
"""The few things this package needs of vLLM 0.32's model runners, one small adapter each."""

from __future__ import annotations

import functools
from typing import Any, Protocol

from ..attention.context import context


class RunnerAdapter(Protocol):
    """What the worker asks of a model runner."""

    def batch_row(self, req_id: str) -> int:
        """Index of a request in the batch being prepared."""
        ...

    def run_idle(self, attention: bool) -> None:
        """A forward pass without tokens of this rank's own, for the collectives of the others.

        Args:
            attention: whether attention must run too (guests, or the exchange's collectives).
        """
        ...


class V1Runner:
    """``vllm/v1/worker/gpu_model_runner.py``."""

    def __init__(self, model_runner: Any) -> None:
        self.model_runner = model_runner

    def batch_row(self, req_id: str) -> int:
        return int(self.model_runner.input_batch.req_id_to_index[req_id])

    def run_idle(self, attention: bool) -> None:
        self.model_runner._dummy_run(1, uniform_decode=True, force_attention=attention)


def _keep_sharded_steps_out_of_full_graphs() -> None:
    """Let V2's dispatcher see a sharded step as one that is no uniform decode. Idempotent.

    Full graphs are captured without the exchange; a step whose rows visit shards must run attention outside of a
    graph, in pieces or eagerly, on every rank. All ranks know the plan, so all agree.
    """
    from vllm.v1.worker.gpu import model_runner as module

    dispatch = module.dispatch_cg_and_sync_dp
    if hasattr(dispatch, "__wrapped__"):
        return

    @functools.wraps(dispatch)
    def dispatch_cg_and_sync_dp(
        manager: Any, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        if context.step is not None:
            uniform_token_count = None
            kwargs |= dict(max_query_len=None, uniform_decode=False)
        return dispatch(manager, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)

    module.dispatch_cg_and_sync_dp = dispatch_cg_and_sync_dp  # type: ignore[assignment]


class V2Runner:
    """``vllm/v1/worker/gpu/model_runner.py``. Its batch exists only inside a step: ``prepare_attn`` is handed it
    just before attention metadata is built, so the order of its requests is noted there."""

    def __init__(self, model_runner: Any) -> None:
        self.model_runner = model_runner
        _keep_sharded_steps_out_of_full_graphs()
        self._rows: dict[str, int] = {}
        prepare_attn = model_runner.prepare_attn

        def note_rows(input_batch: Any) -> Any:
            self._rows = {req_id: row for row, req_id in enumerate(input_batch.req_ids)}
            return prepare_attn(input_batch)

        model_runner.prepare_attn = note_rows

    def batch_row(self, req_id: str) -> int:
        return self._rows[req_id]

    def run_idle(self, attention: bool) -> None:
        self.model_runner._dummy_run(1, uniform_decode=True)  # always with attention
