# SPDX-License-Identifier: Apache-2.0
"""One rank's vLLM scheduler: its doors, its process, and what is known of it elsewhere."""
