# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of queries and keys whose heads have a dimension of their own, on CPU.

Wrong upstream: `RotaryEmbedding.forward_cpu` (vllm/model_executor/layers/rotary_embedding/base.py; its subclasses
inherit it) hands queries and keys as they are to the in-place kernel `torch.ops._C.rotary_embedding`
(csrc/cpu/pos_encoding.cpp), whose comments allow [tokens, heads, head_size]. The kernel counts tokens as
`numel / size(-1)`, heads as `size(-1) / head_size`, and steps from token to token by `stride(-2)`. That is right for
[tokens, heads * head_size]. With heads apart it takes each head of a query for a token: all but the first few heads
are rotated by positions of other tokens, positions are read past their end, and a key with fewer heads than the query
has is rotated past its end, over other memory. Keys of several heads and sliced ones are stepped through by the wrong
stride as well. Multi-head latent attention passes [tokens, heads, 64] and [tokens, 1, 64], slices of wider tensors:
with `enforce_eager` (which uses this kernel; `torch.compile` does not) its tokens are wrong from the first on.
Rows that are not evenly apart ([batch, tokens, size] slices) and positions or rows whose elements are not adjacent are
misread likewise. The other rotary embeddings of that folder compute in PyTorch on CPU and are right.

Versions: 0.32.0, 0.33.0.

Repair: the kernel gets [tokens, heads * head_size], a view where one exists (then it is in place, as before), else a
copy, and adjacent positions. Results have the shapes that were given.

Can go: when the kernel reads the heads' own dimension and strides, as the one for GPUs does.

Of the same kind: https://github.com/vllm-project/vllm/pull/31643, which mended it for other models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_nanocp.patches._guard import Guarded, Outcome, replace

if TYPE_CHECKING:
    import torch

_KNOWN_FORWARD: set[str] = {"638568b7b0681c55"}  # 0.32.0


def apply() -> Outcome:
    """Give the CPU kernel of rotary embeddings the shapes that it reads rightly. Idempotent.

    Raises `PatchError` if `RotaryEmbedding.forward_cpu` is not the known one.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    return replace(__name__, Guarded(RotaryEmbedding, "forward_cpu", _KNOWN_FORWARD, _flat_rows))


def _flat_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query` and `key` [..., size] with tokens in the order of `positions`, rotated; shapes as given."""
        positions = positions.flatten().contiguous()
        tokens = positions.numel()
        flat_query, flat_key = _rows(query, tokens), None if key is None else _rows(key, tokens)
        original(self, positions, flat_query, flat_key)
        return flat_query.view(query.shape), None if key is None or flat_key is None else flat_key.view(key.shape)

    return forward_cpu


def _rows(numbers: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens, heads * head_size] of a query or key, its elements adjacent within a row; a view if there is one."""
    rows = numbers.reshape(tokens, -1) if tokens else numbers.reshape(0, numbers.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
