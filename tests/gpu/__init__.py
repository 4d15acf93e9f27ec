# SPDX-License-Identifier: Apache-2.0
"""Tests on two GPUs of one machine, and where there are four, on four. Some are content with one.

With NCCL 2.30 or later and ``NCCL_MULTI_RANK_GPU_ENABLE=1`` ranks share the GPUs that there are; CONTRIBUTING.md says
what that is good for.
"""

import os

import pytest
import torch

GPUS = torch.cuda.device_count()
SHARED = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and GPUS > 0


def gpus(number: int, words: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(number > GPUS and not SHARED, reason=f"needs {words}")


ONE_GPU = gpus(1, "a GPU")
TWO_GPUS = gpus(2, "two GPUs")
FOUR_GPUS = gpus(4, "four GPUs")
