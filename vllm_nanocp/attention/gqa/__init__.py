# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention over shards, on CPU and on GPUs."""
