# SPDX-License-Identifier: Apache-2.0
"""A look into the running scheduler, for those who have an engine in their hands: see ``sched/status.py``."""

from .sched.status import of_async_llm, of_llm

__all__ = ["of_async_llm", "of_llm"]
