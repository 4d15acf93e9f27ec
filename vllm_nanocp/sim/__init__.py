# SPDX-License-Identifier: Apache-2.0
"""What a load would do on so many ranks: ``python -m vllm_nanocp.sim``. Pure Python and numpy: no torch, no vLLM.

Placement, queue, moves and prefill are the package's own (``placement``); times are a machine's coefficients.
"""
