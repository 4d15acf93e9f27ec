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

from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_SAMPLE: set[str] = {"e8615af5c2189933"}  # 0.32.0
_KNOWN_BOOKKEEPING: set[str] = {"e00dbc91b181727b"}  # 0.32.0


def apply() -> Outcome:
    """Let the CPU model runner rewind random generators. Idempotent.

    Raises `PatchError` if the runner's sampling or bookkeeping is not the known one.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    return replace(
        __name__,
        Guarded(CPUModelRunner, "_sample", _KNOWN_SAMPLE, _rewinding),
        Guarded(CPUModelRunner, "_bookkeeping_sync", _KNOWN_BOOKKEEPING, _without_unfinished),
    )


def _rewinding(sample: Any) -> Any:
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = {row: generator.get_state() for row, generator in _unfinished(self).items()}
        result = sample(self, *args, **kwargs)
        for row, state in states.items():
            self.input_batch.generators[row].set_state(state)
        return result

    return _sample


def _without_unfinished(bookkeep: Any) -> Any:
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _unfinished(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    return _bookkeeping_sync


def _unfinished(runner: Any) -> dict[int, Any]:
    """Generators of the rows whose sampled token will be dropped, by row."""
    discarded = runner.discard_request_mask.np
    return {row: generator for row, generator in runner.input_batch.generators.items() if discarded[row]}
