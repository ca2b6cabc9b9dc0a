#include "ops/qmoe/route.cuh"

#include "ops/common/cuda_host.h"
#include "ops/common/ptx.cuh"
#include "ops/qmoe/route_token.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kWarps = 4;  // tokens of a block: one a warp

template <int kPerLane>
__global__ void __launch_bounds__(kWarps * 32) route(const RouteArgs args) {
  LetNextStart();
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= args.tokens) return;  // whole warps; there is no block-wide barrier below
  TokenRouter<kPerLane>(args, int(token), threadIdx.x % 32)
      .Run(args.expert_ids + token * args.topk, args.scales + token * args.topk);
}

/// fn(kernel) for so many experts, up to 1024.
template <class Fn>
void WithKernel(int experts, Fn&& fn) {
  if (experts <= 256)
    fn(&route<8>);
  else
    fn(&route<32>);
}

}  // namespace

void LaunchRoute(const RouteArgs& args, cudaStream_t stream) {
  WithKernel(args.experts, [&](auto* kernel) {
    Launch("route", kernel, (args.tokens + kWarps - 1) / kWarps, kWarps * 32, 0, stream, args);
  });
}

void PrepareRoute() {
  for (int experts : {1, 1024})
    WithKernel(experts,
               [](auto* kernel) { PrepareKernel("route", reinterpret_cast<const void*>(kernel)); });
}

}  // namespace qmoe_plugin
