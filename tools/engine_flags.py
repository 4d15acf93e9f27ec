# SPDX-License-Identifier: Apache-2.0
"""What each of vLLM's engine arguments does with ``--nanocp``: the table of docs/flags.md, which this writes.

    python -m tools.engine_flags            # writes it
    python -m tools.engine_flags --check    # fails if it is not up to date

``tests/unit/test_engine_flags.py`` makes sure that every argument is here, that tests named exist, and that what is
said to be refused is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from vllm_nanocp.entry.refusals import FLAGS, SETTINGS, SHARDED_SETTINGS

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
WORKS, VLLM, REFUSED, NOTHING = "works", "as in vLLM", "refused", "no effect"
MEANING = {
    WORKS: "shown by the test named, with sharded requests",
    VLLM: "nothing here touches it, for the reason given; no test of this package shows it",
    REFUSED: "as in the row, and with other values than the default; the line that the server ends with says this",
    NOTHING: "for the reason given",
}


@dataclass(frozen=True)
class Group:
    """Arguments with the same answer.

    Attributes:
        kind: a key of ``MEANING``.
        why: the reason, in the user's words.
        fields: of vLLM's ``AsyncEngineArgs``, or of ``vllm serve``'s front-end.
        test: one that shows it, ``file::name`` under ``tests/``; for ``WORKS``.
    """

    kind: str
    why: str
    fields: str
    test: str = ""

    @property
    def names(self) -> list[str]:
        return self.fields.split()


# Those that older versions of vLLM lack: by the first version that has them. Its rows of the page say so.
SINCE = {
    "0.33": "monokernel sleep_mode_backend watchdog_config reasoning_effort_map",
}


def known_in(version: str, groups: tuple[Group, ...]) -> list[str]:
    """The arguments that are classified and that a version of vLLM has."""
    newer = {name for since, names in SINCE.items() if _number(version) < _number(since) for name in names.split()}
    return [name for group in groups for name in group.names if name not in newer]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


# For each argument that is refused (also if only some of its values are): a value that is, and what the line has.
REFUSED_VALUES: dict[str, tuple[list[str], str]] = {
    "pipeline_parallel_size": (["2"], "every layer"),
    "prefill_context_parallel_size": (["2"], "shard map"),
    "decode_context_parallel_size": (["2"], "per request"),
    "speculative_config": (['{"method": "draft_model", "num_speculative_tokens": 2}'], "to draft with a model"),
    "spec_method": (["draft_model"], "to draft with a model"),
    "data_parallel_rank": (["1"], "one engine"),
    "data_parallel_start_rank": (["1"], "one engine"),
    "data_parallel_size_local": (["1"], "one engine"),
    "data_parallel_external_lb": ([], "one address"),
    "data_parallel_hybrid_lb": ([], "one address"),
    "data_parallel_multi_port_external_lb": ([], "one address"),
    "data_parallel_backend": (["ray"], "one engine"),
    "nnodes": (["2"], "one machine"),
    "node_rank": (["1"], "one machine"),
    "distributed_executor_backend": (["uni"], "Ray actors"),
    "enable_elastic_ep": ([], "fixed at start"),
    "elastic_ep_max_dp_size": (["4"], "fixed at start"),
    "enable_fault_tolerance": ([], "one engine"),
    "enable_eplb": ([], "never tried"),
    "enable_dbo": ([], "micro-batches"),
    "ubatch_size": (["2"], "micro-batches"),
    "dp_sync_interval": (["4"], "one engine"),
    "kv_transfer_config": (['{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'], "know of shards"),
    "kv_offloading_size": (["1"], "know of shards"),
    "ec_transfer_config": (['{"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}'], "know of ranks"),
    "enable_return_routed_experts": ([], "several ranks"),
    "aux_output_config": (['{"enable_return_routed_experts": true}'], "several ranks"),
    "diffusion_config": (["{}"], "scheduler"),
    "mm_processor_cache_type": (["shm"], "readers"),
    "kv_sharing_fast_prefill": ([], "step plan"),
    "numa_bind": ([], "bound for one rank"),
    "ray_workers_use_nsight": ([], "actors"),
    "scheduler_cls": (["some.Scheduler"], "its own"),
    "worker_cls": (["some.Worker"], "its own"),
    "headless": ([], "API server"),
}

_ONLY_REFUSED = " ".join(
    name for name in REFUSED_VALUES
    if name not in ("distributed_executor_backend", "mm_processor_cache_type", "headless", "aux_output_config",
                    "speculative_config", "spec_method", "data_parallel_size_local", "data_parallel_start_rank",
                    "data_parallel_hybrid_lb")
)  # fmt: skip

ENGINE = (
    Group(WORKS, "how many ranks", "data_parallel_size", "engine/test_exact.py::test_tokens_and_logprobs"),
    Group(WORKS, "only where they say that all ranks are on this machine, which changes nothing in vLLM: as many "
          "as there are, from 0 on; else refused",
          "data_parallel_size_local data_parallel_start_rank data_parallel_hybrid_lb",
          "unit/test_deployments.py::test_all_ranks_on_this_machine"),
    Group(WORKS, "workers of a rank", "tensor_parallel_size", "engine/test_exact.py::test_tensor_parallel"),
    Group(WORKS, "`mp` and `ray`; others are refused", "distributed_executor_backend",
          "ray/test_exact.py::test_three_ranks"),
    Group(WORKS, "the experts are those of all ranks' workers", "enable_expert_parallel",
          "engine/test_exact.py::test_tokens_and_logprobs"),
    Group(WORKS, "the model, and how much of it", "model tokenizer served_model_name dtype max_model_len enforce_eager",
          "server/test_http.py::test_up_to_the_model_length"),
    Group(WORKS, "counted for each rank, as vLLM counts them for each engine",
          "block_size max_num_batched_tokens max_num_seqs num_gpu_blocks_override gpu_memory_utilization",
          "engine/test_lifecycle.py::test_larger_than_a_rank"),
    Group(WORKS, "every rank has a prefix cache; placement looks into all", "enable_prefix_caching",
          "engine/test_exact.py::test_shared_prefix"),
    Group(WORKS, "for the common queue and in every rank", "scheduling_policy",
          "engine/test_lifecycle.py::test_priorities"),
    Group(WORKS, "on GPUs; on CPU vLLM switches it off, whatever is asked for", "async_scheduling",
          "unit/test_scheduler_world.py::test_worlds"),
    Group(WORKS, "", "long_prefill_token_threshold", "unit/test_scheduler_world.py::test_worlds"),
    Group(WORKS, "all ranks start prompts in the same steps", "prefill_schedule_interval",
          "unit/test_prefill_interval.py::test_prompts_start_when_they_do_in_stock"),
    Group(WORKS, "each rank publishes on a port of its own", "kv_events_config",
          "unit/test_scheduler_world.py::test_worlds"),
    Group(WORKS, "what depends on the number of ranks (CUDA graphs, batch sizes) is derived with it",
          "all2all_backend performance_mode", "unit/test_derived_settings.py::test_all_else_is_as_stock_derives_it"),
    Group(WORKS, "where the ranks meet on this machine; with Ray an actor says it, and the first of these is refused",
          "data_parallel_address master_addr", "unit/test_derived_settings.py::test_all_else_is_as_stock_derives_it"),
    Group(WORKS, "its own key is `nanocp`; others stay", "additional_config",
          "server/test_refusals.py::test_other_additional_configuration_stays"),
    Group(WORKS, "", "structured_outputs_config", "engine/test_exact.py::test_json_schema"),
    Group(WORKS, "the mode with full graphs for mixed batches is refused, and graphs with the V1 runner",
          "compilation_config cudagraph_capture_sizes max_cudagraph_capture_size optimization_level",
          "gpu/test_exact.py::test_tokens"),
    Group(WORKS, "16 bits and fp8, on CPU fp8_e5m2 too; what the attention of shards cannot read is refused",
          "kv_cache_dtype", "engine/test_cache_dtypes.py::test_sharded_requests_with_another_cache_dtype"),
    Group(WORKS, "by `mtp`, `eagle`, `eagle3`; on CPU by `ngram`, `suffix`, `custom_class`, on GPUs by `ngram_gpu`; "
          "other methods are refused",
          "speculative_config spec_method spec_model spec_tokens", "engine/test_speculation.py::test_tokens"),
    Group(REFUSED, "the line that is printed says why", _ONLY_REFUSED),
    Group(VLLM, "only `enable_return_routed_experts` in it is refused; the rest has no effect without it",
          "aux_output_config"),
    Group(VLLM, "`lru` and none; `shm` is refused", "mm_processor_cache_type"),
    Group(VLLM, "the workers load the model with vLLM's own loader",
          "model_weights hf_config_path trust_remote_code download_dir safetensors_load_strategy "
          "safetensors_prefetch_num_threads safetensors_prefetch_block_size load_format config_format revision "
          "code_revision hf_token hf_overrides model_class_overrides quantization quantization_config "
          "allow_deprecated_quantization model_loader_extra_config ignore_patterns model_impl use_tqdm_on_load "
          "pt_load_map_location enable_ep_weight_filter"),
    Group(VLLM, "a worker's own matter; each rank's workers do it as an engine's do",
          "moe_backend linear_backend sparse_indexer_topk_backend ir_op_priority kernel_config "
          "enable_flashinfer_autotune expert_placement_strategy disable_custom_all_reduce enable_hc_sp "
          "enable_batch_sharded_sampling offload_backend cpu_offload_gb cpu_offload_params offload_group_size "
          "offload_num_in_group offload_prefetch_step offload_params kv_cache_memory_bytes worker_extension_cls "
          "profiler_config enable_layerwise_nvtx_tracing jit_monitor_mode jit_monitor_verbose engram_config "
          "monokernel distributed_timeout_seconds cpu_distributed_timeout_seconds enable_cumem_allocator "
          "enable_nccl_comm_suspend device_ids enable_shm_tensor_arena"),
    Group(VLLM, "sampling is at a request's home, with vLLM's sampler; what it keeps of a request goes by the "
          "request's tokens, which go along when it moves",
          "seed max_logprobs logprobs_mode use_fp64_gumbel return_sampling_mask enable_trace_replay logits_processors "
          "watermark_config"),
    Group(VLLM, "each rank's scheduler is vLLM's and looks at it itself",
          "max_num_scheduled_tokens max_num_active_seqs disable_chunked_mm_input "
          "scheduler_reserve_full_isl watermark long_prefill_token_threshold_adaptive prefix_caching_hash_algo "
          "ec_manager_config"),
    Group(WORKS, "without it refused with `prefill_gap`", "enable_chunked_prefill",
          "engine/test_exact.py::test_tokens_and_logprobs"),
    Group(WORKS, "each rank's workers load adapters as an engine's do; sharded steps then attend outside of graphs; "
          "on CPU refused for experts",
          "enable_lora max_loras max_lora_rank lora_target_modules", "engine/test_adapters.py::test_adapters"),
    Group(WORKS, "such requests stay on one rank", "enable_prompt_embeds",
          "engine/test_adapters.py::test_prompt_embeddings"),
    Group(VLLM, "as of the adapters above", "max_cpu_loras lora_dtype fully_sharded_loras "
          "default_mm_loras enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format "
          "enable_moe_shared_loras max_lora_cls_labels"),
    Group(VLLM, "pooling requests stay on one rank; models that keep no KV are refused",
          "runner convert pooler_config"),
    Group(VLLM, "requests with other inputs than text stay on one rank; the inputs are vLLM's",
          "language_model_only limit_mm_per_prompt enable_mm_embeds interleave_mm_strings "
          "media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_hasher_algorithm "
          "mm_shm_cache_max_object_size_mb mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype "
          "mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin "
          "skip_mm_profiling video_pruning_rate video_pruning_method mm_processor_device mm_ipc_gpu_memory_gb "
          "mm_device_do_normalize enable_mm_processor_stats"),
    Group(VLLM, "vLLM refuses `torch_shm` with several ranks, here as without this package", "mm_tensor_ipc"),
    Group(VLLM, "with it a multi-modal model keeps no KV, which is refused; text models ignore it", "mm_encoder_only"),
    Group(VLLM, "vLLM refuses any but the block size for models that are sharded", "prefix_match_unit"),
    Group(VLLM, "attention that cannot serve shards is refused, whatever chose it: at start or with the model loaded",
          "attention_backend attention_config disable_sliding_window disable_hybrid_kv_cache_manager "
          "kv_cache_dtype_skip_layers"),
    Group(VLLM, "for models whose attention has windows or states, which are served with `max_degree` 1 only",
          "prefix_cache_retention_interval swa_bounded_replay mamba_config mamba_cache_dtype mamba_ssm_cache_dtype "
          "mamba_block_size mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm "
          "mamba_backend mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds "
          "gdn_prefill_backend kda_prefill_backend kda_decode_backend"),
    Group(VLLM, "the front-end's, which this package does not touch",
          "skip_tokenizer_init tokenizer_mode tokenizer_revision allowed_local_media_path allowed_media_domains "
          "io_processor_plugin renderer_num_workers generation_config override_generation_config reasoning_config "
          "reasoning_parser reasoning_parser_plugin logging_config log_level log_config_file stream_interval "
          "max_num_queued_reqs max_num_queued_tokens shutdown_timeout fail_on_environ_validation enable_log_requests "
          "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces custom_histogram_buckets "
          "tokens_only"),
    Group(VLLM, "counted by each rank's scheduler, which is vLLM's; the counts go along when a request moves",
          "per_request_spec_decode_metrics"),
    Group(VLLM, "this package's metrics are on and off with vLLM's", "disable_log_stats"),
    Group(VLLM, "vLLM's statistics of the ranks are taken together as the guide says",
          "kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics enable_mfu_metrics"),
    Group(VLLM, "keeps the ranks' schedulers in the engine's process; refused with `scheduler_processes` set to `true`",
          "enable_logging_iteration_details"),
    Group(VLLM, "sleep and weights go through vLLM's calls to all workers",
          "enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names "
          "weight_transfer_config"),
    Group(VLLM, "writes what a process is doing that has made no step for a while; the engine and each worker have one",
          "watchdog_config"),
    Group(VLLM, "for the ranks' agreement on batch sizes, where they still ask each other (LoRA with the V2 runner)",
          "disable_nccl_for_dp_synchronization"),
    Group(NOTHING, "there is one engine to log of", "aggregate_engine_logging"),
    Group(NOTHING, "engines on this machine are reached by other ways, as in vLLM", "data_parallel_rpc_port"),
    Group(NOTHING, "only with `--nnodes`, which is refused", "master_port"),
    Group(NOTHING, "only with context parallelism, which is refused",
          "dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size"),
    Group(NOTHING, "only with micro-batches, which are refused",
          "dbo_decode_token_threshold dbo_prefill_token_threshold"),
    Group(NOTHING, "only with `--enable-eplb`, which is refused; vLLM refuses redundant experts alone", "eplb_config"),
    Group(NOTHING, "only with `--enable-fault-tolerance`, which is refused", "fault_tolerance_config"),
    Group(NOTHING, "only with `--numa-bind`, which is refused; vLLM refuses them alone",
          "numa_bind_nodes numa_bind_cpus"),
    Group(NOTHING, "only with `--kv-offloading-size`, which is refused", "kv_offloading_backend"),
    Group(NOTHING, "in vLLM neither", "disable_cascade_attn max_parallel_loading_workers"),
    Group(NOTHING, "vLLM sets it: the number of API servers", "_api_process_count _api_process_rank"),
)  # fmt: skip

# Of `vllm serve`: what is not an argument of the engine.
FRONT_END = (
    Group(WORKS, "by default one for each rank, as in vLLM", "api_server_count",
          "server/test_api_servers.py::test_as_many_as_ranks"),
    Group(REFUSED, "there is no engine without the API server's", "headless"),
    Group(VLLM, "a file of arguments, each of which is looked at as if it were given", "config"),
    Group(VLLM, "vLLM's API servers are as they are; the one check added to them is for requests that can never fit",
          "model_tag grpc grpc_port host port uds uvicorn_log_level disable_uvicorn_access_log "
          "disable_access_log_for_endpoints allow_credentials allowed_origins allowed_methods allowed_headers api_key "
          "ssl_keyfile ssl_certfile ssl_ca_certs enable_ssl_refresh ssl_cert_reqs ssl_ciphers root_path middleware "
          "enable_request_id_headers disable_fastapi_docs h11_max_incomplete_event_size h11_max_header_count "
          "enable_offline_docs lora_modules chat_template chat_template_content_format trust_request_chat_template "
          "trust_request_mm_kwargs default_chat_template_kwargs response_role return_tokens_as_token_ids "
          "enable_auto_tool_choice exclude_tools_when_tool_choice_none tool_call_parser tool_parser_plugin "
          "tool_strict_level tool_server max_log_len enable_prompt_tokens_details enable_per_request_metrics "
          "enable_server_load_tracking enable_force_include_usage sse_keep_alive_interval "
          "enable_tokenizer_info_endpoint enable_log_outputs enable_log_deltas cohere_is_reasoning_model cohere_format "
          "anthropic_disabled_thinking_effort reasoning_effort_map log_error_stack enable_scale_out fingerprint_value "
          "enable_flash_late_interaction"),
    Group(WORKS, "`full` names the ranks, as in stock", "fingerprint_mode",
          "unit/test_world_size.py::test_a_configuration_tells_of_all_ranks"),
    Group(NOTHING, "only with `--data-parallel-multi-port-external-lb`, which is refused",
          "data_parallel_supervisor_port dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s "
          "dp_supervisor_probe_failure_threshold"),
)  # fmt: skip

_HEAD = """# Engine arguments of vLLM 0.32 and 0.33

<!-- Written by tools/engine_flags.py: change it there. -->

What each argument of vLLM's engine does with `--nanocp`. A test compares this list with vLLM's, so none is missing.
Where a name begins with `_`, it is no flag. Where a version is behind a name, older ones lack it.

| | |
|---|---|
"""


def _flag(name: str) -> str:
    since = "".join(f" ({version})" for version, names in SINCE.items() if name in names.split())
    return (f"`{name}`" if name.startswith("_") else "`--" + name.replace("_", "-") + "`") + since


def _refusal(name: str) -> str:
    """Why an argument is refused and what instead, as the line says it."""
    for flag in FLAGS:
        if flag.field == name:
            return f"{flag.why}; {flag.instead}"
    for setting in (*SETTINGS, *SHARDED_SETTINGS):
        if setting.what.startswith("--" + name.replace("_", "-")):
            return f"{setting.why}; {setting.instead}"
    return "nanocp brings its own; leave it out"


def _rows(groups: tuple[Group, ...]) -> str:
    lines = ["| arguments | | why, and the test that shows it |", "|---|---|---|"]
    for kind in MEANING:
        for group in groups:
            if group.kind == kind == REFUSED:
                for name in group.names:
                    example = " ".join([_flag(name).strip("`"), *REFUSED_VALUES[name][0]])
                    lines.append(f"| `{example}` | {kind} | {_refusal(name)} |")
            elif group.kind == kind:
                test = f"`tests/{group.test}`" if group.test else ""
                why = "; ".join(part for part in (group.why, test) if part)
                lines.append(f"| {', '.join(map(_flag, group.names))} | {kind} | {why} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole text of docs/flags.md."""
    meaning = "".join(f"| {kind} | {text} |\n" for kind, text in MEANING.items())
    return (
        f"{_HEAD}{meaning}\n## Of the engine\n\n{_rows(ENGINE)}\n## Of `vllm serve`, beside those\n\n{_rows(FRONT_END)}"
    )


def main() -> None:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            raise SystemExit(f"{PAGE} is not up to date: python -m tools.engine_flags")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
