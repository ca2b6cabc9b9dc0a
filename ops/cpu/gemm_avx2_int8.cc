// GEMM with activations rounded to int8 on AVX2: vpmaddubsw, 32 products an instruction, whose sums
// of two are int16. So weights of 8 bits, whose products do not fit, are left to the exact kernel:
// all ways around that cost as many instructions as its multiply-adds.
#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_avx2.inc"

inline constexpr int kStepQuads = 4;
inline constexpr bool kTakes8Bits = false;

/// acc + w x, four products a lane from each vector of w. Bytes of w are at most 32, so that int16
/// holds the 8 products that are added up there: 8 * 32 * 127 < 2^15.
QMOE_SIMD Vec::I Dot(Vec::I acc, const Vec::I (&w)[kStepQuads], const int8_t* x) {
  Vec::I sums = Vec::SetI(0);
#pragma GCC unroll 4
  for (int i = 0; i < kStepQuads; ++i) {
    int32_t quad;
    __builtin_memcpy(&quad, x + 4 * i, sizeof quad);
    const Vec::I products = _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(quad));
    sums = i == 0 ? products : _mm256_add_epi16(sums, products);
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
}

/// Eight running sums and four vectors of weights; the totals are spilled, but only once a block.
inline constexpr int kTileRows[] = {1, 2, 3, 4};
inline constexpr int kMaxRows = 4;

constexpr int VectorsInFlight(int rows) { return rows == 1 ? 4 : 2; }

// In this order, which is that of use:
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_blocks.inc"
//
#include "ops/cpu/gemm_rows.inc"
//
#include "ops/cpu/int8_blocks.inc"

}  // namespace

GemmKernel Avx2Int8Gemm(int bits, Codes codes, int block) { return SelectInt8(bits, codes, block); }

}  // namespace qmoe_plugin
