# SPDX-License-Identifier: Apache-2.0
"""The world of workers: one process a rank and tensor-parallel part, as processes of this machine or Ray actors."""
