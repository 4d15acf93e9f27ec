# SPDX-License-Identifier: Apache-2.0
"""Attention over shards: local rows, guests, merge. Knows rows, lengths and block tables; nothing of requests."""
