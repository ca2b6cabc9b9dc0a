// Quantises activations on the device, as ops/qmoe/activation_quant.h says: rows by a kernel of its own, or values where a GEMM
// kernel has them.
#pragma once

#include <cuda_runtime.h>

#include "ops/common/cuda_host.h"
#include "ops/common/ptx.cuh"
#include "ops/common/types.cuh"
#include "ops/problem.h"
#include "ops/qmoe/activation_quant.h"

namespace qmoe_plugin {

/// Two numbers as e4m3 has them.
__device__ inline float2 RoundToE4M3(float2 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __half22float2(E4M3ToHalf2(ToE4M3(v)));
#else
  return make_float2(RoundToE4M3(v.x), RoundToE4M3(v.y));
#endif
}

/// Values [i] become e4m3([i] * factor) * scale, a pair at a time.
template <class T, int kWidth>
__device__ void RoundScaled(T (&values)[kWidth], float factor, float scale) {
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    const bool pair = i + 1 < kWidth;
    const float2 rounded = RoundToE4M3(
        make_float2(ToFloat(values[i]) * factor, pair ? ToFloat(values[i + 1]) * factor : 0.0f));
    values[i] = FromFloat<T>(rounded.x * scale);
    if (pair) values[i + 1] = FromFloat<T>(rounded.y * scale);
  }
}

/// kMxFp8 of neighbouring values, a block in 32 / kWidth neighbouring lanes. Whole warps take part.
template <class T, int kWidth>
__device__ void QuantizeMx(T (&values)[kWidth]) {
  constexpr int kLanes = kMxBlock / kWidth;
  static_assert(kMxBlock == 32, "a warp or a part of it takes one block");
  uint32_t magnitude = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) magnitude = max(magnitude, MagnitudeBits(ToFloat(values[i])));
#pragma unroll
  for (int other = 1; other < kLanes; other *= 2)
    magnitude = max(magnitude, __shfl_xor_sync(0xffffffff, magnitude, other));
  const MxScale scale = MxScaleOf(magnitude);
  RoundScaled(values, scale.inverse, scale.scale);
}

/// kFp8 of any values.
template <class T, int kWidth>
__device__ void QuantizeFp8(T (&values)[kWidth], float scale) {
#pragma unroll
  for (T& value : values) value = FromFloat<T>(RoundToE4M3(ToFloat(value) / scale));
}

struct ActivationQuantArgs {
  DType dtype;  // of x and y
  ActivationQuant mode;
  const void* x;      // [*, k]
  const int* x_rows;  // [rows] row of x of each row of y; null = the row itself
  int64_t rows;
  int k;
  const float* scales;  // kFp8: [experts]
  const int*
      expert_offsets;  // [experts + 1] first row of y of each expert; null = scales[0] for all
  int experts;
  void* y;          // [rows, k]; may be x where x_rows is null
  Overlap overlap;  // with the kernel before, which may write x
};

void LaunchActivationQuant(const ActivationQuantArgs& args, cudaStream_t stream);
void PrepareActivationQuant(DType dtype);

}  // namespace qmoe_plugin
