// What a warp of gemv_sm80 does with a k tile of its stream: products of 16 weight rows with the rows of x, in tensor cores.
#pragma once

#include "ops/common/ptx.cuh"
#include "ops/common/tile.cuh"
#include "ops/common/types.cuh"
#include "ops/gemm/gemm.cuh"
#include "ops/gemm/weight_stream.cuh"

namespace qmoe_plugin::gemv_sm80 {

/// Adds k tile `tile` of a stage to the lane's sums, of the first kActive n8 tiles. x[n] is where this lane's ldmatrix row of
/// n8 tile n lies at the stage's first k.
template <class F, class T, ScaleBlocks kBlocks, Offsets kOffsets, int kActive, int kN>
__device__ void Accumulate(const CudaGemmArgs& args, uint32_t stage, int tile, int lane,
                           const uint32_t (&x)[kN], float (&sums)[kN][4]) {
  using Stage = WeightStage<F, kBlocks, kOffsets != Offsets::kNone>;
  constexpr bool kSumX = kOffsets == Offsets::kAny;
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  constexpr uint32_t kOnesA[4] = {kOnes, kOnes, kOnes, kOnes};
  constexpr int kSteps = kFragmentsPerTile / Stage::kPairs;  // k16 steps that share a scale
  LaneCodes<F> codes;
  codes.LoadShared(stage + tile * TileBytes(F::kBits), lane);
  __half2 scales[Stage::kPairs], offsets[Stage::kPairs];
#pragma unroll
  for (int p = 0; p < Stage::kPairs; ++p) {
    const uint32_t pair =
        stage + tile * Stage::kTileScaleBytes + p * (kTileRows * 2) + lane / 4 * 4;
    const auto load = [&](int at) {
      const uint32_t bits = LoadShared4(pair + at);
      return reinterpret_cast<const __half2&>(bits);
    };
    scales[p] = kBlocks != ScaleBlocks::kWide || args.block_scales != nullptr
                    ? load(Stage::kScales)
                    : __float2half2_rn(1.0f);
    if constexpr (kOffsets != Offsets::kNone) offsets[p] = load(Stage::kOffsetsAt);
  }
  float part[kActive][4] = {}, x_sum[kActive][4] = {};
#pragma unroll
  for (int pair = 0; pair < kFragmentsPerTile / 2; ++pair) {
    uint32_t b[kActive][4];
#pragma unroll
    for (int n = 0; n < kActive; ++n) LoadMatrix4(b[n], x[n] + tile * (kTileK * 2) + pair * 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int step = 2 * pair + half;
      T2Of<T> w[4];
      uint32_t a[4];
      if constexpr (kOffsets == Offsets::kIntegers)
        codes.Dequant(Codebook<F>(args), step, w, FromHalf2<T2Of<T>>(offsets[step / kSteps]));
      else
        codes.Dequant(Codebook<F>(args), step, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t&>(w[i]);
#pragma unroll
      for (int n = 0; n < kActive; ++n) {
        Mma<T>(part[n], a, b[n][2 * half], b[n][2 * half + 1]);
        if constexpr (kSumX) Mma<T>(x_sum[n], kOnesA, b[n][2 * half], b[n][2 * half + 1]);
      }
      if ((step + 1) % kSteps != 0) continue;
      const float2 scale = __half22float2(scales[step / kSteps]);
#pragma unroll
      for (int n = 0; n < kActive; ++n) {
        if constexpr (kSumX) AddScaled(x_sum[n], __half22float2(offsets[step / kSteps]), part[n]);
        AddScaled(part[n], scale, sums[n]);
#pragma unroll
        for (int c = 0; c < 4; ++c) part[n][c] = x_sum[n][c] = 0;
      }
    }
  }
}

}  // namespace qmoe_plugin::gemv_sm80
