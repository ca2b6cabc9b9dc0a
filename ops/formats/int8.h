// int8: unsigned 8-bit codes, w = (q - zero_point) * scale, zero point 128 unless the model gives
// one.
//
// A fragment is two words, codes in register order: pair i is bytes 2i and 2i+1. A byte permutation
// puts each byte behind constant high bytes, which makes it the mantissa of a float; the
// subtraction that follows is exact.
#pragma once

#include "ops/formats/format.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#endif

namespace qmoe_plugin::formats {

struct int8 : FormatBase<int8, 8> {
  static constexpr char kName[] = "int8";
  static constexpr float kDefaultZeroPoint = 128;
  static constexpr bool kZeroPoints = true;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return float(code); }

  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    for (int i = 0; i < 8; ++i) bytes[i] = codes[i];
  }

  /// The PRMT instruction: byte i of the result is byte (selector >> 4 i) & 7 of a (0-3) and b
  /// (4-7).
  QMOE_HOST_DEVICE static uint32_t PermuteBytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, selector);
#else
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
      result |= uint32_t(bytes >> ((selector >> (4 * i)) & 7) * 8 & 0xff) << 8 * i;
    return result;
#endif
  }

  /// Two float16: 1024 + q.
  QMOE_HOST_DEVICE static uint32_t BiasedHalf2(const uint32_t* words, int pair) {
    return PermuteBytes(words[pair / 2], 0x64646464u, pair & 1 ? 0x4342 : 0x4140);
  }

  /// A float: 2^23 + code `index` (0 to 7).
  QMOE_HOST_DEVICE static uint32_t BiasedFloat(const uint32_t* words, int index) {
    return PermuteBytes(words[index / 4], 0x4b000000u, 0x7440u + uint32_t(index % 4));
  }

#if defined(__CUDACC__)
  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T2, __half2>) {
        const uint32_t bits = BiasedHalf2(words, i);
        a[i] = __hsub2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(1152.0f));
      } else {
        const float bias = 8388608.0f + 128.0f;
        const float x = __uint_as_float(BiasedFloat(words, 2 * i)) - bias;
        const float y = __uint_as_float(BiasedFloat(words, 2 * i + 1)) - bias;
        if constexpr (std::is_same_v<T2, __nv_bfloat162>)
          a[i] = __floats2bfloat162_rn(x, y);  // exact: |q - 128| has 8 bits
        else
          a[i] = T2{x, y};
      }
    }
  }
#endif
};

}  // namespace qmoe_plugin::formats
