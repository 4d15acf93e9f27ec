# SPDX-License-Identifier: Apache-2.0
"""From N data-parallel ranks to one engine with N ranks, by vLLM's own settings; and which models are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import config as nanocp_config
from .. import patches
from ..attention.cache_dtypes import CACHE_DTYPES, FLOAT8_CACHES
from ..attention.families import flashinfer_chosen
from ..config import MAX_PLACES, NanoCPConfig, largest_capacity
from ..errors import UNSHARDED, refuse
from .drafters import CPU_WORKER, GPU_WORKER, check_drafter, drafts_by_model
from .refusals import EXECUTORS, SCHEDULER, check_environment, check_flags, check_settings

# From so many requests on, over all ranks, schedulers in processes of their own are worth their messages.
MANY_REQUESTS = 1024
# Where no cache but the model's own type is read, leaving the flag out is not enough for some checkpoints.
_UNREAD_CACHE = "leave it out; for a checkpoint that says so itself "


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
            "vLLM finds no experts in its configuration, so its data-parallel ranks need not step together",
            "serve it without --nanocp, in independent replicas",
        )
    if config.degree_limit == 1:
        return
    cuda, instead = current_platform.is_cuda(), UNSHARDED
    if model.is_encoder_decoder:
        refuse("an encoder-decoder model with max_degree above 1", "cross-attention has no shards", instead)
    if model.use_mla:
        _check_latent(vllm_config, cuda, instead)
    elif cuda and not flashinfer_chosen(vllm_config):
        _check_flash(vllm_config.attention_config, instead)
    if model.is_hybrid or model.is_attention_free:
        refuse(
            "a hybrid or attention-free model with max_degree above 1",
            "a recurrent state cannot be cut into shards",
            instead,
        )
    _check_windows(model, instead)
    if getattr(text, "attn_logit_softcapping", None) or getattr(text, "alibi", None):
        refuse(
            "softcapped or ALiBi attention with max_degree above 1",
            "its partial results cannot be merged by log-sum-exp alone here",
            instead,
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in CACHE_DTYPES[model.use_mla, cuda]:
        refuse(
            f"--kv-cache-dtype {cache_dtype} with max_degree above 1",
            "the attention path here cannot read it",
            "leave it out, or use fp8" if "fp8" in CACHE_DTYPES[model.use_mla, cuda] else _UNREAD_CACHE + instead,
        )
    if envs.VLLM_BATCH_INVARIANT:
        refuse(
            "VLLM_BATCH_INVARIANT with max_degree above 1",
            "how a request's KV is cut depends on the other requests",
            "unset it, or " + instead,
        )


def _check_windows(model: Any, instead: str) -> None:
    """Refuse attention to a part of the context. A configuration that names the kind of each layer may have a window
    that none of them uses; without such a list all layers have it."""
    text = model.hf_text_config
    kinds, window = getattr(text, "layer_types", None) or (), model.get_sliding_window()
    if getattr(text, "attention_chunk_size", None):
        refuse("chunked attention with max_degree above 1", "queries would need a mask at the holders", instead)
    if "sliding_attention" in kinds or (window is not None and not kinds):
        whole = "" if kinds else f"add --disable-sliding-window, with which no request is longer than {window}, or "
        refuse(
            "sliding-window attention with max_degree above 1",
            "queries would need a mask at the holders",
            whole + instead,
        )


def _check_flash(attention: Any, instead: str) -> None:
    """Refuse what the layers would be refused for once the model is loaded, which takes long for a large one."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    capability, version = current_platform.get_device_capability(), attention.flash_attn_version
    if attention.backend not in (None, AttentionBackendEnum.FLASH_ATTN):
        what, away = f"attention by {attention.backend.name}", "leave --attention-backend out on a Hopper GPU, "
    elif capability is not None and capability.major != 9:
        what, away = f"attention by FLASH_ATTN on GPUs of compute capability {capability.as_version_str()}", ""
    elif version not in (None, 3):
        what, away = f"attention with flash_attn_version {version}", "leave it out of --attention-config, "
    else:
        return
    refuse(
        f"{what} with max_degree above 1",
        "shards attend by FlashAttention 3, which is for Hopper (9.0), or by FlashInfer",
        f"{away}use --attention-backend FLASHINFER, or {instead}",
    )


def _check_latent(vllm_config: Any, cuda: bool, instead: str) -> None:
    """Refuse what of multi-head latent attention has no partial results here."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    text = vllm_config.model_config.hf_text_config
    if hasattr(text, "index_topk"):
        refuse(
            "sparse latent attention (DSA) with max_degree above 1",
            "each query looks for its best keys over the whole context, and a shard knows its own only",
            instead,
        )
    if cuda:
        _check_latent_on_gpus(vllm_config, instead)
        return
    if torch.cpu._is_amx_tile_supported() and vllm_config.attention_config.backend != AttentionBackendEnum.CPU_MLA:
        refuse(
            "multi-head latent attention by AMX with max_degree above 1",
            "its kernel keeps no log-sum-exp and its weights are packed for it",
            "add --attention-backend CPU_MLA, or " + instead,
        )
    sizes = getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", None)
    if sizes != (512, 64):
        refuse(
            f"latents of {sizes[0]} and rotated keys of {sizes[1]} numbers on CPU with max_degree above 1",
            "vLLM's kernel CPU_MLA takes 512 and 64 only, and fails at the first request",
            "serve the model on GPUs with --nanocp-config '{\"max_degree\": 1}'",
        )


def _check_latent_on_gpus(vllm_config: Any, instead: str) -> None:
    """Refuse what the layers would be refused for once the model is loaded, which takes long for a large one."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, why = vllm_config.attention_config, "shards attend by FlashAttention 3"
    if vllm_config.cache_config.cache_dtype in FLOAT8_CACHES:
        _check_latent_of_float8(vllm_config, instead)
    elif attention.backend not in (None, AttentionBackendEnum.FLASH_ATTN_MLA):
        refuse(
            f"latent attention by {attention.backend.name} with max_degree above 1",
            why,
            "leave --attention-backend out on a Hopper GPU, or " + instead,
        )
    if attention.mla_prefill_backend not in (None, MLAPrefillBackendEnum.FLASH_ATTN):
        refuse(
            f"latent attention whose prompts attend by {attention.mla_prefill_backend.name} with max_degree above 1",
            why,
            "leave mla_prefill_backend out of --attention-config, or " + instead,
        )
    if attention.flash_attn_version not in (None, 3):
        refuse(
            f"latent attention with flash_attn_version {attention.flash_attn_version} and max_degree above 1",
            why,
            "leave it out of --attention-config, or " + instead,
        )
    capability = current_platform.get_device_capability()
    if capability is not None and capability.major != 9:
        refuse(
            f"latent attention on GPUs of compute capability {capability.as_version_str()} with max_degree above 1",
            why + ", which is for Hopper (9.0)",
            instead,
        )
    if vllm_config.compilation_config.pass_config.fuse_attn_quant:
        refuse(
            "latent attention whose output is quantised (fuse_attn_quant) with max_degree above 1",
            "partial results are merged before they may be rounded so",
            "add -cc.pass_config.fuse_attn_quant=false",
        )


def _check_latent_of_float8(vllm_config: Any, instead: str) -> None:
    """Refuse what FLASHMLA does not take, which is the one that reads an fp8 cache of latents on Hopper GPUs."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    model, cache, backend = vllm_config.model_config, vllm_config.cache_config, vllm_config.attention_config.backend
    if backend not in (None, AttentionBackendEnum.FLASHMLA):
        refuse(
            f"an fp8 cache of latents by {backend.name} with max_degree above 1",
            "shards of it attend by FLASHMLA",
            "leave --attention-backend out on a Hopper GPU, or " + instead,
        )
    if model.dtype != torch.bfloat16:
        refuse(
            f"an fp8 cache of latents with --dtype {str(model.dtype).removeprefix('torch.')} and max_degree above 1",
            "FLASHMLA returns bfloat16",
            "use --dtype bfloat16, or leave --kv-cache-dtype out",
        )
    text = model.hf_text_config
    sizes = getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", None)
    if sizes != (512, 64):
        refuse(
            f"an fp8 cache of latents of {sizes[0]} and rotated keys of {sizes[1]} numbers with max_degree above 1",
            "FLASHMLA takes 512 and 64",
            "leave --kv-cache-dtype out, or " + instead,
        )
    if cache.user_specified_block_size and cache.block_size != 64:
        refuse(
            f"an fp8 cache of latents with --block-size {cache.block_size} and max_degree above 1",
            "FLASHMLA takes blocks of 64 tokens",
            "leave --block-size out",
        )


def check_capacities(vllm_config: Any, config: NanoCPConfig) -> None:
    """Refuse capacities that there would be no places for, once it is known how many queries a visit has.

    Raises:
        NanoCPConfigError
    """
    largest, queries = max(config.graph_capacities or (0,)), 1 + vllm_config.num_speculative_tokens
    if largest > (most := largest_capacity(config.ranks, queries)):
        refuse(
            f"graph_capacities of {largest} with {queries - 1} drafts a step",
            f"{largest} visits of {queries} queries from each of {config.ranks} ranks are more than there may be "
            f"places for ({MAX_PLACES})",
            f"use at most {most}, or leave it out",
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


def apart(vllm_config: Any, config: NanoCPConfig) -> bool:
    """Whether the ranks' schedulers run in processes of their own: told so, or where there is much to schedule.

    Raises:
        NanoCPConfigError
    """
    details = vllm_config.observability_config.enable_logging_iteration_details
    if config.scheduler_processes and details:
        refuse(
            "--enable-logging-iteration-details with scheduler_processes",
            "the engine's process does not see what each request computes",
            "leave one of them out, or use --nanocp-config '{\"scheduler_processes\": false}'",
        )
    if config.scheduler_processes is not None:
        return config.scheduler_processes
    return not details and config.ranks * vllm_config.scheduler_config.max_num_seqs >= MANY_REQUESTS


def one_engine(parallel: Any) -> None:
    """Make one engine of N in vLLM's finished ``ParallelConfig``.

    All that vLLM derives from the data-parallel size is derived by now, as for N: which CUDA graphs an all-to-all
    backend allows, how large batches are, which settings are refused. What it looks up later, in the processes of the
    front-end and the engine, it finds as for one; each worker says N again in its copy.
    """
    parallel.data_parallel_size = parallel.data_parallel_size_local = 1
    # A local rank: the engine is told where its front-end is by who starts it, not by a coordinator.
    parallel.data_parallel_rank = parallel.data_parallel_index = parallel.data_parallel_rank_local = 0


def with_defaults(config: NanoCPConfig, cpu: bool) -> NanoCPConfig:
    """Set what is on only where it was verified, and was left out; with one rank a request there is neither.

    On GPUs tokens are right with both (tests/gpu). With ``parallel_prefill`` others' gaps beside a prompt of 131,072
    tokens are 0.65 of stock vLLM's at p90, and 1.26 and 1.15 at p99; that moves lose nowhere is not shown
    (``gpu_prefill_moves_2xH200.json``). With ``segment_size`` "auto" full ranks spill instead of preempting: to compute
    a long request again costs more.
    """
    several = config.degree_limit > 1
    spills = several and config.segments is None
    moves: bool | dict[str, Any] = several and cpu
    if not moves and spills and config.placement != "round_robin":
        moves = {"max_moves": 0}
    defaults = {"moves": moves, "parallel_prefill": several}
    unset: dict[str, Any] = {k: on for k, on in defaults.items() if getattr(config, k) is None}
    return replace(config, **unset)


def _created(engine_args: Any, create: Callable[[], Any]) -> Any:
    """vLLM's configuration. What it says of a drafter that it does not take is a refusal."""
    patches.apply_all(patches.CONFIG_PATCHES)
    try:
        vllm_config = create()
    except (ValueError, NotImplementedError, ImportError) as error:
        check_drafter(engine_args, error)
        raise
    if drafts_by_model(vllm_config):
        # Else vLLM computes the last block of a cached prefix again, for the draft model's sake, where placement counts
        # on all of them. One of its keys then comes from the token that followed there, and may make a draft wrong.
        vllm_config.speculative_config.disable_eagle_block_drop = True
    return vllm_config


def make(engine_args: Any, create: Callable[[], Any]) -> Any:
    """Create the engine configuration with this package's scheduler, executor and worker.

    Args:
        engine_args: vLLM's ``EngineArgs``, with ``additional_config["nanocp"]``.
        create: vLLM's own ``create_engine_config``.

    Raises:
        NanoCPConfigError
    """
    from vllm.platforms import current_platform

    from .. import kv_event_sources, rank_hint
    from ..executor import failed_start
    from ..metrics.install import install as install_metrics
    from . import http_limits, machines, world_size

    config = nanocp_config.parse(engine_args.additional_config[nanocp_config.KEY], engine_args.data_parallel_size)
    machines.all_here(engine_args, config.ranks)
    check_flags(engine_args)
    check_environment()
    if current_platform.is_cuda():
        worker = GPU_WORKER
    elif current_platform.is_cpu():
        worker = CPU_WORKER
        if config.exchange == "routed":
            refuse("exchange 'routed' on CPU", "it is made of GPU kernels", "use 'auto' or 'collective'")
        if config.graph_capacities is not None:
            refuse("graph_capacities on CPU", "there are no CUDA graphs", "leave it out")
    else:
        refuse(f"the platform {current_platform.device_name}", "there is no attention path for it", "use CUDA or CPU")
    config = with_defaults(config, current_platform.is_cpu())
    engine_args.additional_config = {**engine_args.additional_config, nanocp_config.KEY: config.to_dict()}
    engine_args.data_parallel_size = config.ranks
    engine_args.scheduler_cls = SCHEDULER
    backend = engine_args.distributed_executor_backend or "mp"
    engine_args.distributed_executor_backend = EXECUTORS.get(backend, backend)
    engine_args.worker_cls = worker
    vllm_config = _created(engine_args, create)
    engine_args.data_parallel_size = 1
    check_settings(vllm_config, config.degree_limit, config.gap is not None)
    machines.check_gpus(vllm_config.parallel_config, config.ranks)
    check_model(vllm_config, config)
    check_capacities(vllm_config, config)
    check_graphs(vllm_config, config)
    vllm_config.additional_config[nanocp_config.KEY] = replace(
        config, scheduler_processes=apart(vllm_config, config)
    ).to_dict()
    one_engine(vllm_config.parallel_config)
    if len(vllm_config.additional_config) == 1:  # what others have put there vLLM looks for in a dict only
        vllm_config.additional_config = nanocp_config.Additional(vllm_config.additional_config)
    http_limits.install()
    failed_start.install()
    rank_hint.install_front_end()
    kv_event_sources.install_front_end()
    world_size.install(vllm_config.parallel_config, config.ranks)
    install_metrics()
    return vllm_config
