# SPDX-License-Identifier: Apache-2.0
"""The world of workers on a Ray cluster."""
