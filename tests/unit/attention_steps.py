# SPDX-License-Identifier: Apache-2.0
"""Whole steps of the attention backend over several ranks, without an engine.

A scenario says which requests there are, where their blocks lie and which queries each rank computes. Every rank
derives the same scenario from a seed, keeps its own part of the KV in vLLM's paged cache (written by vLLM's own
operation; all else in the cache is NaN), and runs the real metadata builder, plan, exchange and attention. The
reference is full attention in float64.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from vllm_nanocp.attention.context import context
from vllm_nanocp.attention.gqa.cpu_backend import NanoCPCPUAttentionImpl, NanoCPCPUAttentionMetadataBuilder
from vllm_nanocp.exchange import CollectiveExchange
from vllm_nanocp.plan import Holder, PlanRow, StepPlan
from vllm_nanocp.worker.rank_step import ShardTable, make_step

if TYPE_CHECKING:
    from vllm_nanocp.attention.gqa.routed_layer import Routes

LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype = torch.float32
    block_size: int = 32
    isa: str = "vec"
    cache_dtype: str = "auto"
    nearest = False  # how a cache of float8 rounds
    decodes_first = False  # whether batches have rows that are decoded before all others

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a head of queries, keys and values."""
        return self.head_size, self.head_size, self.head_size

    @property
    def result_width(self) -> int:
        """Numbers of a head of the output."""
        return self.head_size

    def from_cache(self, first: int, queries: int) -> int | None:
        """How many of a row's keys are read from the cache, where the others are the batch's own; None: all."""
        return None

    def cache_size(self, num_blocks: int) -> tuple[int, ...]:
        return num_blocks, self.num_kv_heads, self.block_size, 2 * self.head_size

    def attention(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        """The whole, in float64: query i sees keys 0 to ``first`` + i."""
        return full_attention(queries, keys, values, first, self.scale)

    @property
    def cache_scales(self) -> tuple[float, float]:
        """Keys and values are divided by these before a float8 cache keeps them."""
        return (0.02, 0.03) if self.cache_dtype.startswith("fp8") else (1.0, 1.0)

    @property
    def cache_type(self) -> torch.dtype:
        """As vLLM allocates it."""
        return self.dtype if self.cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[self.cache_dtype]

    @property
    def scale(self) -> float:
        return 0.8 * self.head_size**-0.5  # not the default, so that it must be passed on


@dataclass(frozen=True)
class Shard:
    """A run of a request's blocks: where, which, and their ids there."""

    rank: int
    first_block: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Queries of this step: positions ``first`` to ``first + num_queries`` - 1, all within shard ``shard``."""

    request: int
    shard: int
    first: int
    num_queries: int


@dataclass
class Scenario:
    """The same on all ranks.

    Attributes:
        tokens: of each request, those of this step's queries included.
        shards: of each request, in order; the last one is open.
        rows: in the order of the plan.
        batches: for each rank, indices of its rows, in the order of its batch.
    """

    shape: Shape
    seed: int
    num_ranks: int
    num_blocks: int
    tokens: list[int] = field(default_factory=list)
    shards: list[list[Shard]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    # Drafts of the step before, which the plan takes to be right and which were not; and the queries of a row that is
    # decoded. Where a batch has these rows first, a longer one is a prompt's chunk, which no drafts are before.
    wrong: int = 0
    decoded: int = 1

    def wrong_before(self, row: Row) -> int:
        return 0 if self.shape.decodes_first and row.num_queries > self.decoded else self.wrong

    def qkv(self, request: int, layer: int) -> list[torch.Tensor]:
        """Query, key and value of all of a request's tokens: [tokens, heads, head_size]."""
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed * 1000 + request * 10 + layer)
        # Scores with a standard deviation of about 2: some keys count much more than others.
        return [
            (1.6 * torch.randn(self.tokens[request], n, width, generator=generator)).to(shape.dtype)
            for n, width in zip(shape.heads, shape.widths, strict=True)
        ]

    def plan(self) -> StepPlan:
        """What the scheduler would send."""
        plan = StepPlan()
        block_size = self.shape.block_size
        for row in self.rows:
            shards = self.shards[row.request]
            if row.shard == 0:
                continue
            home = shards[row.shard]
            plan.rows.append(
                PlanRow(
                    req_id=str(self.rows.index(row)),
                    home=home.rank,
                    num_queries=row.num_queries,
                    first_block=home.first_block,
                    local_tokens=row.first - home.first_block * block_size + self.wrong_before(row),
                    holders=tuple(
                        Holder(s.rank, f"{self.seed}.{row.request}#{i}", len(s.blocks) * block_size)
                        for i, s in enumerate(shards[: row.shard])
                    ),
                )
            )
        for request, shards in enumerate(self.shards):
            for i, shard in enumerate(shards[:-1]):
                plan.opened.setdefault(shard.rank, []).append((f"{self.seed}.{request}#{i}", list(shard.blocks)))
        return plan


def make_scenario(
    shape: Shape,
    seed: int,
    num_ranks: int = 3,
    sharded: bool = True,
    decode_only: bool = False,
    plain_prefill: bool = False,
    queries: int = 1,
) -> Scenario:
    """A random one. Of every three with shards, one has a rank without rows of its own.

    With ``decode_only`` every row has ``queries`` and visits at most N - 1 shards: what a captured graph serves. With
    ``plain_prefill`` too, rows that visit nobody may have more: what fixed tables serve outside of graphs.
    """
    decoded = queries
    dice = random.Random(seed)
    size, num_blocks = shape.block_size, 80
    scenario = Scenario(shape, seed, num_ranks, num_blocks, decoded=decoded)
    # Block 0 is vLLM's null block, which stands for blocks held elsewhere.
    free = [dice.sample(range(1, num_blocks), num_blocks - 1) for _ in range(num_ranks)]
    idle = dice.randrange(num_ranks) if sharded and seed % 3 == 0 and num_ranks > 1 else None

    def add(ranks: list[int], whole_blocks: list[int], last_tokens: int) -> int:
        """A request with whole shards and, at the last rank, ``last_tokens`` tokens."""
        shards, at = [], 0
        for rank, count in zip(ranks, [*whole_blocks, -(-last_tokens // size)], strict=True):
            shards.append(Shard(rank, at, tuple(free[rank].pop() for _ in range(count))))
            at += count
        scenario.shards.append(shards)
        scenario.tokens.append(sum(whole_blocks) * size + last_tokens)
        return len(scenario.tokens) - 1

    def tail(request: int, queries: int) -> None:
        """The queries are the request's last tokens."""
        scenario.rows.append(
            Row(request, len(scenario.shards[request]) - 1, scenario.tokens[request] - queries, queries)
        )

    homes = [rank for rank in range(num_ranks) if rank != idle]
    for _ in range(dice.randint(0, 4)):
        held = max(decoded, dice.randint(1, 3 * size))
        queries = dice.choice([decoded, decoded, held, dice.randint(1, held)])
        tail(add([dice.choice(homes)], [], held), decoded if decode_only and not plain_prefill else queries)
    kinds = ["decode"] if decode_only else ["decode", "chunk", "chain"]
    for kind in dice.choices(kinds, k=dice.randint(1, 4)) if sharded else []:
        home = dice.choice(homes)
        # Any degree; now and then several shards at one rank, or one at the home besides its own.
        others = [r for r in range(num_ranks) if r != home]
        holders = dice.sample(others, dice.randint(1, len(others))) if others else []
        if dice.random() < 0.3 or not others:
            holders.append(home if decode_only else dice.randrange(num_ranks))
        whole = [dice.randint(1, 4) for _ in holders]
        held = dice.choice([1, dice.randint(1, 3 * size), size, 2 * size])
        held = max(held, decoded)
        request = add([*holders, home], whole, held)
        if kind == "decode":
            tail(request, decoded)
        elif kind == "chunk":
            tail(request, dice.choice([held, dice.randint(1, held)]))
        else:  # two consecutive chunks in one step, the second attending to the first
            tail(request, held)
            before = len(holders) - 1
            if holders[before] != idle:
                queries = dice.randint(1, whole[-1] * size)
                scenario.rows.append(Row(request, before, sum(whole) * size - queries, queries))
    dice.shuffle(scenario.rows)
    for rank in range(num_ranks):
        mine = [i for i, row in enumerate(scenario.rows) if scenario.shards[row.request][row.shard].rank == rank]
        batch = dice.sample(mine, len(mine))
        if shape.decodes_first:
            batch.sort(key=lambda i: scenario.rows[i].num_queries > decoded)
        scenario.batches.append(batch)
    scenario.wrong = seed % decoded
    return scenario


def make_builder(shape: Shape) -> NanoCPCPUAttentionMetadataBuilder:
    """A metadata builder without the engine's configuration."""
    builder = object.__new__(NanoCPCPUAttentionMetadataBuilder)
    values: dict[str, Any] = {
        "isa": shape.isa,
        "block_size": shape.block_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        # With patches/cpu_cache_dtype.py, a narrower cache's.
        "dtype": shape.dtype if shape.dtype.itemsize == 2 or shape.cache_type == torch.uint8 else shape.cache_type,
        "window_size": -1,
        "kv_cache_dtype": shape.cache_dtype,
        "is_cross_attention": False,
        "is_encoder_only_attention": False,
    }
    for name, value in values.items():
        setattr(builder, name, value)
    return builder


def make_impl(shape: Shape) -> NanoCPCPUAttentionImpl:
    """An attention implementation without the engine's configuration."""
    impl = object.__new__(NanoCPCPUAttentionImpl)
    values: dict[str, Any] = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "num_queries_per_kv": shape.num_heads // shape.num_kv_heads,
        "head_size": shape.head_size,
        "scale": shape.scale,
        "alibi_slopes": None,
        "sliding_window": -1,
        "logits_soft_cap": 0,
        "kv_cache_dtype": shape.cache_dtype,
        "is_fp8_kv_cache": shape.cache_dtype.startswith("fp8"),
        "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
        "sinks": None,
        "use_zentorch_sdpa": False,
    }
    for name, value in values.items():
        setattr(impl, name, value)
    return impl


def make_layer(shape: Shape) -> Any:
    """What the implementation reads of vLLM's attention layer."""
    keys, values = shape.cache_scales
    return SimpleNamespace(isa=shape.isa, _k_scale_float=keys, _v_scale_float=values)


def empty_cache(shape: Shape, num_blocks: int) -> torch.Tensor:
    """A cache of NaN: whatever is read of it without having been written shows."""
    size = shape.cache_size(num_blocks)
    if shape.cache_type == torch.uint8:
        return torch.full(size, 0x7F, dtype=torch.uint8)  # NaN in both kinds of float8
    return torch.full(size, float("nan"), dtype=shape.cache_type)


def kept(shape: Shape, numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """What a cache keeps of keys or values: of float8 the next number towards zero, as vLLM's CPU kernel rounds, or the
    nearest, as on GPUs."""
    if shape.cache_type != torch.uint8:
        narrower = shape.cache_type.itemsize < shape.dtype.itemsize
        return numbers.to(shape.cache_type).to(shape.dtype) if narrower else numbers
    kind = torch.float8_e5m2 if shape.cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
    if shape.nearest:
        return (numbers.float() / scale).clamp(-448, 448).to(kind).double() * scale
    table = torch.arange(128, dtype=torch.uint8).view(kind).float()
    table = table[table.isfinite()]
    size = (numbers.float() * (1 / torch.tensor(scale, dtype=torch.float32))).abs().clamp(max=table[-1])
    at = torch.searchsorted(table, size.contiguous(), right=True) - 1
    return (table[at].copysign(numbers.float()) * scale).to(torch.float64)


def seen(shape: Shape, numbers: torch.Tensor, scale: float, row: Row) -> torch.Tensor:
    """Keys or values as a row's queries see them."""
    read = shape.from_cache(row.first, row.num_queries)
    if read is None:
        return kept(shape, numbers, scale)
    return torch.cat([kept(shape, numbers[:read], scale).double(), numbers[read:].double()])


def slots(shape: Shape, shard: Shard, first: int, end: int) -> torch.Tensor:
    """Where vLLM keeps positions ``first`` to ``end`` - 1, all of them in the shard."""
    positions = torch.arange(first, end)
    blocks = torch.tensor(shard.blocks)[positions // shape.block_size - shard.first_block]
    return blocks * shape.block_size + positions % shape.block_size


def full_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float
) -> torch.Tensor:
    """Float64. Query i sees keys 0 to ``first`` + i. All [tokens, heads, head_size]."""
    group = queries.shape[1] // keys.shape[1]
    q = queries.double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    hidden = torch.arange(len(keys))[None, :] > first + torch.arange(len(q))[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@dataclass(frozen=True)
class Kernel:
    """An attention backend under test, without the engine's configuration.

    Attributes:
        builder, impl, layer: for a shape; ``layer`` is what the implementation reads of vLLM's attention layer.
        write: keys and values into a cache, as the backend keeps them: (impl, layer, keys, values, cache, slots).
        device: of all tensors.
        forward: runs the implementation: (impl, layer, query, key, value, cache, metadata, output).
        capacity: see ``ShardedStep``.
        pad: rows that batches are padded to, as for a graph.
        fill: what a cache holds where nothing was written.
        stock: attention of one row over all its keys, to compare errors with.
        replays: whether ``forward`` replays a graph.
        routes: makes the routed exchange of a capacity for a shape, the same call on all ranks: (shape, number of
            ranks, rank); None: the collective one.
        exchange: of a group, the collective one.
        groups: of heads, each with an exchange of its own.
        queries: that requests are decoded with.
    """

    builder: Callable[[Shape], Any]
    impl: Callable[[Shape], Any]
    layer: Callable[[Shape], Any]
    write: Callable[..., None]
    device: torch.device
    forward: Callable[..., None]
    capacity: int = 0
    pad: int = 0
    fill: float = float("nan")
    stock: Callable[..., torch.Tensor] | None = None
    replays: bool = False
    routes: Callable[[Shape, int, int], Routes] | None = None
    exchange: Callable[[Any], CollectiveExchange] = CollectiveExchange
    groups: int = 1
    queries: int = 1


CPU_KERNEL = Kernel(
    make_builder,
    make_impl,
    make_layer,
    lambda impl, *args: impl.do_kv_cache_update(*args),
    torch.device("cpu"),
    lambda impl, *args: impl.forward(*args),
)


# One for each layer, as in a model, for all scenarios of a shape that this process runs.
_impls: dict[Shape, list[Any]] = {}


class RankSimulation:
    """One rank's part of a scenario.

    Attributes:
        counts: what was computed here, by kind; for the test to see that it tests something.
        errors: largest absolute error of each row.
    """

    def __init__(
        self, scenario: Scenario, rank: int, exchange: CollectiveExchange, kernel: Kernel = CPU_KERNEL
    ) -> None:
        self.scenario, self.rank, self.exchange, self.kernel = scenario, rank, exchange, kernel
        self.counts: Counter[str] = Counter()  # and, in floats, summed squares of errors
        self.errors: list[float] = []
        self.rows = [scenario.rows[i] for i in scenario.batches[rank]]

    def _common(self) -> CommonAttentionMetadata:
        """What vLLM's model runner hands to the builder."""
        scenario, shape = self.scenario, self.scenario.shape
        # A rank without tokens runs a dummy batch of one request, as vLLM makes it.
        lengths = [row.num_queries for row in self.rows] or [self.kernel.queries]
        ends = [row.first + row.num_queries for row in self.rows] or [self.kernel.queries]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        table = torch.zeros(len(lengths), 40, dtype=torch.int32)
        mapping = []
        for i, row in enumerate(self.rows):
            shard = scenario.shards[row.request][row.shard]
            table[i, shard.first_block : shard.first_block + len(shard.blocks)] = torch.tensor(shard.blocks)
            mapping.append(slots(shape, shard, row.first, row.first + row.num_queries))
        seq_lens, tokens = torch.tensor(ends, dtype=torch.int32), sum(lengths)
        wrong = [scenario.wrong_before(row) for row in self.rows] or [scenario.wrong]
        most = seq_lens + torch.tensor(wrong, dtype=torch.int32)
        if spare := max(0, self.kernel.pad - len(lengths)):  # as vLLM pads for a graph: rows without queries
            starts = torch.cat([starts, starts[-1:].repeat(spare)])
            seq_lens, most = (torch.cat([x, x.new_zeros(spare)]) for x in (seq_lens, most))
            table = torch.cat([table, table.new_zeros(spare, 40)])
            tokens = self.kernel.pad * self.kernel.queries
        device = self.kernel.device
        return CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(device),
            num_reqs=len(seq_lens),
            num_actual_tokens=tokens,
            max_query_len=max(lengths),
            max_seq_len=max(ends),
            block_table_tensor=table.to(device),
            slot_mapping=(torch.cat(mapping) if mapping else torch.tensor([-1] * lengths[0])).to(device),
            seq_lens_cpu_upper_bound=most,
        )

    def _past(self, impl: Any, cache: torch.Tensor, layer: int) -> None:
        """Write what earlier steps left here: all tokens of this rank's shards but this step's queries."""
        scenario, shape = self.scenario, self.scenario.shape
        for request, shards in enumerate(scenario.shards):
            _, keys, values = scenario.qkv(request, layer)
            for index, shard in enumerate(shards):
                if shard.rank != self.rank:
                    continue
                first = shard.first_block * shape.block_size
                end = min(first + len(shard.blocks) * shape.block_size, scenario.tokens[request])
                for row in scenario.rows:
                    if (row.request, row.shard) == (request, index):
                        end = min(end, row.first)
                if end > first:
                    part = slice(first, end)
                    mapping = slots(shape, shard, first, end)
                    self._write(impl, keys[part], values[part], cache, mapping)

    def _write(
        self, impl: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, mapping: torch.Tensor
    ) -> None:
        kernel, device = self.kernel, self.kernel.device
        layer = kernel.layer(self.scenario.shape)
        kernel.write(impl, layer, keys.to(device), values.to(device), cache, mapping.to(device))

    def run(self) -> None:
        """All layers of the step."""
        scenario, kernel, shape = self.scenario, self.kernel, self.scenario.shape
        builder, layer = kernel.builder(shape), kernel.layer(shape)
        impls = _impls.setdefault(shape, [kernel.impl(shape) for _ in range(LAYERS)])
        plan = scenario.plan()
        shards = ShardTable(self.rank, kernel.device)
        shards.update(plan)
        batch = [str(i) for i in scenario.batches[self.rank]]
        calls = self.exchange.calls
        context.exchange, context.queries = self.exchange, kernel.queries
        context.step = make_step(plan, shards, scenario.num_ranks, batch.index)
        if context.step is not None and kernel.capacity:
            visits = plan.most_visits(scenario.num_ranks, kernel.queries)
            assert visits is not None and visits <= kernel.capacity
            context.step.capacity = kernel.capacity
            context.step.serial = scenario.seed
            if kernel.routes is not None:
                context.routes = {kernel.capacity: kernel.routes(shape, scenario.num_ranks, self.rank)}
        try:
            common = self._common()
            metadata = builder.build(0, common)
            assert (getattr(metadata, "sharded", None) is not None) == bool(plan.rows)
            for number, impl in enumerate(impls):
                self._layer(impl, layer, number, common, metadata)
        finally:
            context.step = context.exchange = None
            context.routes, context.queries = {}, 1
        if not kernel.replays and kernel.routes is None:
            assert self.exchange.calls - calls == (2 * LAYERS * kernel.groups if plan.rows else 0)
        guests = sum(h.rank == self.rank for row in plan.rows for h in row.holders)
        self.counts["guests"] += guests
        self.counts["idle with guests"] += bool(guests) and not self.rows

    def _layer(self, impl: Any, layer: Any, number: int, common: CommonAttentionMetadata, metadata: Any) -> None:
        scenario, shape, device = self.scenario, self.scenario.shape, self.kernel.device
        cache = empty_cache(shape, scenario.num_blocks).to(device)
        cache.nan_to_num_(self.kernel.fill)
        for row in self.rows:
            if row.shard == 0:
                # vLLM's kernel reads a last block to its end and weighs what is past the length with zero, which a
                # NaN survives.
                cache[list(scenario.shards[row.request][0].blocks)] = 100 if cache.dtype == torch.uint8 else 1000.0
        self._past(impl, cache, number)
        whole = [scenario.qkv(row.request, number) for row in self.rows]
        parts = [
            [x[row.first : row.first + row.num_queries] for x in qkv] for row, qkv in zip(self.rows, whole, strict=True)
        ]
        sizes = list(zip(shape.heads, shape.widths, strict=True))
        if parts:
            joined = [torch.cat(x) for x in zip(*parts, strict=True)]
        else:
            joined = [torch.randn(self.kernel.queries, n, width).to(shape.dtype) for n, width in sizes]
        # As the model has them: slices of one projection.
        fused = torch.cat([x.flatten(1) for x in joined], dim=1)
        if (padded := self.kernel.pad * self.kernel.queries) > len(fused):
            fused = torch.cat([fused, fused.new_full((padded - len(fused), fused.shape[1]), 7.0)])
        split = fused.split([n * width for n, width in sizes], dim=1)
        query, key, value = (x.view(-1, *size) for x, size in zip(split, sizes, strict=True))
        if self.rows:
            written = len(common.slot_mapping)  # the rest is padding
            self._write(impl, key[:written], value[:written], cache, common.slot_mapping)
        output = query.new_full((*query.shape[:2], shape.result_width), float("nan")).to(device)
        inputs = (query.to(device), key.to(device), value.to(device))
        self.kernel.forward(impl, layer, *inputs, cache, metadata, output)
        output = output.cpu()
        at = 0
        for row, (queries, keys, values) in zip(self.rows, whole, strict=True):
            end = row.first + row.num_queries
            keys, values = (seen(shape, x, s, row) for x, s in zip((keys, values), shape.cache_scales, strict=True))
            expected = shape.attention(queries[row.first : end], keys[:end], values[:end], row.first)
            error = (output[at : at + row.num_queries].double() - expected).abs()
            if self.kernel.stock is not None and row.shard:
                stock = self.kernel.stock(queries[row.first : end], keys[:end], values[:end], row.first, shape.scale)
                wrong = (stock.double() - expected).square().sum().item()
                part = " decode" if row.num_queries == self.kernel.queries else " prefill"
                for name in ("", part):
                    self.counts["norm" + name] += expected.square().sum().item()
                    self.counts["ours" + name] += error.square().sum().item()
                    self.counts["stock" + name] += wrong
            self.errors.append(error.max().item() if error.isfinite().all() else float("inf"))
            at += row.num_queries
            kind = "plain" if row.shard == 0 else "sharded"
            self.counts[f"{kind} {'decode' if row.num_queries == self.kernel.queries else 'prefill'}"] += 1
            local_past = row.first - scenario.shards[row.request][row.shard].first_block * shape.block_size
            self.counts["no local past"] += bool(row.shard) and local_past == 0


def run_scenarios(
    rank: int,
    size: int,
    groups: dict[str, list[tuple[Shape, int, bool]]],
    kernel: Callable[[], Kernel] = lambda: CPU_KERNEL,
) -> dict[str, tuple[dict[str, int], list[tuple[int, float]]]]:
    """For each group of (shape, seed, sharded): counts, and (seed, largest error) of each scenario at this rank."""
    used = kernel()
    exchange = used.exchange(dist.group.WORLD)
    results: dict[str, tuple[dict[str, int], list[tuple[int, float]]]] = {}
    for name, specs in groups.items():
        counts: Counter[str] = Counter()
        errors: list[tuple[int, float]] = []
        for shape, seed, sharded in specs:
            scenario = make_scenario(shape, seed, size, sharded, bool(used.capacity), not used.pad, used.queries)
            simulation = RankSimulation(scenario, rank, exchange, used)
            simulation.run()
            counts += simulation.counts
            errors.append((seed, max(simulation.errors, default=0.0)))
        results[name] = dict(counts), errors
    return results
