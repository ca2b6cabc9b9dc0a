// GEMM with activations rounded to bfloat16 on AVX512_BF16: vdpbf16ps, 32 products an instruction.

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

// A decoder turns 4 consecutive k of a dword, which start at bit kShift of its first byte and lie
// one a byte, into two vectors of bfloat16 pairs: k and k + 2, k + 1 and k + 3. That is how the
// bytes fall into 16-bit words, and the activations lie in that order, too: Fill. The numbers are
// 1 / kUnit times w' of gemm_blocks.inc.

/// Looks codes of 2 or 4 bits up in a register. vpermw reads the low five bits of a word only, so
/// the codes above need no masking: the table repeats.
template <int Bits>
struct TableDecoder {
  static constexpr int kBits = Bits;
  static constexpr float kUnit = 1;
  explicit TableDecoder(const float* table) {
    alignas(64) uint16_t words[32];
    Vec::StoreBFloat16(words, _mm512_loadu_ps(table));
    Vec::StoreBFloat16(words + 16, _mm512_loadu_ps(table));
    values = _mm512_load_si512(words);
  }
  template <int kShift>
  QMOE_SIMD void Decode(Vec::I codes, Vec::I (&w)[2]) const {
    w[0] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, kShift), values);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, kShift + 8), values);
  }
  Vec::I values;
};

/// 8-bit codes that mean code - 128, by way of float32: made two's complement and moved to the top
/// of a dword, they are 2^24 times as much, and the upper half of the float is all of it.
struct SignedDecoder {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1.0f / (1 << 24);
  explicit SignedDecoder(const float*) {}
  template <int>
  QMOE_SIMD static void Decode(Vec::I codes, Vec::I (&w)[2]) {
    codes = _mm512_xor_si512(codes, _mm512_set1_epi32(int(0x80808080)));
    const Vec::I top = _mm512_set1_epi32(int(0xff000000));
    w[0] = Pair(_mm512_slli_epi32(codes, 24), _mm512_and_si512(_mm512_slli_epi32(codes, 8), top));
    w[1] = Pair(_mm512_and_si512(_mm512_slli_epi32(codes, 16), top), _mm512_and_si512(codes, top));
  }
  QMOE_SIMD static Vec::I Pair(Vec::I low, Vec::I high) {
    const Vec::I a = _mm512_castps_si512(_mm512_cvtepi32_ps(low));
    const Vec::I b = _mm512_castps_si512(_mm512_cvtepi32_ps(high));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
  }
};

/// e4m3: a shift and an addition to the exponent make it bfloat16, but for subnormals: vdpbf16ps
/// takes those of bfloat16 as zero, so they are looked up.
struct E4M3Decoder {
  static constexpr int kBits = 8;
  static constexpr float kUnit = 1;
  explicit E4M3Decoder(const float* table) {
    alignas(64) uint16_t words[32];
    Vec::StoreBFloat16(words, _mm512_loadu_ps(table));
    Vec::StoreBFloat16(words + 16, _mm512_loadu_ps(table));
    subnormals = _mm512_load_si512(words);
  }
  template <int>
  QMOE_SIMD void Decode(Vec::I codes, Vec::I (&w)[2]) const {
    w[0] = Pair(_mm512_and_si512(codes, _mm512_set1_epi16(255)));
    w[1] = Pair(_mm512_srli_epi16(codes, 8));
  }
  QMOE_SIMD Vec::I Pair(Vec::I code) const {
    const Vec::I shifted = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(0x7f0));
    const Vec::I normal = _mm512_add_epi16(shifted, _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
    const Vec::I magnitude = _mm512_mask_permutexvar_epi16(normal, small, code, subnormals);
    const Vec::I sign = _mm512_and_si512(code, _mm512_set1_epi16(128));
    return _mm512_or_si512(magnitude, _mm512_slli_epi16(sign, 8));
  }
  Vec::I subnormals;
};

/// An arithmetic of gemm_blocks.inc.
template <class Decoder, int K>
struct Bf16Blocks : Decoder {
  using Decoder::Decoder;
  static constexpr int kK = K, kStepK = 4;
  using Acc = Vec::F;

  struct Block {
    uint16_t x[K];  // bfloat16(x) * kUnit; of each four, the two in the middle swapped
    float sum;      // of bfloat16(x)
  };

  QMOE_SIMD static Acc Start(const Block&) { return Vec::Zero(); }
  QMOE_SIMD static Vec::F Sum(Acc acc) { return acc; }
  QMOE_SIMD static Vec::F Scale(Vec::F sum, const Block&) { return sum; }

  template <int J, int C, int M>
  QMOE_SIMD void Step(const uint8_t* const (&codes)[C], const Block* const (&x)[M], int64_t at,
                      Acc (&acc)[M][C]) const {
    constexpr int kBits = Decoder::kBits, kDword = J * kBits / 8, kShift = J * kBits % 8;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      Vec::I w[2];
      this->template Decode<kShift>(Vec::LoadI(codes[c] + kDword * 64), w);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc[m][c] = Dot(Dot(acc[m][c], w[0], x[m][at].x + 4 * J), w[1], x[m][at].x + 4 * J + 2);
    }
  }

  /// acc + w x, two products a lane.
  QMOE_SIMD static Acc Dot(Acc acc, Vec::I w, const uint16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(acc, __m512bh(w), __m512bh(_mm512_set1_epi32(pair)));
  }

  static void Fill(const float* x, Block& block) {
    const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    Vec::F sum = Vec::Zero();
    for (int i = 0; i < K; i += Vec::kLanes) {
      const Vec::F scaled = Vec::Mul(Vec::Load(x + i), Vec::Set(Decoder::kUnit));
      const __m256i rounded = __m256i(_mm512_cvtneps_pbh(scaled));
      const Vec::I widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
      sum = Vec::Add(sum, _mm512_castsi512_ps(widened));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.x + i),
                          _mm256_permutexvar_epi16(order, rounded));
    }
    block.sum = _mm512_reduce_add_ps(sum) / Decoder::kUnit;
  }
};

/// The largest tile has 12 running sums and 12 totals, which leaves 8 registers to decode with.
inline constexpr int kTileRows[] = {1, 2, 3, 4, 6, 8, 10, 12};
inline constexpr int kMaxRows = 12;

constexpr int VectorsInFlight(int rows) {
  return rows == 1 ? 8 : rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
}

// In this order, which is that of use:
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_blocks.inc"
//
#include "ops/cpu/gemm_rows.inc"

template <class Decoder>
GemmKernel Select(int block) {
  return block == 32 ? BlocksGemm<Bf16Blocks<Decoder, 32>>()
                     : BlocksGemm<Bf16Blocks<Decoder, 16>>();
}

}  // namespace

GemmKernel Avx512Bf16Gemm(int bits, Codes codes, int block) {
  if (bits == 2) return Select<TableDecoder<2>>(block);
  if (bits == 4) return Select<TableDecoder<4>>(block);
  if (bits == 8 && codes == Codes::kSigned) return Select<SignedDecoder>(block);
  if (bits == 8 && codes == Codes::kE4M3) return Select<E4M3Decoder>(block);
  return {};
}

}  // namespace qmoe_plugin
