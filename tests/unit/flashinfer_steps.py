# SPDX-License-Identifier: Apache-2.0
"""The FlashInfer backend under ``attention_steps``: on GPUs with the real library; on CPU with a reference in its
place, under vLLM's own code as well, so that all around the kernels runs on any machine."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.unit.attention_steps import Kernel, Shape, run_scenarios
from tests.unit.flash_steps import (
    MAX_REQS,
    make_routes,
    reference_attend,
    reference_merge,
    reference_pack_visits,
    write,
)

CUDA = torch.cuda.is_available()
NAN = float("nan")


class FlashInferShape(Shape):
    """vLLM sorts batches for this backend."""

    decodes_first = True


class ReferencePrefill:
    """Signatures as the library's (``tests/gpu/test_flashinfer.py`` compares), of what is used here and by vLLM.
    Log-sum-exps are base 2. What it says of a query without keys is -inf, and NaN."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and not use_cuda_graph
        self.layout, self.backend = kv_layout, backend

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len, seq_lens)
        assert all(x is not None and x.dtype == torch.int32 and x.device.type == "cpu" for x in on_host)
        assert paged_kv_indices.dtype == torch.int32 and len(paged_kv_indices) >= paged_kv_indptr[-1]
        counts = paged_kv_indptr.diff()
        last = torch.where(counts > 0, paged_kv_last_page_len, 0)
        assert torch.equal((counts - 1).clamp(min=0) * page_size + last, seq_lens)
        assert ((counts == 0) | ((last > 0) & (last <= page_size))).all()
        assert o_data_type in (None, torch.bfloat16, torch.float16), "the library has no other"
        self._causal, self._sm_scale, self._window_left = causal, sm_scale, window_left
        self._logits_soft_cap = logits_soft_cap or 0.0
        self.starts, self.lengths = qo_indptr.tolist(), seq_lens.tolist()
        bounds = paged_kv_indptr.tolist()
        self.pages = [paged_kv_indices[first:end] for first, end in itertools.pairwise(bounds)]
        self.page_size = page_size
        self.dtypes = q_data_type, kv_data_type or q_data_type, o_data_type or q_data_type
        self.heads = num_qo_heads, num_kv_heads, head_dim_qk

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        kv_cache_sf: Any = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        assert not args and kv_cache_sf is None and sinks is None and out is not None and out.is_contiguous()
        keys, values = (x.transpose(1, 2) if self.layout == "HND" else x for x in paged_kv_cache)
        assert keys.stride() == values.stride() and keys.stride(-1) == 1 and keys.shape[1] == self.page_size
        assert (q.dtype, keys.dtype, out.dtype) == self.dtypes and len(q) == self.starts[-1]
        assert (q.shape[1], keys.shape[2], q.shape[2]) == self.heads and q.stride()[1:] == (q.shape[2], 1)
        found = torch.full(q.shape[:2], NAN) if lse is None else lse
        assert found.shape == q.shape[:2] and found.dtype == torch.float32
        factor = (self._sm_scale or 0) * (q_scale or 1.0) * (k_scale or 1.0)
        for row, (length, pages) in enumerate(zip(self.lengths, self.pages, strict=True)):
            part = slice(self.starts[row], self.starts[row + 1])
            if not length:
                out[part], found[part] = NAN, -math.inf
                continue
            group = q.shape[1] // keys.shape[2]
            k, v = (x[pages.long()].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->qhk", q[part].double(), k) * factor
            if self._causal:
                shown = torch.ones(len(scores), length, dtype=torch.bool).tril(length - len(scores))
                scores.masked_fill_(~shown[:, None], -math.inf)
            found[part] = (scores.logsumexp(-1) / math.log(2)).float()
            out[part] = (torch.einsum("qhk,khd->qhd", scores.softmax(-1), v) * (v_scale or 1.0)).to(out.dtype)
        return (out, found) if return_lse else out


class ReferenceDecode(ReferencePrefill):
    """Rows of one query. vLLM hands padding over with rows without keys."""

    is_cuda_graph_enabled = False

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", **kwargs: Any) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        names = ("sm_scale", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "o_data_type", "seq_lens")
        one = torch.arange(len(indptr), dtype=torch.int32)
        rest = {name: kwargs[name] for name in (*names, "num_qo_heads", "num_kv_heads", "page_size")}
        super().plan(one, indptr, indices, last_page_len, head_dim_qk=kwargs["head_dim"], **rest)


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """As the library's."""
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def install() -> None:
    """A module of the library's name in this process, with all that vLLM takes of it."""
    names = {
        "flashinfer": "BatchAttentionWithAttentionSinkWrapper BatchPrefillWithRaggedKVCacheWrapper "
        "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
        "flashinfer.decode": "fast_decode_plan trtllm_batch_decode_with_kv_cache",
        "flashinfer.prefill": "trtllm_batch_context_with_kv_cache",
        "flashinfer.utils": "FP4Tensor get_device_sm_count get_trtllm_gen_multi_ctas_kv_counter_bytes",
    }
    for module, members in names.items():
        made = ModuleType(module)
        for name in members.split():
            setattr(made, name, type(name, (), {}))
        sys.modules[module] = made
    root = sys.modules["flashinfer"]
    root.BatchPrefillWithPagedKVCacheWrapper = ReferencePrefill  # type: ignore[attr-defined]
    root.BatchDecodeWithPagedKVCacheWrapper = ReferenceDecode  # type: ignore[attr-defined]
    root.get_seq_lens = get_seq_lens  # type: ignore[attr-defined]


if not CUDA:
    install()

from vllm.v1.attention.backends import flashinfer as stock  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.utils import CpuGpuBuffer  # noqa: E402

from vllm_nanocp.attention import gpu_rows  # noqa: E402
from vllm_nanocp.attention.gqa import flash_tables, gpu_layer  # noqa: E402
from vllm_nanocp.attention.gqa.flashinfer_backend import (  # noqa: E402
    NanoCPFlashInferImpl,
    NanoCPFlashInferMetadataBuilder,
)


class _CopyPages:
    """vLLM's kernel of that name."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(indices: torch.Tensor, table: torch.Tensor, _: int, starts: torch.Tensor, BLOCK_SIZE: int) -> None:
            for row in range(grid[0]):
                first, end = starts[row : row + 2].tolist()
                indices[first:end] = table[row, : end - first]

        return run


def make_builder(
    shape: Shape, device: torch.device, xqa: bool = False, graphs: bool = False, max_reqs: int = MAX_REQS
) -> NanoCPFlashInferMetadataBuilder:
    """A metadata builder without the engine's configuration.

    Args:
        shape: of the layers.
        device: of all tensors.
        xqa: whether stock decoding is the kernel that vLLM takes on Hopper where it may download; else FlashInfer's.
        graphs: whether decoding is replayed from graphs.
        max_reqs: most rows of a batch.
    """
    quantized = shape.cache_dtype != "auto"
    kv_dtype = torch.float8_e4m3fn if quantized else shape.dtype
    workspace = torch.zeros((256 << 20) if device.type == "cuda" else 16, dtype=torch.uint8, device=device)
    buffer = functools.partial(CpuGpuBuffer, dtype=torch.int32, device=device, pin_memory=False)
    values: dict[str, Any] = {
        "device": device,
        "vllm_config": SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=max_reqs)),
        "model_config": SimpleNamespace(dtype=shape.dtype),
        "cache_config": SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        "attention_config": SimpleNamespace(use_trtllm_attention=False),
        "global_hyperparameters": SimpleNamespace(has_same_window_lefts=True, has_same_all_params=True),
        "num_qo_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "page_size": shape.block_size,
        "sm_scale": shape.scale,
        "window_left": -1,
        "logits_soft_cap": None,
        "has_sinks": False,
        "cache_dtype": shape.cache_dtype,
        "kv_cache_dtype": kv_dtype,
        # As on Hopper: prefill takes queries of float8, decoding does not, nor does this package's.
        "q_data_type_prefill": kv_dtype if CUDA else shape.dtype,
        "q_data_type_decode": shape.dtype,
        "use_dcp": False,
        "dcp_world_size": 1,
        "use_trtllm_decode_attention": xqa,
        "use_xqa": xqa,
        "flashinfer_trtllm_api_decode_kernel": stock.FlashInferDecodeKernel.XQA if xqa else None,
        "use_trtllm_gen_varlen_decode": False,
        "_num_speculative_tokens": 0,
        "_decode_mask_cache": {},
        "prefill_fixed_split_size": -1,
        "decode_fixed_split_size": -1,
        "disable_split_kv": False,
        "is_kvcache_nvfp4": False,
        "nvfp4_trtllm": False,
        "nvfp4_fa2": False,
        "_workspace_buffer": workspace,
        "use_fa2_native_decode": False,  # vLLM 0.33, below Hopper
        "use_trtllm_dcp_prefill": False,
        "_prefill_wrapper": None,
        "_noncausal_prefill_wrapper": None,
        "_decode_wrapper": None,
        "enable_cuda_graph": graphs,
        "_decode_wrappers_cudagraph": {},
        "_decode_cudagraph_max_bs": max_reqs,
        "max_num_reqs": max_reqs,
        "paged_kv_indptr": buffer(max_reqs + 1),
        "paged_kv_indices": torch.zeros(max_reqs * 40, dtype=torch.int32, device=device),
        "paged_kv_last_page_len": buffer(max_reqs),
    }
    builder = object.__new__(NanoCPFlashInferMetadataBuilder)
    builder.__dict__.update(values)
    return builder


def make_impl(shape: Shape) -> NanoCPFlashInferImpl:
    """An attention implementation without the engine's configuration."""
    values: dict[str, Any] = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "num_queries_per_kv": shape.num_heads // shape.num_kv_heads,
        "head_size": shape.head_size,
        "scale": shape.scale,
        "alibi_slopes": None,
        "sliding_window": (-1, -1),
        "window_left": -1,
        "logits_soft_cap": None,
        "cache_dtype": shape.cache_dtype,
        "kv_cache_dtype": shape.cache_dtype,
        "is_kvcache_nvfp4": False,
        "nvfp4_fa2": False,
        "nvfp4_trtllm": False,
        "kv_sharing_target_layer_name": None,
        "sinks": None,
        "supports_quant_query_input": False,
        "bmm1_scale": None,
        "bmm2_scale": None,
        "o_sf_scale": None,
        "_multi_ctas_kv_counter_buffer": None,  # vLLM 0.33, for kernels of Blackwell
        "dcp_world_size": 1,
    }
    impl = object.__new__(NanoCPFlashInferImpl)
    impl.__dict__.update(values)
    return impl


def make_layer(shape: Shape, device: torch.device) -> Any:
    keys, values = shape.cache_scales
    scales: dict[str, Any] = {"_q_scale_float": 1.0, "_k_scale_float": keys, "_v_scale_float": values}
    tensors = {name.removesuffix("_float"): torch.tensor([x], device=device) for name, x in scales.items()}
    return SimpleNamespace(**scales, **tensors, is_draft_layer=False)


def use_references() -> None:
    """In this process, which has no GPU."""
    stock._copy_page_indices_kernel = _CopyPages()  # type: ignore[assignment]
    gpu_layer.attend_visits = reference_attend
    gpu_layer.pack = reference_pack_visits
    gpu_rows.merge_rows = reference_merge


def flashinfer_kernel(
    device: str = "cpu",
    capacity: int = 0,
    pad: int = 16,
    routed: bool = False,
    shared: str | None = None,
    xqa: bool = False,
    graphs: bool = False,
) -> Kernel:
    """The backend on a device; see ``flash_kernel`` and ``make_builder``."""
    where = torch.device(device)
    flash_tables.queries_at_once = lambda *_: 7  # type: ignore[assignment]  # so that chunks take several launches
    if where.type == "cpu":
        use_references()
    builder = functools.cache(lambda shape: make_builder(shape, where, xqa, graphs))
    return Kernel(
        builder,
        make_impl,
        lambda shape: make_layer(shape, where),
        write,
        where,
        lambda impl, *args: impl.forward(*args),
        capacity,
        pad if capacity else 0,
        routes=functools.cache(lambda *args: make_routes(*args, capacity, shared)) if routed else None,
    )


def run_modes(
    rank: int, size: int, modes: dict[str, tuple[dict[str, Any], list[Any]]]
) -> dict[str, tuple[dict[str, int], list[tuple[int, float]]]]:
    """``run_scenarios`` by mode, all in one start of the ranks: arguments of ``flashinfer_kernel``, and scenarios."""
    return {
        name: run_scenarios(rank, size, {name: specs}, functools.partial(flashinfer_kernel, **args))[name]
        for name, (args, specs) in modes.items()
    }


def missing_parameters(real: Any, reference: Any) -> set[str]:
    """Parameters that a reference has and the library's function has not."""
    theirs = inspect.signature(real).parameters
    return {name for name in inspect.signature(reference).parameters if name not in theirs}
