# SPDX-License-Identifier: Apache-2.0
"""How the KV of rows is cut into pieces that keep a GPU busy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Pieces begin at multiples of so many tokens.
TILE = 128
# What a row costs besides its tokens, in tiles: its query, its tables, its result.
ROW_COST = 1


def cut(lengths: Sequence[int] | np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give each program as much as the next, in pieces of rows (Stream-K): rows are laid end to end, and the line is
    cut into equal parts.

    Args:
        lengths: KV tokens of each row, not all of them 0.
        programs: how many share the work.

    Returns:
        int64 [num_pieces, 3], of each piece its row, first token and the one behind its last, row after row; there are
        no more pieces than rows and programs together. int64 [num_rows], how many pieces each row has. int64
        [programs + 1]: program i has pieces ``starts[i]`` to ``starts[i + 1]`` - 1.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    costs = np.where(tokens > 0, -(-tokens // TILE) + ROW_COST, 0)
    ends = np.cumsum(costs)
    bounds = np.arange(programs + 1) * ends[-1] // programs
    # A bound within what a row costs besides is one in front of the row.
    fronts = np.append(ends - costs, ends[-1])[np.searchsorted(ends, bounds, side="right")]
    bounds = np.where(bounds - fronts <= ROW_COST, fronts, bounds)
    points = np.unique(np.concatenate([bounds, ends]))
    rows = np.searchsorted(ends, points[:-1], side="right")
    first = (ends - costs + ROW_COST)[rows]
    begin, end = (np.maximum(at - first, 0) * TILE for at in (points[:-1], points[1:]))
    counts = np.bincount(rows, minlength=len(tokens))
    return np.stack([rows, begin, np.minimum(end, tokens[rows])], axis=1), counts, np.searchsorted(points, bounds)
