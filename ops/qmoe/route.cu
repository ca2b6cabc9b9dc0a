#include "ops/qmoe/route.cuh"

#include <cmath>

#include "ops/common/cuda_host.h"
#include "ops/common/types.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kWarps = 4;  // tokens of a block: one a warp
constexpr int kMaxExperts = 1024;
constexpr float kJitter = 0.01f;  // of the sparse mixer

/// Unsigned numbers that order like the logits: NaN below -inf, and 0 below all for "not eligible".
__device__ uint32_t OrderedKey(float x) {
  if (isnan(x)) return 1;
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 equals +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
  return x;
}

__device__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

/// The eligible expert with the largest logit, the lowest index among equals. Lane l looks at
/// experts l, l + 32, ...
__device__ int WarpArgMax(const uint32_t* keys, int experts, int lane) {
  uint32_t best = 0;
  int index = INT32_MAX;
  for (int e = lane; e < experts; e += 32) {
    if (keys[e] > best) best = keys[e], index = e;
  }
  const uint32_t largest = __reduce_max_sync(0xffffffff, best);
  return int(__reduce_min_sync(0xffffffff, unsigned(best == largest ? index : INT32_MAX)));
}

/// 1 / sum of exp(x - largest) over the experts that the sparse mixer keeps: all whose logit is
/// within 2 * kJitter of the largest, relatively; without `excluded`.
__device__ float SparseMixerScale(const float* logits, int experts, float largest, int excluded,
                                  int lane) {
  float sum = 0;
  for (int e = lane; e < experts; e += 32) {
    const float x = logits[e];
    const bool masked = (largest - x) / fmaxf(fabsf(x), fabsf(largest)) > 2 * kJitter;
    if (e != excluded && !masked) sum += expf(x - largest);
  }
  return 1.0f / WarpSum(sum);
}

/// One warp a token.
__global__ void __launch_bounds__(kWarps * 32) route(const RouteArgs args) {
  __shared__ float shared_logits[kWarps][kMaxExperts];
  __shared__ uint32_t shared_keys[kWarps][kMaxExperts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = int64_t(blockIdx.x) * kWarps + warp;
  if (token >= args.tokens) return;  // whole warps; there is no block-wide barrier below
  float* logits = shared_logits[warp];
  uint32_t* keys = shared_keys[warp];

  float largest = -INFINITY;
  for (int e = lane; e < args.experts; e += 32) {
    logits[e] = LoadAsFloat(args.logits, args.logits_dtype, token * args.experts + e);
    keys[e] = OrderedKey(logits[e]);
    largest = fmaxf(largest, logits[e]);  // ignores NaN, the sum below does not
  }
  largest = WarpMax(largest);
  float sum = 0;
  if (!args.sparse_mixer) {
    for (int e = lane; e < args.experts; e += 32) sum += expf(logits[e] - largest);
    sum = WarpSum(sum);
  }
  __syncwarp();

  float total = 0;  // of the selected scales
  int previous = -1;
  for (int j = 0; j < args.topk; ++j) {
    const int expert = WarpArgMax(keys, args.experts, lane);
    __syncwarp();
    if (lane == 0) keys[expert] = 0;
    __syncwarp();
    float scale;
    if (args.weights != nullptr)
      scale = LoadAsFloat(args.weights, args.weights_dtype, token * args.experts + expert);
    else if (args.sparse_mixer)
      scale = SparseMixerScale(logits, args.experts, logits[expert], previous, lane);
    else
      scale = expf(logits[expert] - largest) / sum;
    previous = expert;
    total += scale;
    if (lane == 0) {
      args.expert_ids[token * args.topk + j] = expert;
      args.scales[token * args.topk + j] = scale;
    }
  }
  if (!args.normalize || !(total > 1e-6f) || (args.sparse_mixer && args.weights == nullptr)) return;
  __syncwarp();  // lane 0's scales are visible to the others
  for (int j = lane; j < args.topk; j += 32) args.scales[token * args.topk + j] /= total;
}

}  // namespace

void LaunchRoute(const RouteArgs& args, cudaStream_t stream) {
  Launch("route", &route, (args.tokens + kWarps - 1) / kWarps, kWarps * 32, 0, stream, args);
}

void PrepareRoute() { PrepareKernel("route", reinterpret_cast<const void*>(&route)); }

}  // namespace qmoe_plugin
