// GEMM and element-wise functions on AVX-512 (F, BW, VL, DQ): 16 lanes, one vector a panel.

// GCC 12's own intrinsics pass deliberately undefined vectors on; it warns about that in our code.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_avx512.inc"

/// Looks codes of 2 or 4 bits up in a register. vpermps reads the low four bits of a lane only, so
/// the codes above need no masking; for 2 bits the table repeats.
template <int Bits>
struct TableDecoder {
  static constexpr int kBits = Bits;
  explicit TableDecoder(const float* table) : values(_mm512_loadu_ps(table)) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, kShift), values);
  }
  Vec::F values;
};

/// 8-bit codes of any format.
template <>
struct TableDecoder<8> {
  static constexpr int kBits = 8;
  explicit TableDecoder(const float* table) : values(table) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    const Vec::I index = _mm512_and_si512(_mm512_srli_epi32(codes, kShift), _mm512_set1_epi32(255));
    return _mm512_i32gather_ps(index, values, 4);
  }
  const float* values;
};

/// 8-bit codes that mean code - 128: made two's complement, then sign-extended.
struct SignedDecoder {
  static constexpr int kBits = 8;
  explicit SignedDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) {
    return _mm512_xor_si512(codes, _mm512_set1_epi32(int(0x80808080)));
  }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - kShift), 24));
  }
};

/// e4m3: with the exponent moved to its place, a float16 of 2^-8 times the value; subnormals too.
struct E4M3Decoder {
  static constexpr int kBits = 8;
  explicit E4M3Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    // The code in the upper byte of a word; shifted by one with its sign, which then is there twice.
    const Vec::I word =
        kShift > 8 ? _mm512_srli_epi32(codes, kShift - 8) : _mm512_slli_epi32(codes, 8 - kShift);
    const Vec::I half = _mm512_and_si512(_mm512_srai_epi16(word, 1), _mm512_set1_epi32(0xbf80));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), _mm512_set1_ps(256.0f));
  }
};

/// Plain codes of 16 or 32 bits.
struct HalfDecoder {
  static constexpr int kBits = 16;
  explicit HalfDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(codes, kShift)));
  }
};

struct BFloat16Decoder {
  static constexpr int kBits = 16;
  explicit BFloat16Decoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm512_castsi512_ps(kShift ? _mm512_and_si512(codes, _mm512_set1_epi32(int(0xffff0000)))
                                      : _mm512_slli_epi32(codes, 16));
  }
};

struct FloatDecoder {
  static constexpr int kBits = 32;
  explicit FloatDecoder(const float*) {}
  QMOE_SIMD static Vec::I Prepare(Vec::I codes) { return codes; }
  template <int kShift>
  QMOE_SIMD Vec::F Decode(Vec::I codes) const {
    return _mm512_castsi512_ps(codes);
  }
};

/// The largest tile has 12 running sums and 12 totals, which leaves 8 registers to decode with.
inline constexpr int kTileRows[] = {1, 2, 3, 4, 6, 8, 10, 12};
inline constexpr int kMaxRows = 12;

constexpr int VectorsInFlight(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 1; }

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
  if (bits == 2) return Gemm<TableDecoder<2>>;
  if (bits == 4) return Gemm<TableDecoder<4>>;
  if (codes == Codes::kE4M3) return Gemm<E4M3Decoder>;
  return codes == Codes::kSigned ? Gemm<SignedDecoder> : Gemm<TableDecoder<8>>;
}

}  // namespace

const CpuIsa kCpuAvx512 = {.name = "avx512",
                           .gemm = SelectGemm,
                           .activate = Activate,
                           .add_scaled = AddScaled,
                           .to_float = ToFloat,
                           .from_float = FromFloat};

}  // namespace qmoe_plugin
