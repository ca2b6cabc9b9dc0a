// Activation and scale types as CUDA spells them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ops/dtype.h"

namespace qmoe_plugin {

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__half x) { return __half2float(x); }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T FromFloat(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

/// Two 16-bit floats, rounded once each, as a register of an MMA operand.
template <class T>
__device__ uint32_t PackPair(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

/// A pair of 16-bit activations.
template <class T>
using T2Of = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

/// Type of block scales and zero offsets beside activations of type T.
template <class T>
using ScaleOf = std::conditional_t<std::is_same_v<T, float>, float, __half>;

/// A pair of them, for the two rows of a lane.
template <class T>
using Scale2Of = std::conditional_t<std::is_same_v<T, float>, float2, __half2>;

__device__ inline float2 ToFloat2(float2 x) { return x; }
__device__ inline float2 ToFloat2(__half2 x) { return __half22float2(x); }

/// Neighbouring values that are loaded and stored together, 16 bytes at a time if there are so many.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth > 16 ? 16 : sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

/// Element `index` of a float32, float16 or bfloat16 array whose type is known at run time only.
__device__ inline float LoadAsFloat(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) return ToFloat(static_cast<const __half*>(data)[index]);
  if (dtype == DType::kBFloat16) return ToFloat(static_cast<const __nv_bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

/// Calls fn(T()) with the type that `dtype` names: float, __half or __nv_bfloat16.
template <class Fn>
void WithType(DType dtype, Fn&& fn) {
  if (dtype == DType::kFloat16)
    fn(__half());
  else if (dtype == DType::kBFloat16)
    fn(__nv_bfloat16());
  else
    fn(float());
}

}  // namespace qmoe_plugin
