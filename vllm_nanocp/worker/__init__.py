# SPDX-License-Identifier: Apache-2.0
"""The worker of one rank: takes its rank's part of a step and lays the plan out for attention."""
