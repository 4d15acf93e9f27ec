// SPDX-License-Identifier: Apache-2.0
// Read by nvcc before FlashInfer's own files, see flashinfer_launches.py.
//
// FlashInfer's kernel that merges a row's pieces is written out for every head size, and for 512 its copy of a piece to
// shared memory, 16 numbers a thread, has no variant for numbers of 4 bytes. So nothing with float32 outputs compiles,
// whichever head size is wanted. This is that variant.
#pragma once

#include <flashinfer/cp_async.cuh>

namespace flashinfer {
namespace cp_async {

template <>
__device__ __forceinline__ void pred_load<512, PrefetchMode::kPrefetch, SharedMemFillMode::kNoFill, float>(
    float* smem_ptr, const float* gmem_ptr, bool predicate) {
#pragma unroll
  for (int at = 0; at < 16; at += 4) {
    pred_load<128, PrefetchMode::kPrefetch, SharedMemFillMode::kNoFill, float>(smem_ptr + at, gmem_ptr + at, predicate);
  }
}

}  // namespace cp_async
}  // namespace flashinfer
