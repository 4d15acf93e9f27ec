# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels of sharded steps for GPUs that are not there, and print what each takes of one.

    python -m tools.compile_kernels [80 90 100]

Compiled is not run: it shows that the compiler accepts a kernel for a compute capability, and that its shared memory
and registers fit. On a GPU, Triton compares both with the device's own limits when a worker starts. No GPU is needed;
``ptxas`` comes with Triton. FlashInfer's kernels are not among these: FlashInfer compiles them with nvcc.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vllm_nanocp.attention import flash_launches, partial_rows
from vllm_nanocp.attention.gqa import flashinfer_launches, routed_layer, split_kv
from vllm_nanocp.attention.gqa.routed_layer import LocalBatch, Route, Routes
from vllm_nanocp.attention.gqa.split_kv import KV, Visits
from vllm_nanocp.attention.partial_rows import RowLayout

CAPABILITIES = (80, 90, 100)
# (query heads, KV heads, head size); types of the cache.
SHAPES = ((8, 2, 64), (32, 4, 128), (8, 2, 256))
CACHES = (torch.bfloat16, torch.float8_e4m3fn)
# A GPU with compute capability 8.0 has no float8.
FIRST_FLOAT8 = 89
CPU = torch.device("cpu")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
Call = tuple[Any, dict[str, Any]]


class Recorder:
    """Stands for a kernel: keeps what it is called with."""

    def __init__(self, kernel: Any, calls: list[Call]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = [p.name for p in self.kernel.params]
            self.calls.append((self.kernel, dict(zip(names, args, strict=False)) | kwargs))

        return launch


def calls_of(shape: tuple[int, int, int], cache: torch.dtype) -> list[Call]:
    """What a worker launches in sharded steps, as it launches it."""
    calls: list[Call] = []
    names = {
        flash_launches: ["_gather_kernel"],
        partial_rows: ["_pack_kernel", "_merge_kernel"],
        flashinfer_launches: ["_gather_kernel"],
        split_kv: ["_attend_kernel", "_pack_row_kernel"],
        routed_layer: ["_layer_kernel"],
    }
    kept = [(module, name, getattr(module, name)) for module, held in names.items() for name in held]
    for module, name, kernel in kept:
        setattr(module, name, Recorder(kernel, calls))
    try:
        _launch_all(shape, cache)
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)
    unique = {(id(kernel), str(signature(kernel, args)[:2])): (kernel, args) for kernel, args in calls}
    return list(unique.values())


def _launch_all(shape: tuple[int, int, int], cache: torch.dtype) -> None:
    heads, kv_heads, size = shape
    layout, dtype = RowLayout(heads, size), torch.bfloat16
    partial_rows.warm_up(layout, dtype, CPU)
    flash_launches.gather_tables([16], [1], CPU)
    flashinfer_launches.gather_pages([16], np.array([1]), CPU)
    keys, values = torch.zeros((2, kv_heads, 16, 2 * size), dtype=cache).transpose(1, 2).split(size, dim=-1)
    one = torch.ones(1)
    kv = KV(keys, values, 0.1, (None, one, one) if cache != dtype else (None, None, None))
    query_bytes, pointers = layout.query_bytes(dtype), torch.zeros(2, dtype=torch.int64)
    for queries in (1, 4):
        buffer = torch.zeros(Routes.size(1, 2, layout, query_bytes, queries), dtype=torch.uint8)
        routes = Routes(1, 2, 0, layout, query_bytes, buffer, pointers, queries)
        visits = Visits.empty(1, routes.places, heads, kv_heads, size, CPU, queries)
        query = torch.zeros((routes.places * queries, heads, size), dtype=dtype)
        split_kv.attend(query, kv, visits, dtype)
        split_kv.pack(layout.empty(queries, CPU), layout, visits)
        none = torch.zeros((routes.places, 2), dtype=torch.int64)
        nowhere = torch.full((1, 3), -1, dtype=torch.int64)
        route = Route(none, none[:, 0], none.new_zeros(4), nowhere, nowhere[0, :1])
        batch = LocalBatch(query[:1], query[:1].clone(), visits.done, visits.done[0])
        routes.attend(batch, kv, visits, route, 0)


def signature(kernel: Any, args: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """As Triton would see a launch: types by name, constants and what is a multiple of 16, by number."""
    types: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for number, parameter in enumerate(kernel.params):
        value = args[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[(number,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = True
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def registers(ptx: str, capability: int, arch: str) -> tuple[int, int]:
    """Registers a thread uses, and bytes that it spills."""
    ptxas = get_ptxas(capability).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    used, spilt = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    assert used is not None, said
    return int(used[1]), max(map(int, spilt), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES)
    print("| capability | heads, KV heads, size | cache | kernel | shared memory, bytes | registers | spilt, bytes |")
    print("|---|---|---|---|---|---|---|")
    for capability in parser.parse_args().capabilities:
        for shape in SHAPES:
            for cache in CACHES:
                if cache.itemsize == 1 and capability < FIRST_FLOAT8:
                    continue
                for kernel, args in calls_of(shape, cache):
                    types, constants, attributes = signature(kernel, args)
                    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
                    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                    arch = re.search(r"\.target (\S+)", made.asm["ptx"])
                    assert arch is not None and made.asm["cubin"]
                    used, spilt = registers(made.asm["ptx"], capability, arch[1].rstrip(","))
                    cells = (capability, shape, _TYPES[cache], kernel.__name__, made.metadata.shared, used, spilt)
                    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
