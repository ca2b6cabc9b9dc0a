// GEMM with activations rounded to int8 on AArch64's dot product instructions (FEAT_DotProd): SDOT,
// 16 products an instruction.
#include <arm_neon.h>

#include <utility>

#include "ops/cpu/gemm.h"
#include "ops/cpu/layout.h"

#define QMOE_SIMD [[gnu::always_inline]] inline

namespace qmoe_plugin {
namespace {

#include "ops/cpu/vec_neon.inc"
//
#include "ops/cpu/dot_neon.inc"

/// Eight running sums, as many totals and four vectors of weights; more rows would spill, in blocks
/// that are too short to make up for it.
inline constexpr int kTileRows[] = {1, 2, 3, 4};
inline constexpr int kMaxRows = 4;

constexpr int VectorsInFlight(int rows) { return rows <= 2 ? 4 : 2; }

// In this order, which is that of use:
#include "ops/cpu/gemm_scales.inc"
//
#include "ops/cpu/gemm_blocks.inc"
//
#include "ops/cpu/gemm_rows.inc"
//
#include "ops/cpu/int8_blocks.inc"

}  // namespace

GemmKernel NeonDotprodGemm(int bits, Codes codes, int block) {
  return SelectInt8(bits, codes, block);
}

}  // namespace qmoe_plugin
