# SPDX-License-Identifier: Apache-2.0
"""What is refused at start, whatever flag, file, variable or default of a model it comes from.

``SETTINGS`` are looked at in vLLM's finished configuration and decide. ``FLAGS`` are the same things as far as they can
be seen in the arguments: a refusal then comes before the model is looked at, and before vLLM refuses the same for a
reason that does not hold here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UNSHARDED, refuse
from .drafters import (
    CPU_WORKER,
    DRAFTERS,
    GPU_DRAFTERS,
    GPU_WORKER,
    MODEL_DRAFTERS,
    draft_method,
    drafts_by_model,
    drafts_on_a_gpu,
    drafts_over_float8_latents,
    drafts_with_flashinfer,
    given_drafts,
    other_attention,
    other_drafter,
    other_than_latent_mtp,
    other_verification,
    shorter_draft,
    unequal_drafts,
    unrun_target,
)

SCHEDULER = "vllm_nanocp.sched.scheduler.NanoCPScheduler"
EXECUTORS = {
    "mp": "vllm_nanocp.executor.multiproc.NanoCPMultiprocExecutor",
    "ray": "vllm_nanocp.executor.ray.executor.NanoCPRayExecutor",
}
_LEAVE_OUT = "leave it out"
_OR_RAY = "leave it out, or use --distributed-executor-backend ray"
_ON_THIS_MACHINE = "leave it out; ranks on several machines need --distributed-executor-backend ray"
_SYNC_DEFAULT = 16  # vLLM's
# For ranks that are engines of their own, which each process is told of by its environment. vLLM looks at them only
# where the data-parallel size is 1.
_ENVIRONMENT = {
    "VLLM_DP_SIZE": "1",
    "VLLM_DP_RANK": "0",
    "VLLM_DP_RANK_LOCAL": "0",
    "VLLM_DP_MASTER_IP": "127.0.0.1",
    "VLLM_DP_MASTER_PORT": "0",
}


def _above_one(value: Any) -> bool:
    return (value or 0) > 1


def _given(value: Any) -> bool:
    return value is not None


def _returns_experts(aux_output: Any) -> bool:
    """Of vLLM's ``AuxOutputConfig``, or what makes one."""
    name = "enable_return_routed_experts"
    return bool(aux_output.get(name) if isinstance(aux_output, dict) else getattr(aux_output, name, False))


@dataclass(frozen=True)
class Flag:
    """An engine argument that may be refused for its value.

    Attributes:
        field: of vLLM's ``EngineArgs`` (or of the command line, for ``vllm serve``'s own).
        refused: whether this value is.
        why: it is.
        instead: what to do.
        shown: whether the line shows the value.
    """

    field: str
    refused: Callable[[Any], bool]
    why: str
    instead: str = _LEAVE_OUT
    shown: bool = False

    def check(self, args: Any) -> None:
        value = getattr(args, self.field, None)
        if self.refused(value):
            shown = f" {given_drafts(value)}" if self.shown else ""
            refuse("--" + self.field.replace("_", "-") + shown, self.why, self.instead)


_DRAFT_MODEL = "of the ways to draft with a model only EAGLE, EAGLE3 and MTP have been run"
_OTHER_DRAFTER = (
    "leave it out, or use ngram, suffix or custom_class on CPU, ngram_gpu on GPUs, mtp, or beside grouped-query "
    "attention eagle or eagle3"
)
_DRAFTS_ON_GPUS = "it has not been run on GPUs"
_DRAFT_ON_GPUS = "leave it out, or use ngram_gpu or mtp, or beside grouped-query attention eagle or eagle3"
_ONE_ENGINE = "one engine holds all ranks"
_ONE_ADDRESS = "one scheduler serves all ranks behind one address"
_MICRO_BATCHES = "a sharded step cannot be cut into micro-batches"
_CONNECTORS = "KV connectors do not know of shards"
_ROUTED_EXPERTS = "the experts of a sharded prompt's tokens are with several ranks, and each answers for its own"
_DIFFUSION = "its scheduler is another one"
_EPLB = "moving experts was never tried with one engine over all ranks"
_SYNC = "it says how often engines ask each other whether they are done, and here is one engine"
_SHM_CACHE = "its shared memory counts the workers of one rank as readers, and all ranks read it"
_NUMA = "the engine's process is bound for one rank, and the workers of all ranks with it"

FLAGS = (
    Flag("pipeline_parallel_size", _above_one, "ranks exchange attention results in every layer",
         "use --tensor-parallel-size or more --data-parallel-size ranks", shown=True),
    Flag("decode_context_parallel_size", _above_one, "it splits every request's KV, which nanocp does per request",
         shown=True),
    Flag("prefill_context_parallel_size", _above_one, "chunks are placed by shard map", shown=True),
    Flag("speculative_config", other_drafter, _DRAFT_MODEL, _OTHER_DRAFTER, shown=True),
    Flag("spec_method", other_drafter, _DRAFT_MODEL, _OTHER_DRAFTER, shown=True),
    Flag("speculative_config", drafts_on_a_gpu, _DRAFTS_ON_GPUS, _DRAFT_ON_GPUS, shown=True),
    Flag("spec_method", drafts_on_a_gpu, _DRAFTS_ON_GPUS, _DRAFT_ON_GPUS, shown=True),
    *(Flag(field, bool, _ONE_ADDRESS, _ON_THIS_MACHINE) for field in
      ("data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb")),
    *(Flag(field, _given, _ONE_ENGINE, _ON_THIS_MACHINE, shown=True) for field in
      ("data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local")),
    Flag("data_parallel_backend", lambda value: value not in (None, "mp"), _ONE_ENGINE, _OR_RAY, shown=True),
    Flag("nnodes", _above_one, "worker processes are on one machine",
         "use one node, or --distributed-executor-backend ray", shown=True),
    Flag("node_rank", bool, "worker processes are on one machine", _OR_RAY, shown=True),
    Flag("headless", bool, "there is no engine without the API server's", _ON_THIS_MACHINE),
    Flag("enable_elastic_ep", bool, "the number of ranks is fixed at start"),
    Flag("elastic_ep_max_dp_size", _given, "the number of ranks is fixed at start"),
    Flag("enable_fault_tolerance", bool, "it watches engines behind an external load balancer, and here is one engine"),
    Flag("enable_eplb", bool, _EPLB),
    Flag("enable_dbo", bool, _MICRO_BATCHES),
    Flag("ubatch_size", _above_one, _MICRO_BATCHES, shown=True),
    Flag("dp_sync_interval", lambda value: value not in (None, _SYNC_DEFAULT), _SYNC, shown=True),
    Flag("kv_transfer_config", _given, _CONNECTORS),
    Flag("kv_offloading_size", _given, _CONNECTORS),
    Flag("ec_transfer_config", _given, "encoder-cache connectors do not know of ranks"),
    Flag("enable_return_routed_experts", bool, _ROUTED_EXPERTS),
    Flag("aux_output_config", _returns_experts, _ROUTED_EXPERTS),
    Flag("diffusion_config", _given, _DIFFUSION),
    Flag("mm_processor_cache_type", lambda value: value == "shm", _SHM_CACHE, "use lru, the default", shown=True),
    Flag("numa_bind", bool, _NUMA),
    Flag("ray_workers_use_nsight", bool, "the actors here are not started under it"),
)  # fmt: skip


def check_flags(args: Any) -> None:
    """Refuse engine arguments that cannot work, from an argparse namespace or ``EngineArgs``.

    Raises:
        NanoCPConfigError
    """
    for flag in FLAGS:
        flag.check(args)
    _check_executor(getattr(args, "distributed_executor_backend", None))
    if getattr(args, "data_parallel_address", None) is not None and _is_ray(args):
        refuse("--data-parallel-address with Ray", "the actor of the first rank says where ranks meet", _LEAVE_OUT)
    for field, own in (("scheduler_cls", (SCHEDULER,)), ("worker_cls", (CPU_WORKER, GPU_WORKER))):
        value = getattr(args, field, None)
        if value not in (None, "auto", *own):
            refuse(f"--{field.replace('_', '-')} {value}", "nanocp brings its own", _LEAVE_OUT)


def _is_ray(args: Any) -> bool:
    return getattr(args, "distributed_executor_backend", None) in ("ray", EXECUTORS["ray"])


def _check_executor(backend: Any) -> None:
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


def check_command(name: str | None) -> None:
    """Refuse the commands of vLLM's that prepare something for engines of one rank.

    Raises:
        NanoCPConfigError
    """
    if name in ("preload", "snapshot"):
        refuse(
            f"vllm {name} with --nanocp",
            "it makes what each data-parallel rank needs, and knows nothing of one engine over all",
            "leave --nanocp out there",
        )


def check_environment() -> None:
    """Refuse variables that tell a process of one rank which one it is.

    Raises:
        NanoCPConfigError
    """
    for name, harmless in _ENVIRONMENT.items():
        value = os.environ.get(name)
        if value not in (None, "", harmless):
            refuse(f"{name}={value}", _ONE_ENGINE, "unset it, and use --data-parallel-size")


@dataclass(frozen=True)
class Setting:
    """Something in vLLM's finished configuration that is refused.

    Attributes:
        found: whether a ``VllmConfig`` has it.
        what: it is, and the flags that usually make it.
        why: it is refused.
        instead: what to do.
        by: the method that the line names, where it depends on it.
    """

    found: Callable[[Any], Any]
    what: str
    why: str
    instead: str = _LEAVE_OUT
    by: Callable[[Any], str] | None = None

    def check(self, vllm_config: Any) -> None:
        if self.found(vllm_config):
            by = "" if self.by is None else f" by the method {self.by(vllm_config)}"
            refuse(self.what + by, self.why, self.instead)


def _multimodal(vllm_config: Any, field: str) -> Any:
    return getattr(getattr(vllm_config.model_config, "multimodal_config", None), field, None)


def _without_kv(vllm_config: Any) -> bool:
    """Whether no layer keeps KV: nothing to place requests by, and to place them otherwise is not built."""
    model = vllm_config.model_config
    return model.attn_type == "encoder_only" or bool(_multimodal(vllm_config, "mm_encoder_only"))


def _adapts_experts_on_cpu(vllm_config: Any) -> bool:
    """Whether vLLM would prepare experts for LoRA adapters on CPU: where nobody says which layers are to have any, all
    are."""
    lora = vllm_config.lora_config
    if lora is None or vllm_config.parallel_config.worker_cls != CPU_WORKER:
        return False
    return lora.target_modules is None or any("experts" in name.split(".") for name in lora.target_modules)


def _odd_blocks_on_cpu(vllm_config: Any) -> bool:
    """Whether vLLM would find no kernel there for blocks of this size. Where nobody gave one it takes one that it has,
    from 0.33 on after this."""
    if vllm_config.parallel_config.worker_cls != CPU_WORKER or vllm_config.model_config.use_mla:
        return False
    cache = vllm_config.cache_config
    return bool(cache.user_specified_block_size and cache.block_size % 32)


_INDEPENDENT = "serve it without --nanocp, in independent replicas"

SETTINGS = (
    Setting(lambda c: c.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism",
            "ranks exchange attention results in every layer"),
    Setting(lambda c: c.parallel_config.decode_context_parallel_size > 1, "decode context parallelism",
            "it splits every request's KV, which nanocp does per request"),
    Setting(lambda c: c.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism",
            "chunks are placed by shard map"),
    Setting(lambda c: draft_method(c) not in (None, *DRAFTERS, *MODEL_DRAFTERS, *GPU_DRAFTERS),
            "speculative decoding with another draft model (--speculative-config, --spec-method, --spec-model, or a "
            "speculators checkpoint)", _DRAFT_MODEL,
            f"{_OTHER_DRAFTER}; of a speculators checkpoint, serve the model it was made for", draft_method),
    Setting(lambda c: drafts_by_model(c) and c.speculative_config.draft_sample_method != "greedy",
            "drafts that a model samples (draft_sample_method in --speculative-config)",
            "their probabilities do not go along when a request moves to another rank",
            "leave draft_sample_method out"),
    Setting(unequal_drafts, "a draft model with other batches than the target's (disable_padded_drafter_batch, "
            "parallel_drafting, enable_adaptive_verification, num_speculative_tokens_per_batch_size, or several MTP "
            "layers, one for each draft)",
            "how many tokens it runs is not known to the other ranks",
            "leave these out of --speculative-config, or use another draft model"),
    Setting(shorter_draft, "a draft model for shorter requests than its target (max_model_len)",
            "a rank would draft nothing while others wait for its forwards",
            "leave max_model_len out of --speculative-config, or use --max-model-len no larger than the draft's"),
    Setting(other_attention, "a draft model with attention of its own (attention_backend or kv_cache_dtype in "
            "--speculative-config)", "its KV lies in the shards of its target's, and is read as theirs",
            "leave these out of --speculative-config"),
    Setting(unrun_target, "a draft model beside recurrent states, a multi-modal model or LoRA adapters",
            "it has not been run", "use the method ngram on CPU, ngram_gpu on GPUs, or leave it out"),
    Setting(other_than_latent_mtp, "a draft model other than MTP layers of latent attention beside latent attention "
            "(MLA)", "no other has been run, and a head of grouped-query attention needs other KV blocks",
            "use the method mtp or ngram on CPU, mtp or ngram_gpu on GPUs, or leave it out"),
    Setting(lambda c: drafts_by_model(c) and drafts_with_flashinfer(c), "a draft model with FLASHINFER",
            "its forwards have not been run on its kernels",
            "use --attention-backend FLASH_ATTN on Hopper, or leave the draft model out"),
    Setting(lambda c: drafts_by_model(c) and c.model_config.enable_prompt_embeds,
            "a draft model with --enable-prompt-embeds",
            "it takes in each prompt's tokens, and the first request without would end the engine",
            "leave one of them out, or use the method ngram on CPU, ngram_gpu on GPUs"),
    Setting(other_verification, "another way to verify drafts on CPU (rejection_sample_method in --speculative-config)",
            "vLLM's sampler there has none: with synthetic it ends the engine, of block it takes no notice",
            "leave rejection_sample_method out"),
    Setting(lambda c: draft_method(c) not in (None, *GPU_DRAFTERS, *MODEL_DRAFTERS)
            and c.parallel_config.worker_cls == GPU_WORKER,
            "speculative decoding on GPUs (--speculative-config, --spec-method)",
            _DRAFTS_ON_GPUS, _DRAFT_ON_GPUS, draft_method),
    Setting(lambda c: draft_method(c) and c.parallel_config.worker_cls == GPU_WORKER and not c.use_v2_model_runner,
            "speculative decoding on GPUs with the V1 model runner", "it has been run with V2's only",
            "leave VLLM_USE_V2_MODEL_RUNNER unset, or leave speculative decoding out"),
    Setting(lambda c: draft_method(c) in GPU_DRAFTERS and c.parallel_config.worker_cls == CPU_WORKER,
            "the method ngram_gpu on CPU", "it drafts on a GPU", "use the method ngram"),
    Setting(lambda c: draft_method(c) and c.use_v2_model_runner and c.parallel_config.worker_cls == CPU_WORKER,
            "speculative decoding with the V2 model runner on CPU", "it has been run with V1 only",
            "leave VLLM_USE_V2_MODEL_RUNNER unset"),
    Setting(lambda c: draft_method(c) and c.scheduler_config.async_scheduling and not c.use_v2_model_runner,
            "speculative decoding with async scheduling and the V1 model runner",
            "what its runner knows of tokens in flight is another thing, and was not tried",
            "add --no-async-scheduling"),
    Setting(_odd_blocks_on_cpu, "--block-size that is no multiple of 32 on CPU",
            "vLLM's attention takes no other blocks there, but for latents (MLA)",
            "use 32, 64 or 128, or leave it out"),
    Setting(_adapts_experts_on_cpu, "--enable-lora on CPU for experts", "vLLM has no experts with adapters there",
            "name the other layers, for example --lora-target-modules q_proj k_proj v_proj o_proj"),
    Setting(lambda c: c.kv_transfer_config is not None,
            "a KV connector (--kv-transfer-config, --kv-offloading-size)", _CONNECTORS),
    Setting(lambda c: c.ec_transfer_config is not None, "--ec-transfer-config",
            "encoder-cache connectors do not know of ranks"),
    Setting(lambda c: c.aux_output_config.enabled,
            "returning routed experts (--enable-return-routed-experts, --aux-output-config)", _ROUTED_EXPERTS),
    Setting(lambda c: c.diffusion_config is not None or c.model_config.is_diffusion, "a diffusion model", _DIFFUSION,
            "serve it without --nanocp"),
    Setting(_without_kv, "a model that keeps no KV (encoder-only)", "requests are placed by their KV", _INDEPENDENT),
    Setting(lambda c: _multimodal(c, "mm_processor_cache_type") == "shm", "--mm-processor-cache-type shm", _SHM_CACHE,
            "use lru, the default"),
    Setting(lambda c: c.parallel_config.data_parallel_external_lb or c.parallel_config.data_parallel_hybrid_lb,
            "an external or hybrid load balancer", _ONE_ADDRESS, _ON_THIS_MACHINE),
    Setting(lambda c: c.parallel_config.data_parallel_backend != "mp", "--data-parallel-backend", _ONE_ENGINE, _OR_RAY),
    Setting(lambda c: c.parallel_config.nnodes > 1, "--nnodes", "worker processes are on one machine",
            "use one node, or --distributed-executor-backend ray"),
    Setting(lambda c: c.parallel_config.enable_elastic_ep, "--enable-elastic-ep",
            "the number of ranks is fixed at start"),
    Setting(lambda c: c.parallel_config.enable_fault_tolerance, "--enable-fault-tolerance",
            "it watches engines behind an external load balancer, and here is one engine"),
    Setting(lambda c: c.parallel_config.enable_eplb, "--enable-eplb", _EPLB),
    Setting(lambda c: c.parallel_config.use_ubatching, "--enable-dbo or --ubatch-size", _MICRO_BATCHES),
    Setting(lambda c: c.parallel_config.dp_sync_interval != _SYNC_DEFAULT, "--dp-sync-interval", _SYNC),
    Setting(lambda c: c.parallel_config.numa_bind, "--numa-bind", _NUMA),
    Setting(lambda c: c.parallel_config.distributed_executor_backend not in EXECUTORS.values(), "another executor",
            "ranks are processes of one machine or Ray actors", "use mp or ray, or leave it out"),
    Setting(lambda c: c.parallel_config.worker_cls not in (CPU_WORKER, GPU_WORKER), "another worker class",
            "nanocp brings its own"),
    Setting(lambda c: c.scheduler_config.scheduler_cls != SCHEDULER, "another scheduler class",
            "nanocp brings its own"),
)  # fmt: skip

SHARDED_SETTINGS = (
    Setting(drafts_with_flashinfer, "speculative decoding with FLASHINFER and max_degree above 1",
            "rows of several queries have not been run on its kernels",
            f"leave it out, use --attention-backend FLASH_ATTN on Hopper, or {UNSHARDED}"),
    Setting(drafts_over_float8_latents,
            "speculative decoding of latent attention (MLA) with an fp8 cache and max_degree above 1",
            "FLASHMLA's kernel masks no more than two blocks of a row's keys, and takes rows of one length only",
            f"leave --kv-cache-dtype or speculative decoding out, or {UNSHARDED}"),
    Setting(lambda c: c.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill with max_degree above 1",
            "its layers attend with other rows than the step plan's",
            "leave it out, or use --nanocp-config '{\"max_degree\": 1}'"),
)  # fmt: skip


PACED_SETTINGS = (
    Setting(lambda c: c.scheduler_config.prefill_schedule_interval > 1, "--prefill-schedule-interval with prefill_gap",
            "both say which steps compute prompts", "leave one of them out"),
    Setting(lambda c: not c.scheduler_config.enable_chunked_prefill, "--no-enable-chunked-prefill with prefill_gap",
            "it cuts prompts into chunks, so that their steps end in time", "leave one of them out"),
)  # fmt: skip


def check_settings(vllm_config: Any, degree_limit: int, paced: bool = False) -> None:
    """Refuse what cannot work, in the configuration that vLLM has derived.

    Args:
        vllm_config: with the data-parallel size that the user gave.
        degree_limit: most ranks one request may use.
        paced: whether ``prefill_gap`` is set.

    Raises:
        NanoCPConfigError
    """
    sharded, pacing = SHARDED_SETTINGS if degree_limit > 1 else (), PACED_SETTINGS if paced else ()
    for setting in (*SETTINGS, *sharded, *pacing):
        setting.check(vllm_config)
