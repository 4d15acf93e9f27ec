# SPDX-License-Identifier: Apache-2.0
"""A seeded request whose prompt takes several chunks, on CPU.

Wrong upstream: a chunk that does not end the prompt is sampled from like any row and its token is
dropped; to take back what the request's random generator spent on it,
`GPUModelRunner._bookkeeping_sync` (vllm/v1/worker/gpu_model_runner.py), which the CPU runner inherits,
rewinds the generator's offset. CPU generators have none:
`RuntimeError: CPU Generator does not use offset`, in the worker, and the engine dies. One request with
`seed` and a prompt longer than `--max-num-batched-tokens` is enough.

Versions: 0.32.0, 0.33.0.

Repair: the CPU runner keeps the generator's state from before sampling for such rows, puts it back
after, and hides those generators from the bookkeeping.

Can go: when the CPU runner rewinds its generators itself.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_nanocp.patches._guard import Outcome, require_source

_MODULE = "cpu_seeded_chunks"
_MARK = "_nanocp_patch"
_KNOWN_SAMPLE: set[str] = {"e8615af5c2189933"}  # 0.32.0
_KNOWN_BOOKKEEPING: set[str] = {"e00dbc91b181727b"}  # 0.32.0


def apply() -> Outcome:
    """Let the CPU model runner rewind random generators. Idempotent.

    Raises `PatchError` if the runner's sampling or bookkeeping is not the known one.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(CPUModelRunner._sample, _MARK):
        return Outcome.APPLIED
    require_source(_MODULE, GPUModelRunner._sample, _KNOWN_SAMPLE)
    require_source(_MODULE, GPUModelRunner._bookkeeping_sync, _KNOWN_BOOKKEEPING)
    sample, bookkeep = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = {row: generator.get_state() for row, generator in _unfinished(self).items()}
        result = sample(self, *args, **kwargs)
        for row, state in states.items():
            self.input_batch.generators[row].set_state(state)
        return result

    @functools.wraps(bookkeep)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _unfinished(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    setattr(_sample, _MARK, True)
    CPUModelRunner._sample = _sample  # type: ignore[method-assign]
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync  # type: ignore[method-assign]
    return Outcome.APPLIED


def _unfinished(runner: Any) -> dict[int, Any]:
    """Generators of the rows whose sampled token will be dropped, by row."""
    discarded = runner.discard_request_mask.np
    return {row: generator for row, generator in runner.input_batch.generators.items() if discarded[row]}
