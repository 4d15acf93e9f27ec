# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: coefficients of a GPU with a model, and presets with where their figures come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Machine:
    """A step takes, in seconds,

        ``base + expert * (1 - (1 - active / experts) ** tokens of all ranks)``, with guests ``+ exchange``,
        with more visits than graphs have room for ``+ outside``,
        ``+ max over ranks(kv_token * KV tokens read + query * decodes + prompt * tokens of prompts computed
        + pair * (query, KV) pairs of prompts + guest * guests + opened * prompt tokens taken as computed)``

    and, with prompts, ``eager``, and ``spread`` for each of their tokens that all ranks compute, since each rank has
    experts of all. A pair whose query is another rank's counts as ``visit`` pairs.

    The second term is the experts whose weights a step reads, if tokens choose theirs at random. All ranks step
    together, so the slowest one counts.

    Attributes:
        name: of the preset.
        source: where its figures come from.
        base, expert, kv_token, query, prompt, spread, pair, guest, exchange: see above.
        opened: stock's time a prompt token for filling the KV of a prompt taken as computed; decode-only loads.
        frontend: seconds a prompt token before a request is at the scheduler.
        experts, active: of a layer, and how many a token takes.
        kv_heads: of a layer: tensor parallelism divides the KV among so many GPUs at most.
        capacity: KV tokens of a rank.
        split_kv_token, split_capacity: the plugin's of the two, whose attention is a kernel of its own.
        tensor_base: seconds of a step under tensor parallelism without experts and KV.
        tensor_kv_token: seconds a KV token of the whole batch takes there with as many GPUs as ``tensor_ranks``.
        tensor_ranks: that the two were measured with.
        outside: seconds more of a decode step that has more visits than graphs have room for.
        eager: seconds more of a step with prompts, which replays no whole graph.
        visit: what a pair costs where its query visits, next to one at home.
    """

    name: str
    source: str
    base: float
    expert: float
    kv_token: float
    split_kv_token: float
    query: float
    prompt: float
    spread: float
    pair: float
    guest: float
    exchange: float
    opened: float
    frontend: float
    experts: int
    active: int
    kv_heads: int
    capacity: int
    split_capacity: int
    tensor_base: float
    tensor_kv_token: float
    tensor_ranks: int
    outside: float = 0.0
    eager: float = 0.0
    visit: float = 1.0

    def seconds(
        self,
        kv: np.ndarray,
        decodes: np.ndarray,
        computed: np.ndarray,
        pairs: np.ndarray,
        guests: np.ndarray,
        opened: np.ndarray,
        captured: bool = True,
    ) -> float:
        """Of a step. Each argument but the last has a number a rank: KV tokens read, decodes, tokens of prompts
        computed, pairs, guests, tokens taken as computed; and whether graphs have room for its visits."""
        ranks = self.kv_token * kv + self.query * decodes + self.prompt * computed
        ranks = ranks + self.pair * pairs + self.guest * guests
        slowest = float((ranks + self.opened * opened).max())
        experts = self.expert * (1.0 - (1.0 - self.active / self.experts) ** float((decodes + computed).sum()))
        spread = self.spread * float(computed.sum()) + (0.0 if captured else self.outside)
        spread += self.eager if computed.any() else 0.0
        return self.base + experts + slowest + spread + (self.exchange if guests.any() else 0.0)

    def with_capacity(self, tokens: int) -> Machine:
        """The same with so many KV tokens of a rank."""
        return replace(self, capacity=tokens, split_capacity=tokens)

    def split(self) -> Machine:
        """As the plugin has it: attention in its own kernel, and a little less cache."""
        return replace(self, kv_token=self.split_kv_token, capacity=self.split_capacity)

    def tensor_parallel(self, ranks: int) -> Machine:
        """So many GPUs as one rank that has a part of each layer on every GPU."""
        shares = min(ranks, self.kv_heads)
        measured = min(self.tensor_ranks, self.kv_heads)
        return replace(
            self,
            base=self.tensor_base,
            kv_token=self.tensor_kv_token * measured / shares,
            pair=self.pair / ranks,
            query=self.query / ranks,
            prompt=(self.prompt + self.spread) / ranks,
            spread=0.0,
            opened=self.opened / shares,
            capacity=self.capacity * shares,
        )


# From figures: flat:16, 256 and 512 of stock (query; base and expert of the first preset), prefill:131072 (pair; the
# sum of prompt and spread), times to the first token of rate:8x40000 (frontend) and the caches' sizes in
# gpu_loads_4xH200.json; attention over shards (split_kv_token) and what visits cost beyond it (guest) in
# gpu_layer_stages.json; gaps beside a long request (exchange) and alone (base of the second preset) in
# gpu_interference_4xH200.json. Fitted to measured curves of request rates (simulated_curves.json): kv_token and opened
# to stock's at 4 and 8 requests a second, those of tensor parallelism to its 8 and 12. Fitted to the plugin's times for
# computed prompts (gpu_scheduler_processes_4xH200.json): how prompt and spread divide their sum. All of
# Qwen3-30B-A3B's shape with 48 layers in bfloat16.
# No step of more ranks was.
MEASURED_RANKS = 4
_SPREAD = Machine(
    name="h200-qwen3-30b-a3b",
    source="gpu_loads_4xH200.json, gpu_layer_stages.json, gpu_interference_4xH200.json, simulated_curves.json, "
    "gpu_scheduler_processes_4xH200.json",
    base=4.8e-3,
    expert=4.1e-3,
    kv_token=29e-9,
    split_kv_token=22.9e-9,
    query=18e-6,
    prompt=1e-6,
    spread=8e-6,
    pair=1.31e-9,
    guest=37e-6,
    exchange=0.25e-3,
    opened=0.5e-6,
    frontend=2e-6,
    experts=128,
    active=8,
    kv_heads=4,
    capacity=1_097_000,
    split_capacity=1_063_000,
    tensor_base=4.2e-3,
    tensor_kv_token=9.7e-9,
    tensor_ranks=4,
)
# Without weights, and with prompts all of one token, tokens of all requests take the same few experts.
_FEW = replace(_SPREAD, name="h200-qwen3-30b-a3b-few-experts", base=5.5e-3, expert=0.0)
# Half of the layers. A half of the first preset's where nothing else is known; base and eager: gaps of 16 short
# requests, and of these beside a prompt of 65,536 tokens (pair), in gpu_computed_2xH200.json. Fitted to the plugin's
# three times for all computed prompts there: visit, and eager to a few ms. A cost of 16 ms for each step in which
# chunks visit would fit as well as that of visiting pairs.
_BY_LAYERS = ("expert", "kv_token", "split_kv_token", "query", "prompt", "spread", "opened", "tensor_base",
              "tensor_kv_token")  # fmt: skip
_halves: dict[str, Any] = {name: getattr(_SPREAD, name) / 2 for name in _BY_LAYERS}
_HALF = replace(
    _SPREAD,
    **_halves,
    name="h200-qwen3-30b-a3b-24-layers",
    source="half of h200-qwen3-30b-a3b, gpu_computed_2xH200.json",
    base=3.4e-3,
    pair=6.4e-10,
    guest=18e-6,
    exchange=0.13e-3,
    capacity=406_896,
    split_capacity=406_896,
    eager=9e-3,
    visit=1.5,
)
PRESETS = {machine.name: machine for machine in (_SPREAD, _FEW, _HALF)}
