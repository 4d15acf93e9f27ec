# SPDX-License-Identifier: Apache-2.0
"""A step without drafts, of requests that are decoded with drafts and sampled with `top_k`.

Wrong upstream: where drafts are verified, V1's runner applies `top_k` to the logits of drafts apart from those of other
tokens, also in a step without drafts, as each prompt's is. `apply_top_k_only` (vllm/v1/sample/ops/topk_topp_sampler.py)
then asks for the largest of no numbers: `RuntimeError: max(): Expected reduction dim to be specified for input.numel()
== 0`, in the worker, and the engine dies. One request with a temperature and `top_k`, and without `top_p`, is enough.

Versions: 0.32.0, 0.33.0.

Repair: no rows are returned as they are.

Can go: when the function takes no rows.
"""

from __future__ import annotations

from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN: set[str] = {"4af02a4dad88c663"}  # 0.32.0


def apply() -> Outcome:
    """Let `top_k` be applied to no rows. Idempotent.

    Raises `PatchError` if `apply_top_k_only` is not the known one.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    return replace(__name__, Guarded(topk_topp_sampler, "apply_top_k_only", _KNOWN, _also_no_rows))


def _also_no_rows(original: Any) -> Any:
    def apply_top_k_only(logits: Any, k: Any) -> Any:
        return original(logits, k) if len(logits) else logits

    return apply_top_k_only
