# SPDX-License-Identifier: Apache-2.0
"""The plugin's own settings: ``--nanocp-config JSON`` or ``additional_config={"nanocp": {...}}``."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard

from .errors import NanoCPConfigError
from .placement.auto import AUTO, Segments, fixed
from .placement.moves import MoveConfig
from .placement.prefill_steps import PrefillGap

KEY = "nanocp"
PLACEMENTS = ("balanced", "round_robin")
EXCHANGES = ("auto", "collective", "routed")
DECODE_BENCH = "NANOCP_DECODE_BENCH"
# Most places of a step at fixed addresses: each takes tens of KB of exchange buffers.
MAX_PLACES = 1 << 16
# Settings with which homes stay where they are.
_FIXED_HOMES: dict[str, Any] = {"placement": "round_robin", "max_degree": 1}


@dataclass(frozen=True)
class NanoCPConfig:
    """Validated settings.

    Attributes:
        ranks: number of data-parallel ranks in the one engine. Set by ``--data-parallel-size``; a key of its own
            for ``LLM(...)``, which vLLM refuses with a data-parallel size.
        segment_size: tokens a shard should hold before another rank is used. A request of T tokens starts with
            ``ceil(T / segment_size)`` ranks, at most ``max_degree``. ``auto``: as ``placement.auto`` says.
        max_degree: most ranks one request may use; None means all.
        placement: ``balanced`` (least batch, then most room, water filling) or ``round_robin`` (a baseline).
        moves: whether decoding requests change their home, to even out the ranks' loads and where a rank's blocks run
            out, and when: fields of ``placement.moves.MoveConfig``. Only with ``balanced`` and more than one rank a
            request. None: on where they were verified, which ``engine_config.make`` knows.
        parallel_prefill: whether the ranks of a long prompt take its chunks in turn and compute as many in one step;
            ``{"chunk_tokens": n}``: and how many tokens such a chunk has at most, else half of a step. None: on with
            more than one rank a request.
        exchange: how queries and partial results travel: ``collective`` over torch.distributed; ``routed``, GPUs write
            into each other's memory. ``auto`` takes the best one that was verified.
        graph_capacities: CUDA graphs of sharded decode steps are captured for so many visits between any two ranks,
            ascending; a step with more runs attention outside of graphs. Empty: every sharded step does. None: no step
            has more, see ``worker.sharded_graphs.capacities``.
        scheduler_processes: whether each rank's vLLM scheduler runs in a process of its own. None: where that is
            faster, see ``engine_config.apart``.
        prefill_gap: whether all ranks compute prompts in the same steps, which are predicted to end within a gap, and
            when: fields of ``placement.prefill_steps.PrefillGap``.
        decode_bench: take prompts as computed, whatever their KV blocks contain, to time decoding alone. Refused
            unless the environment has ``NANOCP_DECODE_BENCH=1``.
    """

    ranks: int
    segment_size: int | str = 65536
    max_degree: int | None = None
    placement: str = "balanced"
    moves: bool | dict[str, Any] | None = None
    parallel_prefill: bool | dict[str, int] | None = None
    exchange: str = "auto"
    graph_capacities: tuple[int, ...] | None = None
    decode_bench: bool = False
    scheduler_processes: bool | None = None
    prefill_gap: bool | dict[str, Any] = False

    @property
    def degree_limit(self) -> int:
        """The most ranks one request may use, resolved."""
        return self.ranks if self.max_degree is None else self.max_degree

    @property
    def segments(self) -> Segments | None:
        """How requests are cut; None if that is found at the time."""
        return fixed(self.segment_size) if isinstance(self.segment_size, int) else None

    @property
    def move_config(self) -> MoveConfig | None:
        """When homes move; None if they do not."""
        if self.moves is False:
            return None
        return MoveConfig(max_degree=self.degree_limit, **(self.moves if isinstance(self.moves, dict) else {}))

    @property
    def gap(self) -> PrefillGap | None:
        """When prompts are computed; None: as vLLM's schedulers do."""
        if self.prefill_gap is False:
            return None
        return PrefillGap(**(self.prefill_gap if isinstance(self.prefill_gap, dict) else {}))

    @property
    def chunk_tokens(self) -> int | None:
        """Most tokens of a chunk of a prompt that its ranks compute together, if set."""
        return self.parallel_prefill["chunk_tokens"] if isinstance(self.parallel_prefill, dict) else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that ``parse`` accepts again."""
        capacities = self.graph_capacities
        return asdict(self) | {"graph_capacities": None if capacities is None else list(capacities)}


def _integer(raw: Mapping[str, Any], key: str, least: int, example: str, other: str = "") -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = f"{other}an integer of at least {least}"
        raise NanoCPConfigError(f"nanocp: {key} must be {what}, got {value!r}; use {example}")
    return value


def parse(raw: Any, data_parallel_size: int = 1) -> NanoCPConfig:
    """Validate the mapping given by the user.

    Args:
        raw: the value of ``additional_config["nanocp"]``.
        data_parallel_size: what vLLM was given; the number of ranks when the mapping has none.

    Raises:
        NanoCPConfigError: a value of the wrong type or out of range, or an unknown key.
    """
    if not isinstance(raw, Mapping):
        raise NanoCPConfigError(
            f'nanocp: the configuration must be a JSON object, got {raw!r}; use {{}} or {{"segment_size": 65536}}'
        )
    known = [f.name for f in fields(NanoCPConfig)]
    for key in raw:
        if key not in known:
            raise NanoCPConfigError(f"nanocp: unknown configuration key {key!r}; the keys are {', '.join(known)}")
    values: dict[str, Any] = {}
    ranks = _integer(raw, "ranks", 1, "2") if "ranks" in raw else data_parallel_size
    if "ranks" in raw and data_parallel_size not in (1, ranks):
        raise NanoCPConfigError(
            f"nanocp: ranks is {ranks} but the data-parallel size is {data_parallel_size}; give only one of them"
        )
    if ranks < 2:
        raise NanoCPConfigError(
            "nanocp: a request can be spread over ranks only if there are two or more; "
            'add --data-parallel-size 2 (or "ranks": 2 for LLM) or start without --nanocp'
        )
    values["ranks"] = ranks
    if "segment_size" in raw:
        auto = raw["segment_size"] == AUTO
        values["segment_size"] = AUTO if auto else _integer(raw, "segment_size", 1, "65536", f"{AUTO!r} or ")
    if raw.get("max_degree") is not None:
        degree = _integer(raw, "max_degree", 1, str(ranks))
        if degree > ranks:
            raise NanoCPConfigError(f"nanocp: max_degree is {degree} but there are {ranks} ranks; use at most {ranks}")
        values["max_degree"] = degree
    for key, choices in (("placement", PLACEMENTS), ("exchange", EXCHANGES)):
        if key in raw:
            if raw[key] not in choices:
                raise NanoCPConfigError(f"nanocp: {key} is {raw[key]!r}; use one of {', '.join(choices)}")
            values[key] = raw[key]
    fixed = next((key for key, value in _FIXED_HOMES.items() if values.get(key) == value), None)
    values["moves"] = None if raw.get("moves") is None else _moves(raw["moves"])
    if values["moves"] is None and fixed is not None:
        values["moves"] = False
    if values["moves"] is not False and fixed is not None:
        raise NanoCPConfigError(f"nanocp: moves: homes cannot move with {fixed} {_FIXED_HOMES[fixed]!r}; leave it out")
    if raw.get("parallel_prefill") is not None:
        values["parallel_prefill"] = _parallel_prefill(raw["parallel_prefill"])
    if raw.get("graph_capacities") is not None:
        values["graph_capacities"] = _capacities(raw["graph_capacities"], ranks)
    if values.get("exchange") == "routed" and values.get("graph_capacities") == ():
        raise NanoCPConfigError(
            "nanocp: exchange 'routed' has places for as many visits as graph_capacities say, which is empty; leave "
            "graph_capacities out, or use 'collective'"
        )
    if values.get("max_degree") == 1:
        for key, given in (
            ("parallel_prefill", values.get("parallel_prefill")),
            ("graph_capacities", values.get("graph_capacities") is not None),
            ("exchange", values.get("exchange") == "routed"),
        ):
            if given:
                raise NanoCPConfigError(
                    f"nanocp: {key} has no effect with max_degree 1, for nothing is sharded; leave it out"
                )
    processes = raw.get("scheduler_processes")
    if processes is not None and not isinstance(processes, bool):
        raise NanoCPConfigError(
            f"nanocp: scheduler_processes must be true or false, got {processes!r}; leave it out for the default"
        )
    values["scheduler_processes"] = processes
    if raw.get("prefill_gap") is not None:
        values["prefill_gap"] = _prefill_gap(raw["prefill_gap"])
    if "decode_bench" in raw:
        values["decode_bench"] = _decode_bench(raw["decode_bench"])
    return NanoCPConfig(**values)


def _moves(value: Any) -> bool | dict[str, Any]:
    if isinstance(value, bool):
        return value
    known = [f.name for f in fields(MoveConfig) if f.name != "max_degree"]
    if not isinstance(value, Mapping) or any(key not in known for key in value):
        raise NanoCPConfigError(
            f"nanocp: moves must be true, false or an object with keys of {', '.join(known)}, got {value!r}; "
            "leave it out for the default"
        )
    try:
        MoveConfig(**value)
    except (TypeError, ValueError) as error:
        raise NanoCPConfigError(f"nanocp: moves: {error}; leave it out") from error
    return dict(value)


def _prefill_gap(value: Any) -> bool | dict[str, Any]:
    if isinstance(value, bool):
        return value
    known = [f.name for f in fields(PrefillGap)]
    if not isinstance(value, Mapping) or any(key not in known for key in value):
        raise NanoCPConfigError(
            f"nanocp: prefill_gap must be true, false or an object with keys of {', '.join(known)}, got {value!r}; "
            "leave it out for the default"
        )
    unused = [key for key in ("fill", "late_ms") if key in value]
    if unused and "ms" in value and value["ms"] is None:
        raise NanoCPConfigError(
            f"nanocp: prefill_gap: with ms null {' and '.join(unused)} has no effect, since no step is bounded that "
            "prompts could fill; leave it out"
        )
    try:
        PrefillGap(**value)
    except ValueError as error:
        raise NanoCPConfigError(f"nanocp: prefill_gap: {error}; leave it out for the default") from error
    return dict(value)


def _parallel_prefill(value: Any) -> bool | dict[str, int]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Mapping) or list(value) != ["chunk_tokens"]:
        raise NanoCPConfigError(
            f'nanocp: parallel_prefill must be true, false or {{"chunk_tokens": 4096}}, got {value!r}; leave it out '
            "for the default"
        )
    return {"chunk_tokens": _integer(value, "chunk_tokens", 1, "4096")}


def largest_capacity(ranks: int, queries: int = 1) -> int:
    """The largest capacity there are places for: for each rank, and for rows of a rank's own; with drafts each place
    has room for as many ``queries``."""
    return max(1, MAX_PLACES // ((ranks + 1) * queries))


def _capacities(value: Any, ranks: int) -> tuple[int, ...]:
    numbers = [n for n in value if type(n) is int and n > 0] if isinstance(value, list | tuple) else []
    if not isinstance(value, list | tuple) or numbers != list(value) or numbers != sorted(set(numbers)):
        raise NanoCPConfigError(
            f"nanocp: graph_capacities must be a list of ascending positive integers, got {value!r}; "
            "leave it out, or use [] for no graphs of sharded steps"
        )
    if numbers and numbers[-1] > largest_capacity(ranks):
        raise NanoCPConfigError(
            f"nanocp: graph_capacities has {numbers[-1]}, and {numbers[-1]} visits from each of {ranks} ranks are more "
            f"than there may be places for ({MAX_PLACES}); use at most {largest_capacity(ranks)}"
        )
    return tuple(numbers)


def _decode_bench(value: Any) -> bool:
    if not isinstance(value, bool):
        raise NanoCPConfigError(f"nanocp: decode_bench must be true or false, got {value!r}; leave it out")
    if value and os.environ.get(DECODE_BENCH) != "1":
        raise NanoCPConfigError(
            "nanocp: decode_bench makes all answers meaningless: prompts are not computed; leave it out, or set "
            f"{DECODE_BENCH}=1 in a benchmark"
        )
    return value


class Additional(UserDict[str, Any]):
    """``additional_config`` of an engine. vLLM takes a dict's whole content into the name of its compile cache, so that
    with every other ``segment_size`` it would compile the model again; compiled code depends on no setting."""

    def compute_hash(self) -> str:
        """Of what compiled code depends on."""
        return KEY


def wanted(additional: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this ``additional_config`` asks for nanocp."""
    return isinstance(additional, Mapping) and KEY in additional


def of(vllm_config: Any) -> NanoCPConfig:
    """The settings that ``engine_config.make`` has put into vLLM's configuration."""
    return parse(vllm_config.additional_config[KEY])
