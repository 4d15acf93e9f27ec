# SPDX-License-Identifier: Apache-2.0
"""How many random requests the tests that compare with stock vLLM send, of which seeds; none without being told."""

from __future__ import annotations

import os

import pytest

COUNT = int(os.environ.get("NANOCP_RANDOM_REQUESTS", "60"))
SEEDS = [int(seed) for seed in os.environ.get("NANOCP_RANDOM_SEEDS", "1").split(",")]
MARKS = [
    pytest.mark.engine,
    pytest.mark.timeout(3000),
    pytest.mark.skipif("NANOCP_RANDOM_REQUESTS" not in os.environ, reason="minutes: NANOCP_RANDOM_REQUESTS=60"),
]
