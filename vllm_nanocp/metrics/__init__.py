# SPDX-License-Identifier: Apache-2.0
"""Metrics: counted beside the scheduler, carried by vLLM's statistics, exported where vLLM's own are.

Importing this package or ``collector`` imports no vLLM.
"""
