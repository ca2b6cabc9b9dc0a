// bfloat16 of CUDA C++, as much as we use.
#pragma once

#include "cuda_runtime.h"
#include "ops/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) { qmoe_plugin::StoreFloat(&bits, qmoe_plugin::DType::kBFloat16, 0, x); }
  operator float() const { return qmoe_plugin::LoadFloat(&bits, qmoe_plugin::DType::kBFloat16, 0); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __low2bfloat162(__nv_bfloat162 a) { return {a.x, a.x}; }
inline __nv_bfloat162 __high2bfloat162(__nv_bfloat162 a) { return {a.y, a.y}; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {float(a.x) + float(b.x), float(a.y) + float(b.y)};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {float(a.x) * float(b.x), float(a.y) * float(b.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {std::fma(float(a.x), float(b.x), float(c.x)),
          std::fma(float(a.y), float(b.y), float(c.y))};
}
