# SPDX-License-Identifier: Apache-2.0
"""From N data-parallel ranks to one engine with N ranks, by vLLM's own settings; and what is refused at start."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from . import config as nanocp_config
from .config import NanoCPConfig
from .errors import NanoCPConfigError

SCHEDULER = "vllm_nanocp.sched.scheduler.NanoCPScheduler"
EXECUTORS = {
    "mp": "vllm_nanocp.executor.NanoCPMultiprocExecutor",
    "ray": "vllm_nanocp.ray_executor.NanoCPRayExecutor",
}
CPU_WORKER = "vllm_nanocp.worker.cpu_worker.NanoCPCPUWorker"
GPU_WORKER = "vllm_nanocp.worker.gpu_worker.NanoCPGPUWorker"
CPU_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
CUDA_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


def refuse(what: str, why: str, instead: str) -> NoReturn:
    """Raises NanoCPConfigError with one line."""
    raise NanoCPConfigError(f"nanocp: {what} is not supported: {why}; {instead}")


def check_flags(args: Any) -> None:
    """Refuse engine arguments that cannot work, from an argparse namespace or ``EngineArgs``.

    Raises:
        NanoCPConfigError
    """

    def get(name: str, default: Any = None) -> Any:
        return getattr(args, name, default)

    if get("pipeline_parallel_size", 1) > 1:
        refuse(
            f"--pipeline-parallel-size {args.pipeline_parallel_size}",
            "ranks exchange attention results in every layer",
            "use --tensor-parallel-size or more --data-parallel-size ranks",
        )
    if get("decode_context_parallel_size", 1) > 1:
        refuse(
            f"--decode-context-parallel-size {args.decode_context_parallel_size}",
            "it splits every request's KV, which nanocp does per request",
            "leave it out",
        )
    if get("prefill_context_parallel_size", 1) > 1:
        refuse(
            f"--prefill-context-parallel-size {args.prefill_context_parallel_size}",
            "chunks are placed by shard map",
            "leave it out",
        )
    if get("speculative_config") is not None:
        refuse(
            "speculative decoding",
            "draft tokens would have to be verified against shards",
            "leave out --speculative-config",
        )
    for flag in ("data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb"):
        if get(flag, False):
            refuse(
                "--" + flag.replace("_", "-"),
                "one scheduler serves all ranks behind one address",
                "leave it out",
            )
    for flag in ("data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local"):
        if get(flag) is not None:
            refuse("--" + flag.replace("_", "-"), "one engine holds all ranks", "leave it out")
    if get("data_parallel_backend", "mp") != "mp":
        refuse(
            f"--data-parallel-backend {args.data_parallel_backend}",
            "one engine holds all ranks",
            "leave it out, or use --distributed-executor-backend ray",
        )
    if get("nnodes", 1) > 1:
        refuse(
            f"--nnodes {args.nnodes}",
            "worker processes are on one machine",
            "use one node, or --distributed-executor-backend ray",
        )
    if get("headless", False):
        refuse("--headless", "there is no engine without the API server's", "leave it out")
    if get("enable_elastic_ep", False):
        refuse("--enable-elastic-ep", "the number of ranks is fixed at start", "leave it out")
    if get("enable_dbo", False):
        refuse("--enable-dbo", "a sharded step cannot be cut into micro-batches", "leave it out")
    if (get("ubatch_size", 0) or 0) > 1:
        refuse(f"--ubatch-size {args.ubatch_size}", "a sharded step cannot be cut into micro-batches", "leave it out")
    if get("kv_transfer_config") is not None:
        refuse("--kv-transfer-config", "KV connectors do not know of shards", "leave it out")
    if get("ec_transfer_config") is not None:
        refuse("--ec-transfer-config", "encoder-cache connectors do not know of ranks", "leave it out")
    backend = get("distributed_executor_backend")
    if backend is not None and backend not in EXECUTORS and backend not in EXECUTORS.values():
        refuse(
            f"--distributed-executor-backend {backend}",
            "ranks are processes of one machine or Ray actors",
            "use mp or ray, or leave it out",
        )
    if backend in ("ray", EXECUTORS["ray"]) and importlib.util.find_spec("ray") is None:
        refuse(
            "--distributed-executor-backend ray without Ray",
            "the package ray is not installed in this environment",
            "pip install 'vllm-nanocp[ray]', or use mp",
        )
    for flag, own in (("scheduler_cls", (SCHEDULER,)), ("worker_cls", (CPU_WORKER, GPU_WORKER))):
        if get(flag) not in (None, "auto", *own):
            refuse(f"--{flag.replace('_', '-')} {get(flag)}", "nanocp brings its own", "leave it out")


def check_model(vllm_config: Any, config: NanoCPConfig) -> None:
    """Refuse models and settings that cannot work, once vLLM has read the model's configuration.

    Raises:
        NanoCPConfigError
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    text = model.hf_text_config
    if not model.is_moe:
        refuse(
            f"the model {model.model}",
            "it has no experts, so its data-parallel ranks need not step together",
            "serve it without --nanocp, in independent replicas",
        )
    if config.degree_limit == 1:
        return
    cuda = current_platform.is_cuda()
    instead = "use --nanocp-config '{\"max_degree\": 1}' to serve it with one scheduler and no sharding"
    if model.is_encoder_decoder:
        refuse("an encoder-decoder model with max_degree above 1", "cross-attention has no shards", instead)
    if model.use_mla:
        refuse(
            "multi-head latent attention with max_degree above 1",
            "its attention backends return no mergeable partials here",
            instead,
        )
    if model.is_hybrid or model.is_attention_free:
        refuse(
            "a hybrid or attention-free model with max_degree above 1",
            "a recurrent state cannot be cut into shards",
            instead,
        )
    windowed = model.get_sliding_window() is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or ()
    )
    if windowed or getattr(text, "attention_chunk_size", None):
        refuse(
            "sliding-window attention with max_degree above 1",
            "queries would need a mask at the holders",
            instead,
        )
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "alibi", None):
        refuse(
            "softcapped or ALiBi attention with max_degree above 1",
            "its partial results cannot be merged by log-sum-exp alone here",
            instead,
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in (CUDA_CACHE_DTYPES if cuda else CPU_CACHE_DTYPES):
        refuse(
            f"--kv-cache-dtype {cache_dtype} with max_degree above 1",
            "the attention path here cannot read it",
            "leave it out, or use fp8",
        )
    if envs.VLLM_BATCH_INVARIANT:
        refuse(
            "VLLM_BATCH_INVARIANT with max_degree above 1",
            "how a request's KV is cut depends on the other requests",
            "unset it, or " + instead,
        )


def check_graphs(vllm_config: Any, config: NanoCPConfig) -> None:
    """Refuse CUDA graphs that sharded steps could not stay out of: they run attention outside of graphs.

    Raises:
        NanoCPConfigError
    """
    from vllm.config import CUDAGraphMode

    mode = vllm_config.compilation_config.cudagraph_mode
    if config.degree_limit == 1 or mode is None or mode == CUDAGraphMode.NONE:
        return
    if not vllm_config.use_v2_model_runner:
        refuse(
            "CUDA graphs with the V1 model runner",
            "only the V2 runner can leave them for a sharded step",
            "add --enforce-eager, or leave VLLM_USE_V2_MODEL_RUNNER unset",
        )
    if mode.mixed_mode() == CUDAGraphMode.FULL:
        refuse(
            f"the CUDA graph mode {mode.name}",
            "mixed steps would replay graphs that know no shards",
            "use -cc.cudagraph_mode=FULL_AND_PIECEWISE",
        )


def make(engine_args: Any, create: Callable[[], Any]) -> Any:
    """Create the engine configuration with this package's scheduler, executor and worker.

    Args:
        engine_args: vLLM's ``EngineArgs``, with ``additional_config["nanocp"]``.
        create: vLLM's own ``create_engine_config``.

    Raises:
        NanoCPConfigError
    """
    from vllm.platforms import current_platform

    from . import admission, kv_event_sources, rank_hint, world_size
    from .metrics.install import install as install_metrics

    config = nanocp_config.parse(engine_args.additional_config[nanocp_config.KEY], engine_args.data_parallel_size)
    check_flags(engine_args)
    if current_platform.is_cuda():
        worker = GPU_WORKER
    elif current_platform.is_cpu():
        worker = CPU_WORKER
        if config.exchange == "routed":
            refuse("exchange 'routed' on CPU", "it is made of GPU kernels", "use 'auto' or 'collective'")
    else:
        refuse(f"the platform {current_platform.device_name}", "there is no attention path for it", "use CUDA or CPU")
    # On GPUs tokens are right with both (tests/gpu), but moves won nothing there, and the other was not timed.
    verified = current_platform.is_cpu()
    unset: dict[str, Any] = {k: verified for k in ("moves", "parallel_prefill") if getattr(config, k) is None}
    config = replace(config, **unset)
    engine_args.additional_config = {**engine_args.additional_config, nanocp_config.KEY: config.to_dict()}
    engine_args.data_parallel_size = 1
    engine_args.scheduler_cls = SCHEDULER
    backend = engine_args.distributed_executor_backend or "mp"
    engine_args.distributed_executor_backend = EXECUTORS.get(backend, backend)
    engine_args.worker_cls = worker
    vllm_config = create()
    if len(vllm_config.additional_config) == 1:  # what others have put there vLLM looks for in a dict only
        vllm_config.additional_config = nanocp_config.Additional(vllm_config.additional_config)
    check_model(vllm_config, config)
    check_graphs(vllm_config, config)
    admission.install()
    rank_hint.install_front_end()
    kv_event_sources.install_front_end()
    world_size.install(vllm_config.parallel_config, config.ranks)
    install_metrics()
    return vllm_config
