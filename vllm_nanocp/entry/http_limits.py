# SPDX-License-Identifier: Apache-2.0
"""Requests that can never fit are refused in the front-end, with HTTP 400 and the numbers.

When the engine starts, vLLM makes sure (through ``executor.longest_request``) that a sharded request of
``max_model_len`` tokens fits, and itself refuses longer ones. What is left are requests that cannot be sharded and are
larger than one rank's cache. Touches vLLM 0.32's ``InputProcessor.process_inputs``, which every front-end calls for
every request.
"""

from __future__ import annotations

from typing import Any

from .. import config as nanocp_config
from ..sched.sharded_request import can_shard
from ..wrapping import to_wrap, wraps


def check(request: Any, max_model_len: int, rank_tokens: int, degree_limit: int) -> None:
    """Refuse a request that one rank cannot hold and several may not; cut an open-ended ``max_tokens`` to what fits.

    Args:
        request: vLLM's ``EngineCoreRequest``; its ``max_tokens`` may be lowered.
        max_model_len: tokens.
        rank_tokens: KV tokens one rank's cache holds.
        degree_limit: most ranks one request may use.

    Raises:
        VLLMValidationError: the front-end answers HTTP 400.
    """
    from vllm.exceptions import VLLMValidationError

    if rank_tokens >= max_model_len or (degree_limit > 1 and can_shard(request)):
        return
    num_prompt = len(request.prompt_token_ids) if request.prompt_token_ids is not None else len(request.prompt_embeds)
    params = request.sampling_params
    wanted = num_prompt + (params.max_tokens if params is not None else 0)
    if wanted <= rank_tokens:
        return
    if params is not None and wanted >= max_model_len and num_prompt < rank_tokens:
        params.max_tokens = rank_tokens - num_prompt
        return
    raise VLLMValidationError(
        f"This request needs the KV cache of {wanted} tokens (prompt {num_prompt}, output {wanted - num_prompt}), and "
        f"one rank holds {rank_tokens}. It cannot be spread over ranks, because it asks for prompt logprobs, uses "
        "prompt embeddings, multi-modal or streaming input, or is a pooling request. Shorten it, or leave that out."
    )


def install() -> None:
    """Check requests in this process's front-end. Idempotent; engines without nanocp are left alone."""
    from vllm.v1.engine.input_processor import InputProcessor

    process = to_wrap(InputProcessor, "process_inputs", __name__)
    if process is None:
        return

    @wraps(process, __name__)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        vllm_config = self.vllm_config
        if nanocp_config.wanted(vllm_config.additional_config):
            config = nanocp_config.of(vllm_config)
            cache = vllm_config.cache_config
            blocks = (cache.num_gpu_blocks or 1) - 1  # vLLM keeps one as its null block
            check(request, vllm_config.model_config.max_model_len, blocks * cache.block_size, config.degree_limit)
        return request

    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]
