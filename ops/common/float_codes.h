// Small float codes as numbers, on host and device; and what decoders of fragments share.
#pragma once

#include "ops/formats/format.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ops/common/ptx.cuh"
#endif

namespace qmoe_plugin {

/// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, from code 8 on, their negatives.
QMOE_HOST_DEVICE inline float DecodeE2M1(uint32_t code) {
  const uint32_t exponent = (code >> 1) & 3, mantissa = code & 1;
  const float magnitude =
      exponent == 0 ? 0.5f * float(mantissa) : float(2 + mantissa) * 0.25f * float(1u << exponent);
  return code & 8 ? -magnitude : magnitude;
}

/// e4m3fn: bias 7, no infinity, 0x7f and 0xff are NaN, largest 448.
QMOE_HOST_DEVICE inline float DecodeE4M3(uint32_t code) {
  const uint32_t exponent = (code >> 3) & 15, mantissa = code & 7;
  float magnitude = exponent == 0 ? float(mantissa) * 0x1p-9f
                                  : float(8 + mantissa) * 0x1p-10f * float(1u << exponent);
  if ((code & 0x7f) == 0x7f) magnitude = __builtin_nanf("");
  return code & 0x80 ? -magnitude : magnitude;
}

#if defined(__CUDACC__)
/// float2, rounded where need be, as half2, float2 or bfloat162.
template <class T2>
__device__ inline T2 FromFloat2(float2 v) {
  if constexpr (std::is_same_v<T2, __half2>)
    return __floats2half2_rn(v.x, v.y);
  else if constexpr (std::is_same_v<T2, __nv_bfloat162>)
    return __floats2bfloat162_rn(v.x, v.y);
  else
    return v;
}

/// One of two numbers twice.
__device__ inline __half2 Both(__half2 v, bool second) {
  return second ? __high2half2(v) : __low2half2(v);
}
__device__ inline __nv_bfloat162 Both(__nv_bfloat162 v, bool second) {
  return second ? __high2bfloat162(v) : __low2bfloat162(v);
}

/// half2 as half2, float2 (both exactly) or bfloat162 (rounded where need be).
template <class T2>
__device__ inline T2 FromHalf2(__half2 v) {
  if constexpr (std::is_same_v<T2, __half2>) {
    return v;
  } else if constexpr (std::is_same_v<T2, __nv_bfloat162>) {
    return FromFloat2<T2>(__half22float2(v));
  } else {
    return __half22float2(v);
  }
}
#endif

/// Fragments of e2m1 codes. A code is cut into sign and magnitude, so that few instructions bring those of a pair to where a half2
/// has them, bits 15 and 11 to 9 of either half (the second code's bits lie 16 higher; bit 34 is bit 2):
///
///   pair  magnitude  sign
///    0      9 - 11    15    in place
///    1     12 - 14    18    after a rotation by 3
///    2      6 -  8     0
///    3      3 -  5     1
///
/// Placed at the top of a float16's exponent and mantissa (or, 3 bits lower, of a bfloat16's), e2m1 is the float16 of the same value
/// times 2^-14 (2^-126), its subnormals included. One multiplication finishes the conversion, exactly.
template <class Derived>
struct E2M1Fragment : formats::FormatBase<Derived, 4> {
  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    constexpr int kMagnitude[4] = {9, 12, 6, 3}, kSign[4] = {15, 18, 0, 1};
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) {
      const int second = i % 2 * 16;
      word |= uint32_t(codes[i] & 7) << (kMagnitude[i / 2] + second);
      word |= uint32_t(codes[i] >> 3 & 1) << ((kSign[i / 2] + second) % 32);
    }
    for (int i = 0; i < 4; ++i) bytes[i] = uint8_t(word >> (8 * i));
  }

  /// Two float16: the values of pair `pair` times 2^-14.
  QMOE_HOST_DEVICE static constexpr uint32_t ScaledHalf2(uint32_t word, int pair) {
    constexpr uint32_t kSigns = 0x80008000u, kMagnitudes = 0x0e000e00u;
    if (pair == 0) return word & (kSigns | kMagnitudes);
    if (pair == 1) return (word >> 3 | word << 29) & (kSigns | kMagnitudes);
    if (pair == 2) return (word << 3 & kMagnitudes) | (word << 15 & kSigns);
    return (word << 6 & kMagnitudes) | (word << 14 & kSigns);
  }

  /// Two bfloat16: the values of pair `pair` times 2^-126.
  QMOE_HOST_DEVICE static constexpr uint32_t ScaledBFloat162(uint32_t word, int pair) {
    constexpr uint32_t kSigns = 0x80008000u, kMagnitudes = 0x01c001c0u;
    if (pair == 0) return (word >> 3 & kMagnitudes) | (word & kSigns);
    if (pair == 1) return (word >> 6 & kMagnitudes) | ((word >> 3 | word << 29) & kSigns);
    if (pair == 2) return (word & kMagnitudes) | (word << 15 & kSigns);
    return (word << 3 & kMagnitudes) | (word << 14 & kSigns);
  }

#if defined(__CUDACC__)
  /// What kernels that scale weights anyway may use instead of DequantFragment: values that many times too small.
  template <class T2>
  static constexpr float kScaledFactor = std::is_same_v<T2, __half2> ? 0x1p14f : 0x1p126f;

  template <class T2>
  __device__ static void ScaledFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits =
          std::is_same_v<T2, __half2> ? ScaledHalf2(words[0], i) : ScaledBFloat162(words[0], i);
      a[i] = reinterpret_cast<const T2&>(bits);
    }
  }

  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    using Scaled2 = std::conditional_t<std::is_same_v<T2, float2>, __half2, T2>;
    Scaled2 scaled[4];
    ScaledFragment(words, scaled);
    const Scaled2 factor = FromFloat2<Scaled2>({kScaledFactor<Scaled2>, kScaledFactor<Scaled2>});
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T2, float2>)
        a[i] = __half22float2(__hmul2(scaled[i], factor));
      else
        a[i] = __hmul2(scaled[i], factor);
    }
  }
#endif
};

/// Fragments of e4m3 codes, bytes in register order.
template <class Derived>
struct E4M3Fragment : formats::FormatBase<Derived, 8> {
  /// Two float16: the values of pair `pair` times 2^-8. Shifted down by one bit under its sign, e4m3 is the float16 of the same value
  /// times 2^-8, subnormals included.
  QMOE_HOST_DEVICE static constexpr uint32_t ScaledHalf2(const uint32_t* words, int pair) {
    const uint32_t codes = words[pair / 2] >> (16 * (pair % 2));
    const uint32_t high = (codes & 0xffu) << 8 | (codes & 0xff00u)
                                                     << 16;  // each in the upper byte of a half
    return (high & 0x80008000u) | (high & 0x7f007f00u) >> 1;
  }

#if defined(__CUDACC__)
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
      a[i] = FromHalf2<T2>(E4M3ToHalf2(words[i / 2] >> (16 * (i % 2))));
#else
      const uint32_t bits = ScaledHalf2(words, i);
      a[i] =
          FromHalf2<T2>(__hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f)));
#endif
    }
  }
#endif
};

}  // namespace qmoe_plugin
