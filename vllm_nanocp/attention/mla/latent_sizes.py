# SPDX-License-Identifier: Apache-2.0
"""The sizes of a layer of multi-head latent attention, and what is cheaper by them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentSizes:
    """Attributes:
    num_heads: of this worker.
    unrotated, rotated: numbers of a head's query, in this order.
    rank: of a latent, behind which the cache has ``rotated`` numbers of the key.
    value_size: of a head's result.
    """

    num_heads: int
    unrotated: int
    rotated: int
    rank: int
    value_size: int

    @property
    def query_size(self) -> int:
        return self.unrotated + self.rotated

    @property
    def projected_size(self) -> int:
        """Numbers of a head's key and value as ``kv_b_proj`` makes them, and of the whole key beside them."""
        return self.unrotated + self.value_size + self.query_size

    def absorbs(self, rows: int) -> bool:
        """Whether it is less work for so many queries to attend in the latents' space than to project the latents, for
        each key and head."""
        inner = self.unrotated + self.value_size
        return rows * (2 * self.rank - inner) <= self.rank * inner

    def absorbed_bytes(self, rows: int, pieces: int, item_bytes: int) -> int:
        """Of a launch of so many absorbed queries: these, their float32 results in pieces, merged, and the float32
        values of what is merged.

        Args:
            rows: queries.
            pieces: that a row is cut into.
            item_bytes: of a number of the model's.
        """
        return rows * self.num_heads * (self.rank * (2 * item_bytes + 4 * pieces) + 4 * self.value_size)
