#include "ops/qmoe/activation_quant.cuh"

#include "ops/common/cuda_host.h"
#include "ops/common/types.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kThreads = 256;
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

/// kWidth neighbouring values a thread.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) activation_quant(const ActivationQuantArgs args) {
  constexpr int kLanes = kMxBlock / kWidth;  // that have a block
  LetNextStart();
  WaitForPrevious();
  const int blocks = (args.k + kMxBlock - 1) / kMxBlock, lane = threadIdx.x % kLanes;
  const int64_t block = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t row =
      min(block / blocks, int64_t(args.rows) - 1);  // all lanes take part in shuffles
  const int64_t column = block % blocks * kMxBlock + lane * kWidth;
  const int64_t source = args.x_rows != nullptr ? args.x_rows[row] : row;
  const bool valid = column < args.k && block / blocks < args.rows;
  Vector<T, kWidth> v{};
  if (valid)
    v = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(args.x) +
                                                    source * args.k + column);
  if (args.mode == ActivationQuant::kMxFp8) {
    QuantizeMx(v.values);
  } else {
    const int expert =
        args.expert_offsets != nullptr ? ExpertOfRow(args.expert_offsets, args.experts, row) : 0;
    QuantizeFp8(v.values, args.scales[expert]);
  }
  if (valid)
    *reinterpret_cast<Vector<T, kWidth>*>(static_cast<T*>(args.y) + row * args.k + column) = v;
}

/// fn(kernel, width) for the widest vectors that fit.
template <class Fn>
void WithKernel(DType dtype, bool vectors, Fn&& fn) {
  WithType(dtype, [&](auto type) {
    using T = decltype(type);
    vectors ? fn(&activation_quant<T, 8>, 8) : fn(&activation_quant<T, 1>, 1);
  });
}

}  // namespace

void LaunchActivationQuant(const ActivationQuantArgs& args, cudaStream_t stream) {
  const int64_t blocks = args.rows * ((args.k + kMxBlock - 1) / kMxBlock);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.y);
  WithKernel(args.dtype, args.k % 8 == 0 && addresses % 16 == 0, [&](auto* kernel, int width) {
    const int64_t threads = blocks * (kMxBlock / width);
    Launch("activation_quant", kernel, (threads + kThreads - 1) / kThreads, kThreads, 0,
           args.overlap, stream, args);
  });
}

void PrepareActivationQuant(DType dtype) {
  for (bool vectors : {false, true})
    WithKernel(dtype, vectors, [](auto* kernel, int) {
      PrepareKernel("activation_quant", reinterpret_cast<const void*>(kernel));
    });
}

}  // namespace qmoe_plugin
