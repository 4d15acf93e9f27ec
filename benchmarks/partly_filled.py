# SPDX-License-Identifier: Apache-2.0
"""vLLM's DecodeBenchConnector, but for requests that want their prompts computed. Touches that class of vLLM 0.32."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector
from vllm.v1.request import Request


class PartlyFilled(DecodeBenchConnector):
    """Fills the KV of prompts instead of computing it, unless ``vllm_xargs`` has ``compute_prompt``."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        params = request.sampling_params
        if params and (params.extra_args or {}).get("compute_prompt"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
