# SPDX-License-Identifier: Apache-2.0
"""Settings of the tests that need no engine."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: the machine may be shared. The same examples each time: a failure is the change's, not the dice's
# (HYPOTHESIS_PROFILE=hunt on the command line's environment looks further).
settings.register_profile(
    "unit", deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("hunt", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))
