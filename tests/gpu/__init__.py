# SPDX-License-Identifier: Apache-2.0
"""Tests on two GPUs of one machine, and where there are four, on four. Some are content with one."""

import pytest
import torch

ONE_GPU = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FOUR_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
