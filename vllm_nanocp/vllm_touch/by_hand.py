# SPDX-License-Identifier: Apache-2.0
"""Attributes of vLLM's objects whose type mypy does not know: file (the end of its path) -> class -> names."""

_CONFIG = "vllm.config.vllm.VllmConfig"
_MODEL = "vllm.config.model.ModelConfig"
_PARALLEL = "vllm.config.parallel.ParallelConfig"
_SCHEDULER = "vllm.config.scheduler.SchedulerConfig"
_ARGS = "vllm.engine.arg_utils.EngineArgs"
_ATTENTION = "vllm.model_executor.layers.attention.attention.Attention"
_LATENT = "vllm.model_executor.layers.attention.mla_attention.MLAAttention"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
_ENGINE = "vllm.v1.engine.core.EngineCoreProc"
_MOE = "vllm.model_executor.layers.fused_moe"

BY_HAND: dict[str, dict[str, str]] = {
    "http_limits.py": {
        _CONFIG: "additional_config cache_config model_config",
        _MODEL: "max_model_len",
        "vllm.config.cache.CacheConfig": "block_size num_gpu_blocks",
        "vllm.v1.engine.EngineCoreRequest": "prompt_embeds prompt_token_ids sampling_params",
        "vllm.v1.engine.input_processor.InputProcessor": "vllm_config",
    },
    "cli.py": {_ARGS: "additional_config data_parallel_size"},
    "longest_request.py": {
        "vllm.v1.core.kv_cache_utils": "_auto_fit_max_model_len _check_enough_kv_cache_memory",  # 0.32
        "vllm.v1.core.kv_cache_planning": "_auto_fit_max_model_len _check_enough_kv_cache_memory",  # 0.33
    },
    "config.py": {_CONFIG: "additional_config"},
    "engine_config.py": {
        _ARGS: "additional_config distributed_executor_backend scheduler_cls worker_cls",
        _CONFIG: "attention_config cache_config compilation_config model_config observability_config parallel_config "
        "scheduler_config use_v2_model_runner",
        _MODEL: "get_sliding_window hf_text_config is_attention_free is_encoder_decoder is_hybrid is_moe model use_mla",
        _PARALLEL: "data_parallel_index data_parallel_rank data_parallel_rank_local data_parallel_size "
        "data_parallel_size_local",
        _SCHEDULER: "max_num_seqs",
        "vllm.config.attention.AttentionConfig": "backend flash_attn_version",
        "vllm.config.cache.CacheConfig": "cache_dtype",
        "vllm.config.compilation.CompilationConfig": "cudagraph_mode",
        "vllm.config.compilation.CUDAGraphMode": "mixed_mode",
        "vllm.config.observability.ObservabilityConfig": "enable_logging_iteration_details",
    },
    "refusals.py": {
        _ARGS: "data_parallel_backend enable_fault_tolerance scheduler_cls worker_cls",
        _CONFIG: "aux_output_config diffusion_config ec_transfer_config kv_transfer_config model_config "
        "parallel_config scheduler_config speculative_config",
        _MODEL: "attn_type is_diffusion",
        _PARALLEL: "data_parallel_external_lb data_parallel_hybrid_lb decode_context_parallel_size dp_sync_interval "
        "enable_elastic_ep enable_eplb nnodes numa_bind pipeline_parallel_size prefill_context_parallel_size "
        "use_ubatching",
        "vllm.config.cache.CacheConfig": "block_size kv_sharing_fast_prefill user_specified_block_size",
    },
    "drafters.py": {_ARGS: "spec_method spec_model speculative_config"},
    "machines.py": {
        _ARGS: "data_parallel_hybrid_lb data_parallel_size_local data_parallel_start_rank",
        _PARALLEL: "assigned_physical_gpu_ids distributed_executor_backend tensor_parallel_size",
        "vllm.platforms.cuda.CudaPlatformBase": "device_count",
    },
    "exit_code.py": {"vllm.v1.engine.utils.CoreEngineProcManager": "failed_proc_name"},
    "failed_start.py": {"vllm.v1.engine.core.EngineCore": "model_executor scheduler"},
    "kv_event_sources.py": {_ENGINE: "_make_ready_response scheduler"},
    "rank_hint.py": {_CONFIG: "additional_config", "vllm.v1.engine.input_processor.InputProcessor": "vllm_config"},
    "sched/status.py": {
        "vllm.v1.engine.core.EngineCore": "scheduler",
        "vllm.v1.engine.core_client.SyncMPClient": "call_utility",
        "vllm.v1.engine.core_client.AsyncMPClient": "call_utility_async",
        "vllm.v1.engine.async_llm.AsyncLLM": "engine_core",
        "vllm.entrypoints.llm.LLM": "llm_engine",
    },
    "world_size.py": {
        _CONFIG: "additional_config compute_hash parallel_config",
        _PARALLEL: "compute_hash data_parallel_size data_parallel_size_local tensor_parallel_size",
        "vllm.v1.engine.async_llm.AsyncLLM": "vllm_config",
    },
    "metrics/install.py": {"vllm.v1.metrics.loggers.StatLoggerManager": "engine_indexes stat_loggers"},
    "grammars.py": {"vllm.v1.structured_output.StructuredOutputManager": "_get_constraint_bounds"},
    "outlets.py": {_ENGINE: "_send_abort_outputs _weight_version engine_index process_output_sockets scheduler"},
    "rank_process.py": {_CONFIG: "cache_config"},
    "rank/rank_scheduler.py": {
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": "allocate_new_blocks block_size "
        "num_cached_block req_to_blocks",
        "vllm.v1.core.kv_cache_utils.KVCacheBlock": "block_id ref_cnt",
    },
    "sessions.py": {"vllm.v1.core.encoder_cache_manager.EncoderCacheManager": "free"},
    "rank/adapters.py": {"vllm.config.lora.LoRAConfig": "max_loras"},
    "gqa/cpu_backend.py": {_ATTENTION: "head_size impl num_heads num_kv_heads"},
    "mla/cpu_backend.py": {
        _LATENT: "W_UK_T W_UV forward_impl kv_lora_rank num_heads qk_head_dim scale v_head_dim",
    },
    "gqa/gpu_layer.py": {
        "vllm.v1.attention.backend.AttentionImplBase": "head_size num_heads scale supports_quant_query_input",
        "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl": "num_kv_heads",
        "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata": "block_table seq_lens",
        "vllm.v1.attention.backend.AttentionMetadataBuilder": "device vllm_config",
        "vllm.v1.attention.backend.AttentionLayer": "_k_scale _q_scale _v_scale",
        _ATTENTION: "head_size impl is_draft_layer kv_cache num_heads num_kv_heads",
        _CONFIG: "model_config parallel_config scheduler_config",
        _MODEL: "dtype get_head_size get_num_attention_heads get_num_kv_heads",
        _SCHEDULER: "max_num_seqs",
    },
    "flash_mla.py": {
        "vllm.model_executor.layers.attention.mla_attention.MLACommonImpl": "_concat_k_nope_k_pe "
        "_use_flashinfer_concat_mla_k",
    },
    "gqa/flash_backend.py": {"vllm.v1.attention.backend.AttentionLayer": "_k_scale _q_scale _v_scale"},
    "gqa/flashinfer_backend.py": {
        "vllm.v1.attention.backend.AttentionLayer": "_k_scale_float _q_scale_float _v_scale_float",
        _ATTENTION: "impl",
        _CONFIG: "cache_config",
        "vllm.config.cache.CacheConfig": "block_size cache_dtype",
    },
    "families.py": {
        _CONFIG: "attention_config model_config",
        _MODEL: "use_mla",
        "vllm.config.attention.AttentionConfig": "backend",
    },
    "supported.py": {
        _ATTENTION: "attn_backend head_size head_size_v impl kv_cache_dtype",
        _LATENT: "attn_backend impl kv_cache_dtype",
        "vllm.v1.attention.backend.AttentionBackend": "get_impl_cls",
    },
    "symmetric.py": {
        "vllm.platforms.cuda.NvmlCudaPlatform": "is_fully_connected visible_device_id_to_physical_device_id",
    },
    "graph_capacities.py": {
        _CONFIG: "compilation_config lora_config model_config scheduler_config use_v2_model_runner",
        _MODEL: "is_encoder_decoder",
        _SCHEDULER: "max_num_seqs",
        "vllm.config.compilation.CompilationConfig": "cudagraph_capture_sizes cudagraph_mode",
        "vllm.config.compilation.CUDAGraphMode": "decode_mode",
    },
    "queues.py": {"vllm.v1.executor.multiproc_executor.WorkerProc": "_init_message_queues rank worker"},
    "runner.py": {
        _V1_RUNNER: "_dummy_run compilation_config input_batch lora_config maybe_dummy_run_with_lora "
        "maybe_select_dummy_loras parallel_config requests",
        _V2_RUNNER: "_dummy_run is_encoder_decoder lora_config maybe_dummy_run_with_lora maybe_select_dummy_loras "
        "prepare_attn",
        "vllm.v1.worker.gpu_input_batch.InputBatch": "req_id_to_index",
        "vllm.v1.worker.gpu_input_batch.CachedRequestState": "generator output_token_ids req_id",
        "vllm.v1.worker.gpu.input_batch.InputBatch": "req_ids",
    },
    "cpu_cache_dtype.py": {
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadata": "num_actual_tokens",
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder": "kv_cache_spec",
    },
    "cpu_gatherv.py": {
        "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase": "all_gatherv "
        "device_group rank_in_group ranks reduce_scatterv world_size",
    },
    "cpu_expert_map.py": {f"{_MOE}.config.FusedMoEParallelConfig": "use_ep"},
    "cpu_moe_opaque.py": {
        f"{_MOE}.config.FusedMoEParallelConfig": "dp_size use_ep",
        f"{_MOE}.config.FusedMoEConfig": "moe_parallel_config",
        f"{_MOE}.runner.moe_runner.MoERunner": "_shared_experts moe_config",
    },
    "cpu_mla_chunks.py": {
        _CONFIG: "additional_config cache_config model_config scheduler_config",
        _MODEL: "hf_text_config use_mla",
        _SCHEDULER: "enable_chunked_prefill max_num_batched_tokens",
        "vllm.config.cache.CacheConfig": "enable_prefix_caching",
    },
    "cpu_seeded_chunks.py": {
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "discard_request_mask input_batch",
        "vllm.v1.worker.gpu_input_batch.InputBatch": "generators",
    },
    "cpu_shm_names.py": {
        "vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed": "communicator group_name",
        "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase": "rank",
    },
    "deepseek_one_token.py": {
        "vllm.model_executor.models.deepseek_v2.DeepseekV2DecoderLayer": "use_sequence_parallel_moe",
        _PARALLEL: "use_sequence_parallel_moe",
    },
    "remote_queue_shutdown.py": {
        "vllm.distributed.device_communicators.shm_broadcast.MessageQueue": "_is_remote_reader remote_socket "
        "shutting_down",
    },
}
