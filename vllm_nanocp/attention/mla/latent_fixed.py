# SPDX-License-Identifier: Apache-2.0
"""The tables of sharded steps of latent attention at fixed addresses and of fixed size: a graph captured with them
serves every decode step that fits. As ``fixed_tables.py``; but FlashAttention attends, which wants block ids in one
table, so those of the rows in use are copied."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..flash_launches import (
    BUSY,
    ShardLaunch,
    empty_numbers,
    hidden_tokens,
    lengths_without,
    places_of,
    split_numbers,
    table_address,
    visited_places,
)
from ..partial_rows import RowLayout
from ..row_routes import RowRoutes
from ..sharded_step import ShardedStep
from .flash_latent import Absorbed
from .flash_mla import FLASH_ATTENTION
from .latent_kernel import LatentKernel
from .latent_sizes import LatentSizes
from .latent_tables import LatentRows

# Bytes of float32 results that a launch may take.
_ROOM = 1 << 30
# Block ids that a program copies.
_BLOCK = 1024


@triton.jit(do_not_specialize=["table_stride"])
def _copy_kernel(rows_ptr, table_ptr, table_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = rows_ptr + tl.program_id(0) * 3
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, source, count = tl.load(row), tl.load(row + 1).to(tl.pointer_type(tl.int32)), tl.load(row + 2)
    blocks = tl.load(source + at, mask=at < count, other=0)
    tl.store(table_ptr + place * table_stride + at, blocks, mask=at < count)


def empty_block_table(
    capacity: int, num_ranks: int, max_tokens: int, block_size: int, device: torch.device
) -> torch.Tensor:
    """For tables of at most this capacity.

    Args:
        capacity: the largest.
        num_ranks: N.
        max_tokens: of a request.
        block_size: tokens a block holds.
        device: where it is.
    """
    size = places_of(capacity, num_ranks), -(-max_tokens // block_size)
    return torch.zeros(size, dtype=torch.int32, device=device)


class _Parts(NamedTuple):
    """What changes from step to step, as parts of one piece of memory, or how many numbers each has.

    Attributes:
        send, pick, tokens: see ``LatentRows``.
        visiting: rows of the batch that visit; for an unused one, a spare row.
        hidden: tokens that the table of a row of the batch has before those that the row's place attends to; none
            without drafts, where lengths are the plan's.
        lengths: KV tokens that the queries at a place attend to.
        copies: of each row of block ids to copy its place, address, and how many.
    """

    send: Any
    pick: Any
    tokens: Any
    visiting: Any
    hidden: Any
    lengths: Any
    copies: Any


def warm_up(device: torch.device) -> None:
    """Compile what copies block ids now, not in front of the first long request."""
    block = torch.zeros(1, dtype=torch.int32, device=device)
    row = async_tensor_h2d([0, block.data_ptr(), 1], device, torch.int64)
    _copy_kernel[(1, 1)](row, torch.zeros_like(block), 1, BLOCK=_BLOCK)


def pieces_of(places: int, sizes: LatentSizes) -> int:
    """Most pieces of a row for a launch of so many: with few heads one long row can take all SMs."""
    return max(1, min(BUSY, _ROOM // (4 * places * sizes.num_heads * sizes.rank)))


def parts_of(places: int, most: int) -> list[slice]:
    """The places of each launch: about as many in each, and no more than the kernel serves well. They begin at
    multiples of 16, so that kernels compiled at start serve them all: Triton has others for other alignments."""
    size = min(most, cdiv(cdiv(places, cdiv(places, most)), 16) * 16)
    return [slice(at, min(at + size, places)) for at in range(0, places, size)]


def spans_of(here: int, places: int, queries: int, most: int) -> list[tuple[slice, bool]]:
    """The places of each launch, and whether it is causal: rows of several queries that are a rank's own see what is
    before each of these, guests see all that is held here. Single queries need no mask.

    Args:
        here: the first place of a rank's own.
        places: how many there are.
        queries: of a place.
        most: rows of a launch.
    """
    kinds = [(0, places, False)] if queries == 1 else [(0, here, False), (here, places, True)]
    return [
        (slice(first + part.start, first + part.stop), causal)
        for first, end, causal in kinds
        for part in parts_of(end - first, most)
    ]


def places_memory(
    capacity: int, num_ranks: int, queries: int, sizes: LatentSizes, dtype: torch.dtype, kernel: LatentKernel
) -> int:
    """Bytes that a layer takes for all places outside of graphs, over the routed exchange: those of whichever launch
    takes most. A smaller one may be cut into more pieces.

    Args:
        capacity, num_ranks, queries: of the tables.
        sizes: of the layers.
        dtype: of queries.
        kernel: attends.
    """
    launches = spans_of(capacity * num_ranks, places_of(capacity, num_ranks), queries, kernel.most_rows)
    return max(
        max(sizes.absorbed_bytes(rows, pieces_of(rows, sizes), dtype.itemsize), kernel.memory(rows, sizes, dtype))
        for rows in (queries * (part.stop - part.start) for part, _ in launches)
    )


class FixedLatentTables:
    """Tables for steps with at most ``capacity`` visits between any two ranks, of as many queries each; places, and
    rows of these, as in ``CapturedTables``.

    Args:
        capacity: visits of a pair of ranks at most, and rows of a rank that visit.
        num_ranks: N.
        max_reqs: most rows of a batch.
        block_table: int32 [at least as many places, most blocks of a request], for this step's ids; tables of several
            capacities may share one, for a step uses one of them.
        sizes: of the layers.
        block_size: tokens a block holds.
        dtype: of queries.
        kernel: attends to what is held here.
        queries: of a row that visits.
        routes: of the routed exchange, whose places are of one query, so as many times more; None without it.
        ends: whether rows of the batch end with its own lengths, which only the device knows; with several queries.
    """

    def __init__(
        self,
        capacity: int,
        num_ranks: int,
        max_reqs: int,
        block_table: torch.Tensor,
        sizes: LatentSizes,
        block_size: int,
        dtype: torch.dtype,
        kernel: LatentKernel = FLASH_ATTENTION,
        queries: int = 1,
        routes: RowRoutes | None = None,
        ends: bool = False,
    ) -> None:
        assert queries == 1 or kernel.takes(queries, sizes)
        self._ends = ends or queries > 1
        assert routes is None or routes.capacity == capacity * queries
        self.routes = routes
        device = block_table.device
        places, layout = places_of(capacity, num_ranks), RowLayout(sizes.num_heads, sizes.value_size)
        self.capacity, self.num_ranks, self.max_reqs, self.queries = capacity, num_ranks, max_reqs, queries
        self._layers, self._kernel = (sizes, block_size, dtype), kernel
        self._sizes = _Parts(
            send=places * queries, pick=capacity * queries * (num_ranks + 1), tokens=capacity * queries,
            visiting=capacity, hidden=capacity, lengths=places, copies=3 * places,
        )  # fmt: skip
        # What changes from step to step comes in one copy.
        self._ints = empty_numbers(self._sizes, device)
        self._at = _Parts(*split_numbers(self._ints, self._sizes))
        self._block_table = block_table[:places]
        self._lengths = torch.zeros(places, dtype=torch.int32, device=device)
        self._empty = torch.ones((places, queries), dtype=torch.bool, device=device)
        # Keys that a row has to see: of vLLM's own launch and of a causal one, which were never asked for fewer than
        # its queries, as many as these.
        self._fewest = max(kernel.fewest, queries if queries > 1 else 0)
        self._fixed = [
            Absorbed(
                slice(part.start * queries, part.stop * queries),
                self._make_launch(part, causal),
                self._empty[part].flatten(),
            )
            for part, causal in spans_of(capacity * num_ranks, places, queries, kernel.most_rows)
        ]
        self._seq_lens = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        # The routed exchange has rows of its own.
        self._partials = layout.empty(places * queries if routes is None else 0, device)

    def _make_launch(self, part: slice, causal: bool) -> ShardLaunch:
        sizes, block_size, _ = self._layers
        count, queries, device = part.stop - part.start, self.queries, self._lengths.device
        return ShardLaunch(
            num_queries=count * queries,
            query_starts=torch.arange(0, count * queries + 1, queries, dtype=torch.int32, device=device),
            lengths=self._lengths[part],
            block_table=self._block_table[part],
            max_queries=queries,
            max_length=self._block_table.shape[1] * block_size,
            causal=causal,
            max_pieces=pieces_of(count * queries, sizes),
        )

    def fill(self, step: ShardedStep, common: CommonAttentionMetadata) -> tuple[LatentRows, torch.Tensor]:
        """Write a step's tables. All rows that visit have ``queries`` queries.

        Args:
            step: this rank's part; nowhere more visits than the capacity.
            common: vLLM's metadata of the batch, padded as the graph is.

        Returns:
            The tables, without ``plain``; and the batch's lengths with 0 for rows that visit, or the fewest keys that
            the kernel takes, int32 [num_reqs]. The same tensors each time.
        """
        host, table, at = np.zeros(len(self._ints), dtype=np.int64), self._block_table, self._at
        laid = _Parts(*split_numbers(host, self._sizes))
        copies = self._lay_out(step, common, laid)
        async_tensor_h2d(host, out=self._ints)
        self._lengths.copy_(at.lengths)
        if self._ends:
            self._end_with_the_batch(common)
        # A causal row has a key for each query, also where nobody visits.
        unused = at.lengths if self.queries > 1 else self._lengths
        torch.eq(unused.unsqueeze(1).expand(-1, self.queries), 0, out=self._empty)
        if self._kernel.fewest:  # of whichever block was there before
            self._lengths.clamp_(min=self._kernel.fewest)
        if len(copies):
            grid = (len(copies), triton.cdiv(int(copies[:, 2].max()), _BLOCK))
            _copy_kernel[grid](at.copies, table, table.stride(0), BLOCK=_BLOCK)
        if self.routes is not None:
            self._route(self.routes, step, laid, copies[:, 0])
        for work in self._fixed:
            self._kernel.schedule(work.launch, *self._layers)
        return LatentRows(
            sizes=self._layers[0],
            kernel=self._kernel,
            send=at.send,
            exchanged=self.capacity * self.num_ranks * self.queries,
            send_counts=None,
            recv_counts=None,
            guests=[],
            own=[],
            partials=self._partials,
            tokens=at.tokens,
            pick=at.pick.view(self.capacity * self.queries, -1),
            fixed=self._fixed,
            routed=self.routes,
        ), lengths_without(at.visiting, common, self._seq_lens, self._fewest)

    def _route(self, routes: RowRoutes, step: ShardedStep, laid: _Parts, places: np.ndarray) -> None:
        """Write the step's route from what is laid out: a place of these tables is ``queries`` of the route's.

        Args:
            routes: of this step's capacity.
            step: this rank's part.
            laid: the tables, on the host.
            places: int64 [any], those in use here.
        """
        results, queries = len(step.own) * self.queries, np.arange(self.queries)
        routes.fill(
            step.serial,
            laid.pick.reshape(-1, self.num_ranks + 1)[:results],
            laid.tokens[:results],
            (places[:, None] * self.queries + queries).reshape(-1),
        )

    def _end_with_the_batch(self, common: CommonAttentionMetadata) -> None:
        """What rows see of their last run ends with the batch's own lengths: with async scheduling the plan's count
        drafts that have turned out to be wrong. An unused place of several queries sees as many keys."""
        own = self._lengths[self.capacity * self.num_ranks :]
        self._seq_lens[: common.num_reqs] = common.seq_lens
        torch.sub(self._seq_lens.index_select(0, self._at.visiting), self._at.hidden, out=own)
        own.clamp_(min=self.queries if self.queries > 1 else 0)

    def _lay_out(self, step: ShardedStep, common: CommonAttentionMetadata, at: _Parts) -> np.ndarray:
        """Which places a step uses, and what is attended to at them.

        Args:
            step, common: see ``fill``.
            at: to write to; zeros.

        Returns:
            int64 [rows, 3], the block ids to copy.
        """
        queries, each = self.queries, np.arange(self.queries)
        rows = np.array([own.batch_row() for own in step.own], dtype=np.int64)
        mine, here = len(rows), self.capacity * self.num_ranks + np.arange(len(rows))
        token = common.query_start_loc_cpu.numpy()[rows].astype(np.int64)[:, None] + each
        pick, send = at.pick.reshape(self.capacity, queries, -1), at.send.reshape(-1, queries)
        pick[:], at.tokens[:], at.visiting[:] = -1, -1, self.max_reqs
        pick[:mine, :, 0], send[here] = here[:, None] * queries + each, token
        at.tokens.reshape(-1, queries)[:mine], at.visiting[:mine] = token, rows
        row, column, place = visited_places(step, self.capacity, queries)
        pick[row, :, column], send[place] = place[:, None] * queries + each, token[row]
        if self._ends:
            at.hidden[:mine] = hidden_tokens(step, rows.tolist(), common)
        seen = [
            (guest.home * self.capacity + guest.index // queries, guest.blocks.data_ptr(), guest.length)
            for guest in step.guests
        ]
        seen += [
            (place, table_address(common, row, own.first_block), own.local_tokens + queries)
            for place, row, own in zip(here.tolist(), rows.tolist(), step.own, strict=True)
        ]
        copies = np.array(seen, dtype=np.int64).reshape(-1, 3)
        at.lengths[copies[:, 0]] = copies[:, 2]
        block_size = self._layers[1]
        copies[:, 2] = -(-copies[:, 2] // block_size)
        at.copies[: copies.size] = copies.reshape(-1)
        return copies
