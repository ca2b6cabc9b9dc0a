// Small float codes as numbers, on host and device; and what decoders of fragments share.
#pragma once

#include "ops/formats/format.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
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

/// Fragments of e2m1 codes. Nibbles lie as int4's do: the codes of a pair 16 bits apart, pair i at bit 4 * (0, 2, 1, 3).
///
/// Placed at the top of a float16's exponent and mantissa, e2m1 is the float16 of the same value times 2^-14, its
/// subnormals included, so one multiplication finishes the conversion, exactly.
template <class Derived>
struct E2M1Fragment : formats::FormatBase<Derived, 4> {
  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    bytes[0] = uint8_t(codes[0] | codes[4] << 4);
    bytes[1] = uint8_t(codes[2] | codes[6] << 4);
    bytes[2] = uint8_t(codes[1] | codes[5] << 4);
    bytes[3] = uint8_t(codes[3] | codes[7] << 4);
  }

  /// Two float16: the values of pair `pair` times 2^-14.
  QMOE_HOST_DEVICE static constexpr uint32_t ScaledHalf2(uint32_t word, int pair) {
    const uint32_t codes = word >> ((pair & 1 ? 8 : 0) + (pair < 2 ? 0 : 4));
    return (codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9;
  }

#if defined(__CUDACC__)
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = ScaledHalf2(words[0], i);
      a[i] = FromHalf2<T2>(
          __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(16384.0f)));
    }
  }
#endif
};

/// Fragments of e4m3 codes, bytes in register order. Shifted down by one bit under its sign, e4m3 is the float16 of the
/// same value times 2^-8, subnormals included.
template <class Derived>
struct E4M3Fragment : formats::FormatBase<Derived, 8> {
  /// Two float16: the values of pair `pair` times 2^-8.
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
      const uint32_t bits = ScaledHalf2(words, i);
      a[i] =
          FromHalf2<T2>(__hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f)));
    }
  }
#endif
};

}  // namespace qmoe_plugin
