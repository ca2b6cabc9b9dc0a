#include "ops/qmoe/unpermute.cuh"

#include "ops/common/cuda_host.h"
#include "ops/common/ptx.cuh"
#include "ops/common/types.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 8;  // rows of y whose loads are on their way together

/// One thread makes kWidth neighbouring values: 16 bytes where pointers and H allow, else one. It knows where its rows are before
/// they are there.
template <class T, class Y, int kWidth>
__global__ void __launch_bounds__(kThreads) unpermute(const UnpermuteArgs args) {
  const int vectors = args.hidden_size / kWidth;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= int64_t(args.tokens) * vectors) return;
  const int64_t token = index / vectors, column = index % vectors;
  float sums[kWidth] = {};
  for (int first = 0; first < args.topk; first += kAtOnce) {
    const int count = min(args.topk - first, kAtOnce);
    float scales[kAtOnce];
    int rows[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t slot = token * args.topk + first + min(j, count - 1);
      scales[j] = args.scales[slot], rows[j] = args.sorted_row[slot];
    }
    if (first == 0) WaitForPrevious();
    Vector<Y, kWidth> y[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (j < count)
        y[j] = static_cast<const Vector<Y, kWidth>*>(args.y)[rows[j] * int64_t(vectors) + column];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (j < count) sums[i] += scales[j] * ToFloat(y[j].values[i]);
  }
  Vector<T, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) result.values[i] = FromFloat<T>(sums[i]);
  static_cast<Vector<T, kWidth>*>(args.output)[token * vectors + column] = result;
}

/// fn(kernel, width) for the widest vectors that fit.
template <class Fn>
void WithKernel(DType dtype, bool y_is_float, bool vectors, Fn&& fn) {
  WithType(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWidth = 16 / sizeof(T);
    const auto with_y = [&]<class Y>() {
      if (vectors)
        fn(&unpermute<T, Y, kWidth>, kWidth);
      else
        fn(&unpermute<T, Y, 1>, 1);
    };
    y_is_float ? with_y.template operator()<float>() : with_y.template operator()<T>();
  });
}

}  // namespace

void LaunchUnpermute(const UnpermuteArgs& args, cudaStream_t stream) {
  const size_t row_bytes = size_t(args.hidden_size) * SizeOf(args.dtype);
  const bool vectors = (row_bytes | reinterpret_cast<uintptr_t>(args.output)) % 16 == 0;
  WithKernel(args.dtype, args.y_is_float, vectors, [&](auto* kernel, int width) {
    const int64_t threads = int64_t(args.tokens) * (args.hidden_size / width);
    Launch("unpermute", kernel, (threads + kThreads - 1) / kThreads, kThreads, 0, args.overlap,
           stream, args);
  });
}

void PrepareUnpermute(DType dtype) {
  for (bool y_is_float : {false, true})
    for (bool vectors : {false, true})
      WithKernel(dtype, y_is_float, vectors, [](auto* kernel, int) {
        PrepareKernel("unpermute", reinterpret_cast<const void*>(kernel));
      });
}

}  // namespace qmoe_plugin
