# SPDX-License-Identifier: Apache-2.0
"""Which domain has seen the start of a prompt. No Ray, no vLLM."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

CHARACTERS = 1024  # of each key; what is shared for less is not worth a detour


def keys_of(body: bytes) -> list[str]:
    """Keys of a request's prompt, each of all text up to its end: two prompts share as many as they start alike.

    Args:
        body: of a request to an OpenAI endpoint. Without a prompt or messages, or if it is not JSON, there are none.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return []
    found: Any = fields.get("messages", fields.get("prompt")) if isinstance(fields, dict) else None
    text = json.dumps(found) if found is not None else ""
    digest, keys = hashlib.blake2b(digest_size=12), []
    for end in range(CHARACTERS, len(text) + 1, CHARACTERS):
        digest.update(text[end - CHARACTERS : end].encode())
        keys.append(digest.hexdigest())
    return keys


class Prefixes:
    """Remembers where prompts went, the latest ``capacity`` keys of them."""

    def __init__(self, capacity: int = 100_000) -> None:
        self.capacity = capacity
        self._places: OrderedDict[str, str] = OrderedDict()

    def record(self, keys: Sequence[str], place: str) -> None:
        """A prompt with these keys went to a place."""
        for key in keys:
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > self.capacity:
            self._places.popitem(last=False)

    def forget(self, places: set[str]) -> None:
        """These places are gone."""
        self._places = OrderedDict((key, place) for key, place in self._places.items() if place not in places)

    def rank(self, keys: Sequence[str], loads: Mapping[str, int], slack: int) -> list[str]:
        """The places, best first: those that have seen most of the prompt, then those with the fewest requests.

        Args:
            keys: of the prompt.
            loads: requests at each place. Only these places are considered.
            slack: a place with more than so many requests above the fewest is chosen for its load alone.
        """
        seen = dict.fromkeys(loads, 0)
        for depth, key in enumerate(keys, 1):
            place = self._places.get(key)
            if place in seen:
                seen[place] = depth
        most = min(loads.values(), default=0) + slack
        return sorted(loads, key=lambda place: (-seen[place] if loads[place] <= most else 0, loads[place]))
