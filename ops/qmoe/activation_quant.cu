#include "ops/qmoe/activation_quant.cuh"

#include "ops/common/cuda_host.h"
#include "ops/common/types.cuh"
#include "ops/qmoe/activation_quant.h"

namespace qmoe_plugin {
namespace {

constexpr int kThreads = 256;
static_assert(kMxBlock == 32, "a warp takes one block, a value a lane");

/// The expert that row `row` belongs to: the last one whose rows begin at or before it. Experts
/// without rows begin where the next one does and are passed over.
__device__ int ExpertOfRow(const int* offsets, int experts, int64_t row) {
  int low = 0, high = experts;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/// One warp for 32 values of a row.
template <class T>
__global__ void __launch_bounds__(kThreads) activation_quant(const ActivationQuantArgs args) {
  const int blocks = (args.k + kMxBlock - 1) / kMxBlock, lane = threadIdx.x % 32;
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t row = warp / blocks;
  if (row >= args.rows) return;  // whole warps
  const int64_t column = warp % blocks * kMxBlock + lane;
  const int64_t source = args.x_rows != nullptr ? args.x_rows[row] : row;
  const bool valid = column < args.k;
  const float x = valid ? ToFloat(static_cast<const T*>(args.x)[source * args.k + column]) : 0.0f;
  float y;
  if (args.mode == ActivationQuant::kMxFp8) {
    y = QuantizeMx(x, MxScaleOf(__reduce_max_sync(0xffffffff, MagnitudeBits(x))));
  } else {
    const int expert =
        args.expert_offsets != nullptr ? ExpertOfRow(args.expert_offsets, args.experts, row) : 0;
    y = RoundToE4M3(x / args.scales[expert]);
  }
  if (valid) static_cast<T*>(args.y)[row * args.k + column] = FromFloat<T>(y);
}

}  // namespace

void LaunchActivationQuant(const ActivationQuantArgs& args, cudaStream_t stream) {
  const int64_t warps = args.rows * ((args.k + kMxBlock - 1) / kMxBlock);
  constexpr int kWarps = kThreads / 32;
  WithType(args.dtype, [&](auto type) {
    Launch("activation_quant", &activation_quant<decltype(type)>, (warps + kWarps - 1) / kWarps,
           kThreads, 0, stream, args);
  });
}

void PrepareActivationQuant(DType dtype) {
  WithType(dtype, [](auto type) {
    PrepareKernel("activation_quant",
                  reinterpret_cast<const void*>(&activation_quant<decltype(type)>));
  });
}

}  // namespace qmoe_plugin
