# SPDX-License-Identifier: Apache-2.0
"""Errors a user can cause. Each carries one line: what is refused, why, and what to do instead."""


class NanoCPConfigError(ValueError):
    """A flag, a config key, a model or a vLLM feature that cannot work with ``--nanocp``."""
