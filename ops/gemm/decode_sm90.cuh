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

/// Formats that scale and center codes in one instruction.
template <class F, Offsets kOffsets>
concept TakesAffine = kOffsets == Offsets::kNone && F::kAffine;
/// Whether they may: blocks have 32 weights or more, and their scales few enough bits for float16.
__host__ inline bool FitAffine(const CudaGemmArgs& args) {
  return args.block_scales == nullptr ||
         (args.block_shift >= 5 && (args.coarse_scales || args.dtype != DType::kFloat16));
}

/// k16 steps that share a scale, as far as the compiler knows.
template <class F, Offsets kOffsets>
constexpr int kScaleSteps = TakesAffine<F, kOffsets> || F::kBlockSize >= 32 ? 2 : 1;

template <class F, class T, Offsets kOffsets>
constexpr float SumFactor() {
  if constexpr (TakesAffine<F, kOffsets>) return F::kAffineFactor;
  if constexpr (TakesScaledValues<F, T, kOffsets>)
    return F::template kScaledFactor<T2Of<T>> / kScaleFactor<T>;
  else
    return 1;
}

/// What a lane needs of one row tile to make operand A of kSteps k16 steps, on its way from shared memory.
template <class F, class T, Offsets kOffsets, int kSteps>
class StepCodes {
 public:
  /// k16 steps `first` on. lane_codes, lane_scales, lane_zeros: of the tile, from this lane's on.
  __device__ void Load(const CudaGemmArgs& args, const char* lane_codes, const char* lane_scales,
                       const char* lane_zeros, int first) {
    LoadCodes(lane_codes, first);
#pragma unroll
    for (int step = 0; step < kSteps; step += kShare) {
      const int block = (16 * (first + step)) >> min(args.block_shift, 6);
      const int at = block * kTileRows * 2;
      scale_[step / kShare] = *reinterpret_cast<const __half2*>(lane_scales + at);
      if constexpr (kOffsets != Offsets::kNone)
        zero_[step / kShare] = *reinterpret_cast<const __half2*>(lane_zeros + at);
    }
  }

  /// Of those from the step `first` on: (centered value + zero offset) * scale, two of each row a register.
  template <int kCount>
  __device__ void Decode(const Codebook<F>& codebook, int first, uint32_t (&a)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) Decode(codebook, first + i, a[i]);
  }

 private:
  using T2 = T2Of<T>;
  static constexpr int kShare = kScaleSteps<F, kOffsets>;

  __device__ void Decode(const Codebook<F>& codebook, int step, uint32_t (&a)[4]) {
    const __half2 scale = scale_[step / kShare], zero = zero_[step / kShare];
    if constexpr (TakesAffine<F, kOffsets>) {
      T2 w[4];
      F::AffineFragment(codes_[step].words, F::PrepareScale(FromHalf2<T2>(scale)), w);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t&>(w[i]);
    } else if constexpr (kFactorsShort<F, kOffsets>) {
      T2 w[4], s = FromHalf2<T2>(scale);
      if constexpr (TakesScaledValues<F, T, kOffsets>) {
        F::ScaledFragment(codes_[step].words, w);
        s = __hmul2(s, FromFloat2<T2>({kScaleFactor<T>, kScaleFactor<T>}));
      } else if constexpr (kOffsets == Offsets::kIntegers) {
        DequantWords<F>(codebook, codes_[step].words, FromHalf2<T2>(zero), w);
      } else {
        DequantWords<F>(codebook, codes_[step].words, w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row g, 1 and 3 row g + 8
        w[i] = __hmul2(w[i], Both(s, i % 2));
        a[i] = reinterpret_cast<const uint32_t&>(w[i]);
      }
    } else {
      // In float32, so that the weight is rounded once.
      const float2 s = __half22float2(scale);
      float2 offset{};
      if constexpr (kOffsets != Offsets::kNone) offset = __half22float2(zero);
      float2 w[4];
      DequantWords<F>(codebook, codes_[step].words, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float o = i % 2 ? offset.y : offset.x, f = i % 2 ? s.y : s.x;
        a[i] = PackPair<T>((w[i].x + o) * f, (w[i].y + o) * f);
      }
    }
  }

  /// In one load, where a lane has them side by side.
  __device__ void LoadCodes(const char* lane_codes, int first) {
    if constexpr (F::kBits >= 4 && sizeof codes_ <= 16) {
      using Words = std::conditional_t<sizeof codes_ == 16, uint4,
                                       std::conditional_t<sizeof codes_ == 8, uint2, uint32_t>>;
      const auto words =
          *reinterpret_cast<const Words*>(lane_codes + FragmentOffset(F::kBits, 0, first));
      memcpy(&codes_, &words, sizeof words);
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        codes_[step].LoadShared(lane_codes, 0, first + step);
    }
  }

  FragmentCodes<F> codes_[kSteps];
  static_assert(kSteps % kShare == 0);
  __half2 scale_[kSteps / kShare], zero_[kSteps / kShare];  // of rows g and g + 8
};

}  // namespace qmoe_plugin::grouped_gemm_sm90
