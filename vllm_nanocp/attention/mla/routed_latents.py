# SPDX-License-Identifier: Apache-2.0
"""A layer of latent attention over the routed exchange: what ``attend`` of ``family.py`` does with the collective one,
with fixed tables. The vendor's kernel reads the visiting queries where the ranks have written them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..row_routes import RowRoutes
from .flash_latent import absorbed_results
from .latent_kernel import Latents
from .latent_tables import LatentRows


def attend_routed(
    routes: RowRoutes,
    rows: LatentRows,
    held: Latents,
    query: torch.Tensor,
    output: torch.Tensor,
    plain: Callable[[], None],
    layer: int,
) -> None:
    """All attention of a layer. All ranks call it for the same layers, in the same order.

    Args:
        routes: filled for the step.
        rows: the step's tables, fixed.
        held: what is attended to, all heads.
        query: [tokens, num_heads, query size].
        output: [tokens, num_heads, value_size], written to.
        plain: does the rows that visit nobody, while queries travel.
        layer: its number, the same on all ranks.
    """
    assert rows.fixed is not None
    routes.send(query, layer)
    plain()
    routes.arrive(layer)
    visiting = routes.visiting(query)
    for work in rows.fixed:
        outputs, lses = absorbed_results(visiting[work.part], held, work.launch)
        routes.answer(outputs, lses, work.empty, work.part.start, layer)
        del outputs, lses  # memory is set aside for one launch's
    routes.collect(output, layer)
