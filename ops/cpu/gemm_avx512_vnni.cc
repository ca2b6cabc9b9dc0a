// GEMM with activations rounded to int8 on AVX512_VNNI: vpdpbusd, 64 products an instruction.

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

inline constexpr int kStepQuads = 2;
inline constexpr bool kTakes8Bits = true;

/// acc + w x, four products a lane from each vector of w.
QMOE_SIMD Vec::I Dot(Vec::I acc, const Vec::I (&w)[kStepQuads], const int8_t* x) {
#pragma GCC unroll 4
  for (int i = 0; i < kStepQuads; ++i) {
    int32_t quad;
    __builtin_memcpy(&quad, x + 4 * i, sizeof quad);
    acc = _mm512_dpbusd_epi32(acc, w[i], _mm512_set1_epi32(quad));
  }
  return acc;
}

/// The largest tile has 12 running sums and 12 totals, which leaves 8 registers to decode with.
inline constexpr int kTileRows[] = {1, 2, 3, 4, 6, 8, 10, 12};
inline constexpr int kMaxRows = 12;

constexpr int VectorsInFlight(int rows) { return rows <= 3 ? 4 : 1; }

// In this order, which is that of use:
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_blocks.inc"
//
#include "ops/cpu/gemm_rows.inc"
//
#include "ops/cpu/int8_blocks.inc"

}  // namespace

GemmKernel Avx512VnniGemm(int bits, Codes codes, int block) {
  return SelectInt8(bits, codes, block);
}

}  // namespace qmoe_plugin
