# SPDX-License-Identifier: Apache-2.0
"""The one scheduler: vLLM's own scheduler a rank, composed."""
