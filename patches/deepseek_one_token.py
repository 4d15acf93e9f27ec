# SPDX-License-Identifier: Apache-2.0
"""One token of a rank with tensor parallelism, in models of the DeepSeek family.

Wrong upstream (https://github.com/vllm-project/vllm/issues/50154): with data, expert and tensor parallelism
`DeepseekV2DecoderLayer.forward` (vllm/model_executor/models/deepseek_v2.py) leaves its result cut over the tensor-
parallel workers, ceil(tokens / size) rows each. The next layer, and the model at its end, find out whether it is cut by
whether it has as many rows as there are positions. One token is one row either way: worker 0 goes on with the token and
the others with their padding, and the tokens are wrong. Compiled code assumes two tokens or more and always gathers,
which is right.

Versions: 0.32.0, 0.33.0.

Repair: a layer's result for one token is gathered at once, so that it is whole as the next layer takes it to be.

Can go: when layers are told whether their input is cut (https://github.com/vllm-project/vllm/pull/50691).
"""

from __future__ import annotations

from typing import Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

_KNOWN_FORWARD: set[str] = {"1a400f32120b8f9e"}  # 0.32.0


def apply() -> Outcome:
    """Let layers give a single token whole. Idempotent.

    Raises `PatchError` if `DeepseekV2DecoderLayer.forward` is not the known one.
    """
    from vllm.model_executor.models import deepseek_v2

    return replace(__name__, Guarded(deepseek_v2.DeepseekV2DecoderLayer, "forward", _KNOWN_FORWARD, _whole))


def _whole(original: Any) -> Any:
    from vllm.model_executor.models import deepseek_v2

    def forward(self: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, residual = original(self, positions, *args, **kwargs)
        if self.use_sequence_parallel_moe and positions.shape[0] == 1:
            hidden_states, residual = (
                deepseek_v2.tensor_model_parallel_all_gather(rows, 0)[:1] for rows in (hidden_states, residual)
            )
        return hidden_states, residual

    return forward
