# SPDX-License-Identifier: Apache-2.0
"""Where this folder is on the path, vLLM's V2 runner runs on CPU: its Triton kernels are interpreted. vLLM asks for a
backend of Triton's for CPUs, which no release has; that it is there is all that it looks at."""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
