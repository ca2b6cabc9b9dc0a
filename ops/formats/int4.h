// int4: unsigned 4-bit codes, w = (q - zero_point) * scale, zero point 8 unless the model gives one.
//
// A fragment is one word. The two codes of a pair lie 16 bits apart, so that one AND-OR makes a
// half2 of them:
//
//   bits            pair  row    k
//    0-3,  16-19     0    g      2t,   2t+1
//    4-7,  20-23     2    g      2t+8, 2t+9
//    8-11, 24-27     1    g+8    2t,   2t+1
//   12-15, 28-31     3    g+8    2t+8, 2t+9
//
// k mod 16 < 8 is in low nibbles, the rest in high ones: a kernel may scale x by k instead of
// shifting codes.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#endif

namespace qmoe_plugin::formats {

struct int4 : FormatBase<int4, 4> {
  static constexpr char kName[] = "int4";
  static constexpr float kDefaultZeroPoint = 8;
  static constexpr bool kZeroPoints = true;
  static constexpr bool kAffine = true;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return float(code); }

  static void EncodeFragment(const uint8_t* codes, uint8_t* bytes) {
    bytes[0] = uint8_t(codes[0] | codes[4] << 4);
    bytes[1] = uint8_t(codes[2] | codes[6] << 4);
    bytes[2] = uint8_t(codes[1] | codes[5] << 4);
    bytes[3] = uint8_t(codes[3] | codes[7] << 4);
  }

  /// (x & mask) | bits. On the GPU one instruction, which the compiler does not find by itself for two constants.
  QMOE_HOST_DEVICE static uint32_t AndOr(uint32_t x, uint32_t mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
#else
    return (x & mask) | bits;
#endif
  }

  /// Two float16: 1024 + q for pairs 0 and 1, 1024 + 16 q for pairs 2 and 3.
  QMOE_HOST_DEVICE static uint32_t BiasedHalf2(uint32_t word, int pair) {
    const uint32_t codes = pair & 1 ? word >> 8 : word;
    return AndOr(codes, pair < 2 ? 0x000f000fu : 0x00f000f0u, 0x64006400u);
  }

  /// Two bfloat16: 128 + q. (16 q would need more bits than bfloat16 has.)
  QMOE_HOST_DEVICE static uint32_t BiasedBFloat162(uint32_t word, int pair) {
    const int shift = (pair & 1 ? 8 : 0) + (pair < 2 ? 0 : 4);
    return AndOr(word >> shift, 0x000f000fu, 0x43004300u);
  }

  /// Codes as the lowest bits of 16-bit floats, which are in proportion to their numbers as these are subnormal. (The lowest bit of the
  /// exponent may take part: numbers of the exponents 0 and 1 are equally far apart.) Two float16: 2^-21 q for pairs 0 and 1, 2^-17 q
  /// for pairs 2 and 3.
  QMOE_HOST_DEVICE static uint32_t SubnormalHalf2(uint32_t word, int pair) {
    const uint32_t codes = pair & 1 ? word >> 5 : word << 3;
    return codes & (pair < 2 ? 0x00780078u : 0x07800780u);
  }

  /// Two bfloat16: 2^-133 q for pairs 0 and 1, 2^-129 q for pairs 2 and 3.
  QMOE_HOST_DEVICE static uint32_t SubnormalBFloat162(uint32_t word, int pair) {
    const uint32_t codes = pair & 1 ? word >> 8 : word;
    return codes & (pair < 2 ? 0x000f000fu : 0x00f000f0u);
  }

#if defined(__CUDACC__)
  /// Block scales of rows g and g + 8, prepared for AffineFragment.
  template <class T2>
  struct Affine {
    T2 low, high;  // for pairs 0 and 1, and 2 and 3
    T2 offset;     // of the zero point
  };
  static constexpr float kAffineFactor =
      0x1p11f;  // by which weights of AffineFragment are too small

  /// scale: at most 32 each; float16 must be multiples of 2^-13, or weights would lose bits as subnormal numbers that they have else.
  template <class T2>
  __device__ static Affine<T2> PrepareScale(T2 scale) {
    const auto times = [&](float factor) {
      return __hmul2(scale, FromFloat2<T2>({factor, factor}));
    };
    constexpr float kLow = std::is_same_v<T2, __half2> ? 0x1p10f : 0x1p122f;
    return {times(kLow), times(kLow / 16), times(-kDefaultZeroPoint / kAffineFactor)};
  }

  /// Weights from codes in one multiply-add, rounded once.
  template <class T2>
  __device__ static void AffineFragment(const uint32_t* words, const Affine<T2>& scale,
                                        T2 (&a)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = std::is_same_v<T2, __half2> ? SubnormalHalf2(words[0], i)
                                                        : SubnormalBFloat162(words[0], i);
      a[i] = __hfma2(reinterpret_cast<const T2&>(bits), Both(i < 2 ? scale.low : scale.high, i % 2),
                     Both(scale.offset, i % 2));
    }
  }

  template <class T2>
  __device__ static void DequantFragment(const uint32_t* words, T2 (&a)[4]) {
    if constexpr (std::is_same_v<T2, __nv_bfloat162>) {
      const __nv_bfloat162 one = __float2bfloat162_rn(1.0f), bias = __float2bfloat162_rn(-136.0f);
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = BiasedBFloat162(words[0], i);
        a[i] = __hfma2(reinterpret_cast<const __nv_bfloat162&>(bits), one, bias);
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = BiasedHalf2(words[0], i);
        const __half2 biased = reinterpret_cast<const __half2&>(bits);
        const __half2 centered =
            i < 2 ? __hsub2(biased, __float2half2_rn(1032.0f))
                  : __hfma2(biased, __float2half2_rn(0.0625f), __float2half2_rn(-72.0f));
        if constexpr (std::is_same_v<T2, __half2>)
          a[i] = centered;
        else
          a[i] = __half22float2(centered);
      }
    }
  }

  /// DequantFragment with a zero offset each of rows g and g + 8: an integer of at most 5 bits, so that all is exact.
  template <class T2>
  __device__ static void OffsetFragment(const uint32_t* words, T2 offset, T2 (&a)[4]) {
    const auto constant = [](float v) { return FromFloat2<T2>({v, v}); };
    constexpr bool kHalf = std::is_same_v<T2, __half2>;
    const T2 low = __hadd2(offset, constant(kHalf ? -1032 : -136));
    const T2 high = __hadd2(offset, constant(kHalf ? -72 : -136));
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = kHalf ? BiasedHalf2(words[0], i) : BiasedBFloat162(words[0], i);
      const T2 biased = reinterpret_cast<const T2&>(bits);
      a[i] = kHalf && i >= 2 ? __hfma2(biased, constant(0.0625f), Both(high, i % 2))
                             : __hadd2(biased, Both(i < 2 ? low : high, i % 2));
    }
  }
#endif
};

}  // namespace qmoe_plugin::formats
