# SPDX-License-Identifier: Apache-2.0
"""The plugin's own settings: ``--nanocp-config JSON`` or ``additional_config={"nanocp": {...}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import NanoCPConfigError

KEY = "nanocp"
PLACEMENTS = ("balanced", "round_robin")
EXCHANGES = ("auto", "collective")


@dataclass(frozen=True)
class NanoCPConfig:
    """Validated settings.

    Attributes:
        ranks: number of data-parallel ranks in the one engine. Set by ``--data-parallel-size``; a key of its own
            for ``LLM(...)``, which vLLM refuses with a data-parallel size.
        segment_size: tokens a shard should hold before another rank is used. A request of T tokens starts with
            ``ceil(T / segment_size)`` ranks, at most ``max_degree``.
        max_degree: most ranks one request may use; None means all.
        placement: ``balanced`` (least batch, then most room, water filling) or ``round_robin`` (a baseline).
        exchange: how queries and partial results travel. ``auto`` takes the best one that works here.
    """

    ranks: int
    segment_size: int = 65536
    max_degree: int | None = None
    placement: str = "balanced"
    exchange: str = "auto"

    @property
    def degree_limit(self) -> int:
        """The most ranks one request may use, resolved."""
        return self.ranks if self.max_degree is None else self.max_degree

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that ``parse`` accepts again."""
        return asdict(self)


def _integer(raw: Mapping[str, Any], key: str, least: int, example: str) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise NanoCPConfigError(f"nanocp: {key} must be an integer of at least {least}, got {value!r}; use {example}")
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
        values["segment_size"] = _integer(raw, "segment_size", 1, "65536")
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
    return NanoCPConfig(**values)
