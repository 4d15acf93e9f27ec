# SPDX-License-Identifier: Apache-2.0
"""What a family of attention must give to be cut into shards, and the one order of work in a layer.

A family is a way to attend that has partial results: an output over some keys, and the log-sum-exp of its scores, from
which the whole follows (``merge.py``). What a key is, how a query travels and in which kernel it attends are the
family's. The step plan, the exchange and the merge by log-sum-exp are the same for all.

``Family`` is what a worker asks once, ``ShardedLayer`` what each layer of a sharded step is asked. ``attend`` is the
order: what a rank can do without the others it does while queries travel, since in ``combine`` each waits for all.

Two things that no family has yet would fit here. Attention that first looks for the best keys (sparse attention) needs
a round trip more: another dispatch and combine of scores before ``queries``. A window needs a first key visible for
each query beside a shard's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..exchange import Exchange
from ..exchange.base import Counts

if TYPE_CHECKING:
    from .partial_rows import RowLayout


class ShardedLayer(Protocol):
    """One layer's attention in a sharded step of this rank. Its calls come in the order in which they stand here.

    Attributes:
        send_counts, recv_counts: see ``Exchange``.
        partials: contiguous, room for the rows that come back; None: the exchange has room of its own.
    """

    @property
    def send_counts(self) -> Counts: ...

    @property
    def recv_counts(self) -> Counts: ...

    @property
    def partials(self) -> torch.Tensor | None: ...

    def queries(self) -> torch.Tensor:
        """What visits other shards: [rows to send, num_heads, query size], in the exchange's order."""
        ...

    def plain(self) -> None:
        """Attention of the rows that visit nobody, written to the output: vLLM's own."""
        ...

    def own(self) -> None:
        """Partial results of the rows that visit, over what is held here."""
        ...

    def serve(self, visiting: torch.Tensor) -> torch.Tensor:
        """Partial results of other ranks' queries over the shards that they visit here, each a row.

        Args:
            visiting: [rows to receive, num_heads, query size].

        Returns:
            [rows to receive, ...]: outputs and natural log-sum-exps, float32, laid out as the family likes.
        """
        ...

    def finish(self, partials: torch.Tensor) -> None:
        """Merge what has come back with ``own``, and write it to the output.

        Args:
            partials: a row for each query sent, in that order.
        """
        ...


def attend(layer: ShardedLayer, exchange: Exchange) -> None:
    """A layer's attention over the collective exchange. All ranks call it for the same layers, in the same order."""
    arrive = exchange.dispatch(layer.queries(), layer.send_counts, layer.recv_counts)
    layer.plain()
    layer.own()
    answers = layer.serve(arrive())
    layer.finish(exchange.combine(answers, layer.recv_counts, layer.send_counts, layer.partials))


class Family(Protocol):
    """A family of attention on one platform, as a worker sees it.

    Attributes:
        cache_dtypes: values of ``--kv-cache-dtype`` that it reads.
    """

    cache_dtypes: tuple[str, ...]

    def register(self) -> None:
        """Put this package's backend in the stock one's place, in this process, before the model is built."""
        ...

    def problem(self, layer: Any) -> tuple[str, str] | None:
        """What of a loaded attention layer cannot be sharded, and why; None: all can."""
        ...

    def shape(self, layer: Any) -> tuple[Any, ...]:
        """What must be the same for all layers, since exchange and memory are laid out for one."""
        ...

    def attach(self, layers: Mapping[str, Any]) -> None:
        """Take the loaded layers over, where a backend alone cannot."""
        ...


class GPUFamily(Family, Protocol):
    """A family on GPUs, where memory, kernels and graphs are made ready at start.

    Attributes:
        layout: of a partial result as a row, on this worker.
        query_bytes: of one query of this worker's heads.
        unrouted: why it takes the routed exchange only where that is asked for; empty if it does without.
    """

    layout: RowLayout
    query_bytes: int
    unrouted: str

    def prepare(self, device: torch.device) -> None:
        """Check that the kernels return what they should, and compile what every sharded step runs.

        Raises:
            NanoCPConfigError
        """
        ...

    def routes(self, capacity: int, num_ranks: int, rank: int, queries: int, allocate: Callable[[int], Any]) -> Any:
        """The routed exchange of a capacity: its memory, for good, and its kernels. A collective of the ranks.

        Args:
            capacity, num_ranks, queries: see ``tables``.
            rank: this one.
            allocate: memory of so many bytes that all ranks reach, see ``exchange/symmetric.py``.
        """
        ...

    def tables(self, capacity: int, num_ranks: int, max_reqs: int, device: torch.device, queries: int) -> Any:
        """Tables of fixed size, for sharded steps of decodes. The family's builder of metadata fills them.

        Args:
            capacity: visits between any two ranks.
            num_ranks: N.
            max_reqs: most rows of a batch.
            device: where they are.
            queries: of a row: as requests are decoded with, or 1 for the later forwards of a draft model.
        """
        ...

    def most_memory(self, num_ranks: int, max_tokens: int) -> int:
        """Bytes that a layer of the fullest sharded step takes beside stock attention's.

        Args:
            num_ranks: N.
            max_tokens: most tokens of a rank's batch.
        """
        ...

    def warm_up(self, layer: Any) -> None:
        """Compile the kernels of sharded steps of decodes. Nothing is sent.

        Args:
            layer: one of the model's, with its cache.
        """
        ...
