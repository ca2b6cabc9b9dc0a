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
//
#include "ops/cpu/bf16_decoders.inc"

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

}  // namespace

GemmKernel Avx512Bf16Gemm(int bits, Codes codes, int block) {
  return WithDecoder(bits, codes, [&]<class Decoder>() {
    return block == 32 ? BlocksGemm<Bf16Blocks<Decoder, 32>>()
                       : BlocksGemm<Bf16Blocks<Decoder, 16>>();
  });
}

}  // namespace qmoe_plugin
