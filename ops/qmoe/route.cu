#include "ops/qmoe/route.cuh"

#include <algorithm>

#include "ops/common/cuda_host.h"
#include "ops/common/ptx.cuh"
#include "ops/qmoe/route_token.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kMaxWarps = 32;

/// A block routes a slice of tokens, a warp one at a time.
template <int kPerLane, int kThreads>
__global__ void __launch_bounds__(kThreads) route(const RouteArgs args, int* slice_counts) {
  __shared__ int counts[32 * kPerLane];
  const int tokens = SliceTokens(args.tokens), first = blockIdx.x * tokens;
  const int end = min(first + tokens, args.tokens);
  LetNextStart();
  for (int expert = threadIdx.x; expert < args.experts; expert += blockDim.x) counts[expert] = 0;
  __syncthreads();
  for (int token = first + threadIdx.x / 32; token < end; token += blockDim.x / 32) {
    TokenRouter<kPerLane> router(args, token, threadIdx.x % 32);
    router.Run(args.expert_ids + int64_t(token) * args.topk,
               args.scales + int64_t(token) * args.topk);
    router.Count(counts);
  }
  __syncthreads();
  slice_counts += int64_t(blockIdx.x) * args.experts;
  for (int expert = threadIdx.x; expert < args.experts; expert += blockDim.x)
    slice_counts[expert] = counts[expert];
}

/// fn(kernel, the most warps of its blocks) for so many experts, up to 1024.
template <class Fn>
void WithKernel(int experts, Fn&& fn) {
  if (experts <= 256)
    fn(&route<8, kMaxWarps * 32>, kMaxWarps);
  else  // a token takes twice the registers
    fn(&route<32, kMaxWarps / 2 * 32>, kMaxWarps / 2);
}

}  // namespace

void LaunchRoute(const RouteArgs& args, int* slice_counts, cudaStream_t stream) {
  WithKernel(args.experts, [&](auto* kernel, int max_warps) {
    const int warps = std::min(SliceTokens(args.tokens), max_warps);
    Launch("route", kernel, Slices(args.tokens), warps * 32, 0, stream, args, slice_counts);
  });
}

void PrepareRoute() {
  for (int experts : {1, 1024})
    WithKernel(experts, [](auto* kernel, int) {
      PrepareKernel("route", reinterpret_cast<const void*>(kernel));
    });
}

}  // namespace qmoe_plugin
