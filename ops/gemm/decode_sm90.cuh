// Operand A of grouped_gemm_sm90: codes and scales of a row tile become weights of 16 bits, in registers.
//
// A weight is rounded once to the activation type: by a product of 16 bits where these hold both factors, else in float32.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/common/tile.cuh"
#include "ops/gemm/pipeline_sm90.cuh"

namespace qmoe_plugin::grouped_gemm_sm90 {

/// Whether weights are scaled in 16 bits, with one rounding: values, integer offsets and scales are exact there.
template <class F, Offsets kOffsets>
constexpr bool kFactorsShort = kOffsets != Offsets::kAny && !F::kCodebook;

/// Formats that give scaled values give them to weights that are multiplied by their block scale anyway. Those are below 32
/// (ops/pack_scales.h), so that there is room for a part of the factor; the sums get the rest.
template <class F, class T, Offsets kOffsets>
concept TakesScaledValues =
    kOffsets == Offsets::kNone && requires { F::template kScaledFactor<T2Of<T>>; };
template <class T>
constexpr float kScaleFactor = std::is_same_v<T, __half> ? 0x1p10f : 0x1p118f;

template <class F, class T, Offsets kOffsets>
constexpr float SumFactor() {
  if constexpr (TakesScaledValues<F, T, kOffsets>)
    return F::template kScaledFactor<T2Of<T>> / kScaleFactor<T>;
  else
    return 1;
}

__device__ inline __half2 Both(__half2 v, bool second) {
  return second ? __high2half2(v) : __low2half2(v);
}
__device__ inline __nv_bfloat162 Both(__nv_bfloat162 v, bool second) {
  return second ? __high2bfloat162(v) : __low2bfloat162(v);
}

/// What a lane needs of one row tile to make operand A of kSteps k16 steps, on its way from shared memory.
template <class F, Offsets kOffsets, int kSteps>
struct StepCodes {
  FragmentCodes<F> codes[kSteps];
  __half2 scale[kSteps], zero[kSteps];  // of rows g and g + 8

  /// k16 steps `first` on.
  __device__ void Load(const CudaGemmArgs& args, const char* tile_codes, const char* tile_scales,
                       const char* tile_zeros, int first, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      codes[step].LoadShared(tile_codes, lane, first + step);
      const int block = (16 * (first + step)) >> min(args.block_shift, 6);
      const int at = (block * kTileRows + lane / 4 * 2) * 2;
      scale[step] = *reinterpret_cast<const __half2*>(tile_scales + at);
      if constexpr (kOffsets != Offsets::kNone)
        zero[step] = *reinterpret_cast<const __half2*>(tile_zeros + at);
    }
  }

  /// (centered value + zero offset) * scale, two of each row a register.
  template <class T>
  __device__ void Decode(const Codebook<F>& codebook, uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kFactorsShort<F, kOffsets>) {
        using T2 = T2Of<T>;
        T2 w[4], s = FromHalf2<T2>(scale[step]);
        if constexpr (TakesScaledValues<F, T, kOffsets>) {
          F::ScaledFragment(codes[step].words, w);
          s = __hmul2(s, FromFloat2<T2>({kScaleFactor<T>, kScaleFactor<T>}));
        } else {
          DequantWords<F>(codebook, codes[step].words, w);
        }
        if constexpr (kOffsets == Offsets::kIntegers) {
          const T2 offset = FromHalf2<T2>(zero[step]);
#pragma unroll
          for (int i = 0; i < 4; ++i) w[i] = __hadd2(w[i], Both(offset, i % 2));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row g, 1 and 3 row g + 8
          w[i] = __hmul2(w[i], Both(s, i % 2));
          a[step][i] = reinterpret_cast<const uint32_t&>(w[i]);
        }
      } else {
        // In float32, so that the weight is rounded once.
        const float2 s = __half22float2(scale[step]);
        float2 offset{};
        if constexpr (kOffsets != Offsets::kNone) offset = __half22float2(zero[step]);
        float2 w[4];
        DequantWords<F>(codebook, codes[step].words, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float o = i % 2 ? offset.y : offset.x, f = i % 2 ? s.y : s.x;
          a[step][i] = PackPair<T>((w[i].x + o) * f, (w[i].y + o) * f);
        }
      }
    }
  }
};

}  // namespace qmoe_plugin::grouped_gemm_sm90
