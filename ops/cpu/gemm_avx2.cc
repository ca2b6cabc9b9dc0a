// GEMM and element-wise functions on AVX2 with FMA and F16C: 8 lanes, two vectors a panel.
#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_avx2.inc"

/// Codes of any format, by a table look-up in memory (8 bits).
template <int Bits>
struct TableDecoder {
  static constexpr int kBits = Bits;
  explicit TableDecoder(const float* table) : values(table) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const Vec::I index = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), _mm256_set1_epi32(255));
    return _mm256_i32gather_ps(values, index, 4);
  }
  const float* values;
};

/// 4 bits: vpermps reads the low three bits of a lane, so look up twice and let the fourth choose.
template <>
struct TableDecoder<4> {
  static constexpr int kBits = 4;
  explicit TableDecoder(const float* table)
      : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const Vec::I index = _mm256_srli_epi32(codes, kShift);
    const Vec::F fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - kShift));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), fourth_bit);
  }
  Vec::F low, high;
};

/// 2 bits: the table repeats, so the codes above need no masking.
template <>
struct TableDecoder<2> {
  static constexpr int kBits = 2;
  explicit TableDecoder(const float* table) : values(_mm256_loadu_ps(table)) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm256_permutevar8x32_ps(values, _mm256_srli_epi32(codes, kShift));
  }
  Vec::F values;
};

/// Codes that mean code - 2^(Bits - 1): made two's complement, then sign-extended.
template <int Bits>
struct SignedDecoder {
  static constexpr int kBits = Bits;
  explicit SignedDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) {
    return _mm256_xor_si256(codes, _mm256_set1_epi32(int(Bits == 4 ? 0x88888888 : 0x80808080)));
  }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    constexpr int kUp = 32 - Bits - kShift;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, kUp), 32 - Bits));
  }
};

/// 16 low bits of each 32, as float16.
QMOE_SIMD Vec::F FromHalves(Vec::I low) {
  const Vec::I packed = _mm256_packus_epi32(low, low);  // the two 128-bit halves apart
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

/// e4m3: with the exponent moved to its place, a float16 of 2^-8 times the value; subnormals too.
struct E4M3Decoder {
  static constexpr int kBits = 8;
  explicit E4M3Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const Vec::I code = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), _mm256_set1_epi32(255));
    const Vec::I sign = _mm256_and_si256(code, _mm256_set1_epi32(128));
    // Shifted by 7 the sign is one bit too low; added to itself it moves up.
    const Vec::I half = _mm256_slli_epi32(_mm256_add_epi32(code, sign), 7);
    return _mm256_mul_ps(FromHalves(half), _mm256_set1_ps(256.0f));
  }
};

/// Plain codes of 16 or 32 bits.
struct HalfDecoder {
  static constexpr int kBits = 16;
  explicit HalfDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const Vec::I low = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), _mm256_set1_epi32(65535));
    return FromHalves(low);
  }
};

struct BFloat16Decoder {
  static constexpr int kBits = 16;
  explicit BFloat16Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm256_castsi256_ps(kShift ? _mm256_and_si256(codes, _mm256_set1_epi32(int(0xffff0000)))
                                      : _mm256_slli_epi32(codes, 16));
  }
};

struct FloatDecoder {
  static constexpr int kBits = 32;
  explicit FloatDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm256_castsi256_ps(codes);
  }
};

/// Four rows: 2 x 4 running sums hide the latency of the FMAs, and with more of them (and the two
/// codes, weights and zero offsets) the 16 registers spill in the inner loop.
inline constexpr int kTileRows[] = {1, 2, 3, 4};
inline constexpr int kMaxRows = 4;

constexpr int VectorsInFlight(int rows) { return rows == 1 ? 4 : 2; }

// In this order, which is that of use:
#include "ops/cpu/elementwise.inc"
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_tile.inc"
//
#include "ops/cpu/gemm_rows.inc"

GemmFunction SelectGemm(int bits, Codes codes) {
  if (codes == Codes::kFloat16) return Gemm<HalfDecoder>;
  if (codes == Codes::kBFloat16) return Gemm<BFloat16Decoder>;
  if (codes == Codes::kFloat32) return Gemm<FloatDecoder>;
  const bool is_signed = codes == Codes::kSigned;
  if (bits == 2) return Gemm<TableDecoder<2>>;
  if (bits == 4) return is_signed ? Gemm<SignedDecoder<4>> : Gemm<TableDecoder<4>>;
  if (codes == Codes::kE4M3) return Gemm<E4M3Decoder>;
  return is_signed ? Gemm<SignedDecoder<8>> : Gemm<TableDecoder<8>>;
}

}  // namespace

const CpuIsa kCpuAvx2 = {.name = "avx2",
                         .gemm = SelectGemm,
                         .activate = Activate,
                         .add_scaled = AddScaled,
                         .to_float = ToFloat,
                         .from_float = FromFloat};

}  // namespace qmoe_plugin
