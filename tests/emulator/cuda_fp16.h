// float16 of CUDA C++, as much as we use.
#pragma once

#include "cuda_runtime.h"
#include "ops/dtype.h"

struct __half {
  uint16_t bits = 0;
  __half() = default;
  __half(float x) { qmoe_plugin::StoreFloat(&bits, qmoe_plugin::DType::kFloat16, 0, x); }
  operator float() const { return qmoe_plugin::LoadFloat(&bits, qmoe_plugin::DType::kFloat16, 0); }
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float x) { return {x}; }
inline float __half2float(__half x) { return x; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {a.x - b.x, a.y - b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {std::fma(float(a.x), float(b.x), float(c.x)),
          std::fma(float(a.y), float(b.y), float(c.y))};
}
