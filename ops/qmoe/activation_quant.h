// Activations as e4m3 numbers (wfp4afp8, or given activation scales): what is done to a row before
// a GEMM reads it. One definition, compiled for both devices.
//
//   kMxFp8  blocks of 32 along K, the last one perhaps shorter. With amax = the largest |x| of a
//           block, s = 2^(floor(log2(amax)) - 8), at least 2^-126 (OCP microscaling, scales e8m0):
//           x becomes e4m3(x / s) * s. A block with a value that is not finite becomes NaN.
//   kFp8    a scale s of the expert: x becomes e4m3(x / s), and the GEMM's sums are multiplied by s
//           (RowReader::SumScale brings it into the packed row scales). NaN stays NaN.
//
// e4m3() rounds to the nearest of the e4m3fn numbers, ties to an even mantissa, and saturates at
// +-448, infinity included. fc1's x is quantised as the node gets it, the activated values after
// they have been rounded to the activation type, on either device.
//
// The results are kept in float32 on the CPU and in the activation type on CUDA, and are the same
// numbers: e4m3 has 4 significant bits; e4m3(x / s) fits float16 with its subnormals; and
// e4m3(x / s) * s of float16 x is at most 448 * 2^7 = 57344 and, where that is finer than float16's
// subnormals, x itself.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "ops/formats/format.h"
#include "ops/problem.h"

namespace qmoe_plugin {

inline constexpr int kMxBlock = 32;  // values that share a scale
inline constexpr uint32_t kFloatInfinity = 0x7f800000u;

/// |x| as bits, which are ordered like the numbers; NaN is above infinity.
QMOE_HOST_DEVICE inline uint32_t MagnitudeBits(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}

/// The nearest e4m3fn number, see above.
QMOE_HOST_DEVICE inline float RoundToE4M3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // From 2^-6 on: 3 of the 23 bits of the mantissa stay. A carry moves on to the next power of two.
  const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) & 0xfff00000u;
  // Below: multiples of 2^-9, to which the float adder rounds beside 2^14.
  const float shifted = std::bit_cast<float>(magnitude) + 16384.0f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted - 16384.0f);
  uint32_t result = magnitude < 0x3c800000u ? subnormal : normal;
  result = result > 0x43e00000u ? 0x43e00000u : result;  // 448
  result = magnitude > kFloatInfinity ? magnitude : result;
  return std::bit_cast<float>(result | (bits & 0x80000000u));
}

/// A block's scale and its inverse, both powers of two; NaN if amax is not finite. `amax` is the
/// largest MagnitudeBits of the block.
struct MxScale {
  float scale, inverse;
};
QMOE_HOST_DEVICE inline MxScale MxScaleOf(uint32_t amax) {
  const uint32_t exponent = amax >> 23;  // floor(log2) + 127; 0 below 2^-126
  const uint32_t biased = exponent > 9 ? exponent - 8 : 1;
  const float nan = std::bit_cast<float>(0x7fc00000u);
  if (amax >= kFloatInfinity) return {nan, nan};
  return {std::bit_cast<float>(biased << 23), std::bit_cast<float>((254 - biased) << 23)};
}

QMOE_HOST_DEVICE inline float QuantizeMx(float x, MxScale s) {
  return RoundToE4M3(x * s.inverse) * s.scale;
}

/// A row, or a part of one that starts with a block, on the host. `scale` is for kFp8.
inline void QuantizeActivations(ActivationQuant mode, float scale, int64_t n, float* x) {
  if (mode == ActivationQuant::kNone) return;
  if (mode == ActivationQuant::kFp8) {
    for (int64_t i = 0; i < n; ++i) x[i] = RoundToE4M3(x[i] / scale);
    return;
  }
  for (int64_t first = 0; first < n; first += kMxBlock) {
    const int64_t end = first + kMxBlock < n ? first + kMxBlock : n;
    uint32_t amax = 0;
    for (int64_t i = first; i < end; ++i) {
      const uint32_t magnitude = MagnitudeBits(x[i]);
      amax = magnitude > amax ? magnitude : amax;
    }
    const MxScale s = MxScaleOf(amax);
    for (int64_t i = first; i < end; ++i) x[i] = QuantizeMx(x[i], s);
  }
}

/// Whether a row is quantised in different ways for different experts. `scales` as in MoeConfig.
inline bool DifferByExpert(const std::vector<float>& scales) {
  for (float scale : scales)
    if (scale != scales[0]) return true;
  return false;
}

inline float ActivationScaleOf(const std::vector<float>& scales, int64_t expert) {
  return scales.empty() ? 1.0f : scales[size_t(expert)];
}

}  // namespace qmoe_plugin
