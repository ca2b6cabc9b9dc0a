// GEMM with activations rounded to int8 on AVX-VNNI, for processors without AVX-512: vpdpbusd, 32
// products an instruction, added up in int32.
#include <immintrin.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_avx2.inc"

inline constexpr int kStepQuads = 2;
inline constexpr bool kTakes8Bits = true;

/// acc + w x, four products a lane of bytes of w, which are unsigned, and of x.
QMOE_SIMD Vec::I DotQuads(Vec::I acc, Vec::I w, Vec::I x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else  // as the tests compile this: AVX512_VNNI has the same instruction in its own encoding
  return _mm256_dpbusd_epi32(acc, w, x);
#endif
}

QMOE_SIMD Vec::I Dot(Vec::I acc, const Vec::I (&w)[kStepQuads], const int8_t* x) {
#pragma GCC unroll 4
  for (int i = 0; i < kStepQuads; ++i) {
    int32_t quad;
    __builtin_memcpy(&quad, x + 4 * i, sizeof quad);
    acc = DotQuads(acc, w[i], Vec::SetI(quad));
  }
  return acc;
}

/// As many as on AVX2: with more, the 16 registers spill in the inner loop.
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

GemmKernel AvxVnniGemm(int bits, Codes codes, int block) { return SelectInt8(bits, codes, block); }

}  // namespace qmoe_plugin
