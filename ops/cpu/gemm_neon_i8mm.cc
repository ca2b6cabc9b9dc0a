// GEMM with activations rounded to int8 on AArch64's matrix instructions (FEAT_I8MM): SMMLA, 32
// products an instruction, of two rows by two columns by eight k. One or two rows take SDOT, as in
// gemm_neon_dotprod.cc: weights must be put in order for SMMLA, which needs rows to pay for it.
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

/// Two vectors of weights need 16 registers, and running sums live for a pair of rows only. More rows
/// would spill, in blocks that are too short to make up for it.
inline constexpr int kTileRows[] = {1, 2, 4};
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

/// (a0 a1 b0 b1) and (a2 a3 b2 b3).
QMOE_SIMD Vec::I LowHalves(Vec::I a, Vec::I b) {
  return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
QMOE_SIMD Vec::I HighHalves(Vec::I a, Vec::I b) {
  return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

/// acc + (x0 w0, x0 w1, x1 w0, x1 w1): each vector of x and w has eight k of two rows or columns.
QMOE_SIMD Vec::I Dot2x2(Vec::I acc, Vec::I x, Vec::I w) {
  return vmmlaq_s32(acc, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}

/// Int8Blocks, a whole block at a time for two rows at a time.
template <int Bits, int K, bool kHalves>
struct Int8Matrices : Int8Blocks<Bits, K, kHalves> {
  using Base = Int8Blocks<Bits, K, kHalves>;
  using Base::Base;
  using typename Base::Acc, typename Base::Block;
  static constexpr int kStepK = K;
  static constexpr int kEights = K / 8;

  /// Eight k of columns 0 and 1, and of columns 2 and 3.
  struct Columns {
    Vec::I left, right;
  };

  template <int... Eight>
  QMOE_SIMD void Decode(std::integer_sequence<int, Eight...>, const uint8_t* codes,
                        Columns (&w)[kEights]) const {
    ((w[Eight] =
          Zip(this->template Quad<2 * Eight>(codes), this->template Quad<2 * Eight + 1>(codes))),
     ...);
  }
  QMOE_SIMD static Columns Zip(Vec::I low, Vec::I high) {
    return {vzip1q_s32(low, high), vzip2q_s32(low, high)};
  }

  template <int J, int C, int M>
  QMOE_SIMD void Step(const uint8_t* const (&codes)[C], const Block* const (&x)[M], int64_t at,
                      Acc (&acc)[M][C]) const {
    if constexpr (M <= 2) {
      Base::template Step<0, C, M>(codes, x, at, acc);
      if constexpr (K > Base::kStepK) Base::template Step<1, C, M>(codes, x, at, acc);
    } else {
      Columns w[C][kEights];
      for (int c = 0; c < C; ++c)
        Decode(std::make_integer_sequence<int, kEights>(), codes[c], w[c]);
#pragma GCC unroll 16
      for (int m = 0; m < M; m += 2) {
        Vec::I rows[kEights];
#pragma GCC unroll 16
        for (int i = 0; i < kEights; i += 2) {
          const Vec::I a = Vec::LoadI(x[m][at].x + 8 * i), b = Vec::LoadI(x[m + 1][at].x + 8 * i);
          rows[i] = LowHalves(a, b);
          rows[i + 1] = HighHalves(a, b);
        }
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
          Vec::I left = LowHalves(acc[m][c], acc[m + 1][c]);
          Vec::I right = HighHalves(acc[m][c], acc[m + 1][c]);
#pragma GCC unroll 16
          for (int i = 0; i < kEights; ++i) {
            left = Dot2x2(left, rows[i], w[c][i].left);
            right = Dot2x2(right, rows[i], w[c][i].right);
          }
          acc[m][c] = LowHalves(left, right);
          acc[m + 1][c] = HighHalves(left, right);
        }
      }
    }
  }
};

}  // namespace

GemmKernel NeonI8mmGemm(int bits, Codes codes, int block) {
  return SelectInt8<Int8Matrices>(bits, codes, block);
}

}  // namespace qmoe_plugin
