// Routing of one token by one warp: shared by the kernel `route` and by GEMM kernels that route for themselves.
#pragma once

#include <cmath>

#include "ops/common/types.cuh"
#include "ops/qmoe/route.cuh"

namespace qmoe_plugin {

inline constexpr float kJitter = 0.01f;  // of the sparse mixer

/// Unsigned numbers that order like the logits: NaN below -inf, and 0 below all for "not eligible".
__device__ inline uint32_t OrderedKey(float x) {
  if (isnan(x)) return 1;
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 equals +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

/// One token's logits of routed experts in the registers of a warp: lane l holds experts l, l + 32, ... Up to
/// 32 * kPerLane experts.
template <int kPerLane>
class TokenRouter {
 public:
  __device__ TokenRouter(const RouteArgs& args, int token, int lane)
      : args_(args),
        experts_(args.experts - args.shared),
        first_(int64_t(token) * args.experts),
        lane_(lane) {
    if (args.logits_dtype == DType::kFloat16)
      Load(static_cast<const __half*>(args.logits));
    else if (args.logits_dtype == DType::kBFloat16)
      Load(static_cast<const __nv_bfloat16*>(args.logits));
    else
      Load(static_cast<const float*>(args.logits));
    largest_ = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys_[i] = Expert(i) < experts_ ? OrderedKey(logits_[i]) : 0;
      largest_ = fmaxf(largest_, logits_[i]);  // ignores NaN, the sum of exponentials does not
    }
  }

  /// Writes the token's experts, routed ones and then shared ones, and their scales unless `scales` is null.
  __device__ void Run(int* expert_ids, float* scales) {
    const int topk = args_.topk - args_.shared;
    for (int j = lane_; j < args_.shared; j += 32) {
      expert_ids[topk + j] = experts_ + j;
      if (scales == nullptr) continue;
      const float gate = LoadAsFloat(args_.logits, args_.logits_dtype, first_ + experts_ + j);
      scales[topk + j] = 1.0f / (1.0f + expf(-gate));
    }
    RunRouted(topk, expert_ids, scales);
  }

  /// After Run: adds one to the count, in shared memory, of each of the token's experts.
  __device__ void Count(int* counts) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (Expert(i) < experts_ && keys_[i] == 0) atomicAdd(&counts[Expert(i)], 1);
    for (int j = lane_; j < args_.shared; j += 32) atomicAdd(&counts[experts_ + j], 1);
  }

 private:
  __device__ void RunRouted(int topk, int* expert_ids, float* scales) {
    float sum = 0;
    if (scales != nullptr) {
      largest_ = WarpMax(largest_);
      if (!args_.sparse_mixer) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (Expert(i) < experts_) sum += expf(logits_[i] - largest_);
        sum = WarpSum(sum);
      }
    }
    float total = 0;  // of the selected scales
    float kept = 0;   // lane j has scale j, of the last 32
    int previous = -1;
    for (int j = 0; j < topk; ++j) {
      float logit;
      const int expert = TakeLargest(&logit);
      if (lane_ == 0) expert_ids[j] = expert;
      if (scales == nullptr) continue;
      float scale;
      if (args_.weights != nullptr)
        scale = LoadAsFloat(args_.weights, args_.weights_dtype, first_ + expert);
      else if (args_.sparse_mixer)
        scale = SparseMixerScale(logit, previous);
      else
        scale = expf(logit - largest_) / sum;
      previous = expert;
      total += scale;
      if (lane_ == j % 32) kept = scale;
      if (j % 32 == 31 && j + 1 < topk) scales[j - 31 + lane_] = kept;
    }
    if (scales == nullptr) return;
    const bool normalizes =
        args_.normalize && total > 1e-6f && !(args_.sparse_mixer && args_.weights == nullptr);
    if (!normalizes) total = 1;
    const int last = (topk - 1) / 32 * 32;  // of those in `kept`, the first
    for (int j = lane_; j < last; j += 32) scales[j] /= total;
    if (last + lane_ < topk) scales[last + lane_] = kept / total;
  }

  /// All at once, so that their latencies overlap.
  template <class L>
  __device__ void Load(const L* logits) {
    L values[kPerLane];  // all get a value: in a loop over tokens they would keep their registers
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      values[i] = Expert(i) < experts_ ? logits[first_ + Expert(i)] : L();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      logits_[i] = Expert(i) < experts_ ? ToFloat(values[i]) : -INFINITY;
  }

  __device__ int Expert(int i) const { return lane_ + 32 * i; }

  /// The eligible expert with the largest logit, the lowest index among equals; it is eligible no more.
  __device__ int TakeLargest(float* logit) {
    uint32_t best = 0;
    int index = INT32_MAX;
    float mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (keys_[i] > best) best = keys_[i], index = Expert(i), mine = logits_[i];
    const uint32_t largest = __reduce_max_sync(0xffffffff, best);
    const int expert =
        int(__reduce_min_sync(0xffffffff, unsigned(best == largest ? index : INT32_MAX)));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (Expert(i) == expert) keys_[i] = 0;
    *logit = __shfl_sync(0xffffffff, mine, expert % 32);
    return expert;
  }

  /// 1 / sum of exp(x - largest) over the experts that the sparse mixer keeps: all whose logit is within 2 * kJitter of the
  /// largest, relatively; without `excluded`.
  __device__ float SparseMixerScale(float largest, int excluded) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float x = logits_[i];
      if (Expert(i) >= experts_ || Expert(i) == excluded) continue;
      const bool masked = (largest - x) / fmaxf(fabsf(x), fabsf(largest)) > 2 * kJitter;
      if (!masked) sum += expf(x - largest);
    }
    return 1.0f / WarpSum(sum);
  }

  const RouteArgs& args_;
  int experts_;    // routed ones
  int64_t first_;  // element of the token's first logit
  int lane_;
  float largest_;
  float logits_[kPerLane];
  uint32_t keys_[kPerLane];
};

}  // namespace qmoe_plugin
