# SPDX-License-Identifier: Apache-2.0
"""Errors a user can cause. Each carries one line: what is refused, why, and what to do instead."""

import os
from typing import NoReturn

# A file to which a process that an engine starts writes what it refuses, so that the one that ends last can say it.
REFUSAL_FILE = "_VLLM_NANOCP_REFUSAL_FILE"
# What to do where a model is served, but not cut into shards.
UNSHARDED = "use --nanocp-config '{\"max_degree\": 1}' to serve it with one scheduler and no sharding"


class NanoCPConfigError(ValueError):
    """A flag, a config key, a model or a vLLM feature that cannot work with ``--nanocp``."""


class NanoCPError(RuntimeError):
    """Something that nobody can repair at run time; the engine ends with it."""


def refuse(what: str, why: str, instead: str) -> NoReturn:
    """Raises NanoCPConfigError with one line."""
    line = f"nanocp: {what} is not supported: {why}; {instead}"
    if path := os.environ.get(REFUSAL_FILE):
        _leave(path, line)
    raise NanoCPConfigError(line)


def _leave(path: str, line: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(line)
    except OSError:  # another node; its log has the line
        pass
